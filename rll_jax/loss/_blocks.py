"""The terms of blocks of queries, and their hand-written derivatives.

A block's pairs are computed, used and dropped, so memory is O(block_size * M).
Private to `rll_jax.loss`. Imports jax and numpy alone.
"""

# jax's stubs leave some parameters of jit, map and pad without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable
import functools
from typing import Any, NamedTuple, TypeVar, TypeVarTuple, cast

import jax
from jax import lax
import jax.numpy as jnp

from rll_jax.loss._pairs import (
    Arrays,
    Constants,
    Pairs,
    Spec,
    dot,
    loop_over_near_pairs,
    make_pairs,
    row_sum,
    take_rows,
)

Tree = TypeVar("Tree")
Result = TypeVar("Result")
Parts = TypeVarTuple("Parts")


class Terms(NamedTuple):
    """Numbers of each query, (n, 1)."""

    positive: jax.Array  # L_P, 0 for an empty list
    negative: jax.Array  # L_N, 0 for an empty list
    log_mass: jax.Array  # log of the sum of both lists' weights, -inf where both are empty
    num_positives: jax.Array  # |P*|, int32
    num_negatives: jax.Array  # |N*|, int32


class _Factors(NamedTuple):
    """What turns a pair's weight into its coefficient, (B, 1) each."""

    scale_pos: jax.Array  # derivative by L_P over the sum of its weights
    scale_neg: jax.Array  # derivative by L_N over the sum of its weights
    terms: Terms | None  # needed where weights are differentiated
    mass_pos: jax.Array | None  # derivative by the log of the mass, through a positive's weight
    mass_neg: jax.Array | None  # the same through a negative's; None where mass is a constant


class _Gradient(NamedTuple):
    """A block's gradient. That of its queries is total * centred queries - pull."""

    total: jax.Array  # (B, 1) sum of the coefficients of a query's far pairs
    pull: jax.Array  # (B, D) sum of coefficient * gallery row over them, less the near pairs' share
    gallery: jax.Array | None  # (M, D), or None where the gallery is a constant


def fixed_gallery_loss(spec: Spec, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Computes L_i of every query with the gallery as a constant, whatever is differentiated.

    Returns:
      L_i, (N, 1), whose derivative is worked out together with the value; and the log of the mass,
      (N, 1), which has no derivative.
    """
    loss, log_mass = cast("tuple[jax.Array, jax.Array]", _compiled_fixed_loss(spec, *arrays))
    return loss, log_mass


def list_terms(spec: Spec, arrays: Arrays) -> Terms:
    """Computes the `Terms` of every query.

    The first three are differentiable by the queries, and by the gallery where
    `spec.gallery_gradient`.
    """
    return cast("Terms", _compiled_list_terms(spec, *arrays))


def balanced(balance: jax.Array, terms: Terms) -> jax.Array:
    """Returns L_i = (1 - balance) L_P + balance L_N of every query."""
    return (1 - balance) * terms.positive + balance * terms.negative


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x / y, and x where y is 0.

    That x is the 0 of an empty list, or a NaN that a maximum dropped, as XLA's on the CPU does.
    """
    return jnp.where(y == 0, x, x / jnp.where(y == 0, 1, y))


def _hinge(spec: Spec, constants: Constants, excess: jax.Array) -> jax.Array:
    """Returns the pair term h with the sign of the excess."""
    if not spec.squared:
        return excess
    return excess * (excess / 2 + jnp.where(excess > 0, constants.alpha_pos, constants.alpha))


def _log_mass(pairs: Pairs) -> jax.Array:
    """Returns the log of the sum of both lists' weights. An empty list has log(0) = -inf."""
    return jnp.logaddexp(
        jnp.log(pairs.sum_pos) + pairs.log_scale_pos, jnp.log(pairs.sum_neg) + pairs.log_scale_neg
    )


def _block_terms(spec: Spec, constants: Constants, pairs: Pairs) -> Terms:
    """Returns the terms of one block's queries."""
    hinge = _hinge(spec, constants, pairs.excess)
    return Terms(
        _ratio(row_sum(pairs.weight * jnp.maximum(hinge, 0)), pairs.sum_pos),
        _ratio(row_sum(pairs.weight * jnp.minimum(hinge, 0)), pairs.sum_neg),
        _log_mass(pairs),
        jnp.sum(pairs.excess > 0, axis=1, keepdims=True, dtype=jnp.int32),
        jnp.sum(pairs.excess < 0, axis=1, keepdims=True, dtype=jnp.int32),
    )


def _mass_factor(
    cotangent: jax.Array, total: jax.Array, log_scale: jax.Array, log_mass: jax.Array
) -> jax.Array:
    """Returns the derivative by the log of the mass through one list, 0 for an empty list."""
    return cotangent * jnp.where(total == 0, 0, jnp.exp(log_scale - log_mass))


def _coefficient(
    spec: Spec,
    constants: Constants,
    factors: _Factors,
    distance: jax.Array,
    excess: jax.Array,
    weight: jax.Array,
) -> jax.Array:
    """Returns the derivative by a pair's distance, over that distance.

    The arguments of a pair are matrices (B, M), or columns (B, 1) with one pair for each query.
    """
    positive, distance = weight > 0, jnp.abs(distance)
    by_distance = jnp.where(positive, factors.scale_pos, factors.scale_neg)
    slope = distance if spec.squared else 1
    if spec.weight_gradient and factors.terms is not None:
        temperature = jnp.where(positive, constants.temperature_pos, constants.temperature_neg)
        term = jnp.where(positive, factors.terms.positive, factors.terms.negative)
        slope = slope + temperature * (jnp.abs(_hinge(spec, constants, excess)) - term)
    by_distance = by_distance * slope
    if factors.mass_pos is not None and factors.mass_neg is not None:
        by_distance += jnp.where(
            positive,
            constants.temperature_pos * factors.mass_pos,
            constants.temperature_neg * factors.mass_neg,
        )
    # A pair at distance 0 has no direction.
    return jnp.where(distance == 0, 0, weight * by_distance / distance)


def _block_gradient(
    arrays: Arrays,
    pairs: Pairs,
    coefficient: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    *,
    gallery_gradient: bool,
) -> _Gradient:
    """Returns a block's gradient: products for far pairs, differences for near ones."""
    queries, rows, gallery, columns, _ = arrays
    far = jnp.where(pairs.distance < 0, 0, coefficient(pairs.distance, pairs.excess, pairs.weight))
    pull = dot(far, columns.centred, ((1,), (0,)))
    gallery_pull = dot(far, rows.centred, ((0,), (0,))) if gallery_gradient else None

    def add_near_pair(
        pulls: tuple[jax.Array, jax.Array | None], column: jax.Array, hit: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        pull, gallery_pull = pulls
        distance, excess, weight = (
            row_sum(jnp.where(hit, x, 0)) for x in (pairs.distance, pairs.excess, pairs.weight)
        )
        push = coefficient(distance, excess, weight) * (queries - take_rows(gallery, column))
        pull = pull - push
        if gallery_pull is None:
            return pull, None
        return pull, gallery_pull.at[column[:, 0]].add(push, mode="drop")

    def distances(_: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        return pairs.distance

    # The loop also keeps XLA on the CPU from fusing a product with what follows it, which would
    # slow the product down by a third.
    pull, gallery_pull = loop_over_near_pairs(
        pairs.any_near, (pull, gallery_pull), add_near_pair, distances
    )
    total = row_sum(far)
    if gallery_pull is None:
        return _Gradient(total, pull, None)
    return _Gradient(total, pull, jnp.sum(far, axis=0)[:, None] * columns.centred - gallery_pull)


def _split(
    spec: Spec, arrays: Arrays, *args: *Parts
) -> tuple[int, Callable[[jax.Array], tuple[Arrays, *Parts]]]:
    """Splits the queries, and any further trees with a row for each, into blocks.

    Returns:
      The number of blocks, and a function from a block's number to its arrays and its part of the
      further trees. The last block is padded with zeros.
    """
    n, size = arrays.queries.shape[0], spec.block_size
    count = -(-n // size)

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, count * size - n)] + [(0, 0)] * (x.ndim - 1))

    padded = jax.tree.map(pad, (arrays.queries, arrays.rows, args))

    def block(number: jax.Array) -> tuple[Arrays, *Parts]:
        def cut(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, number * size, size)

        queries, rows, parts = jax.tree.map(cut, padded)
        return arrays._replace(queries=queries, rows=rows), *parts

    return count, block


def _join(n: int, tree: Tree) -> Tree:
    """Joins the blocks (count, size, ...) of each array into n rows (n, ...), without padding."""

    def join(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])[:n]

    return jax.tree.map(join, tree)


def _map_blocks(
    spec: Spec, body: Callable[[Arrays, *Parts], Result], arrays: Arrays, *args: *Parts
) -> Result:
    """Returns `body(arrays, *args)`, computed for one block of queries at a time."""
    n = arrays.queries.shape[0]
    if spec.block_size >= n:
        return body(arrays, *args)
    count, block = _split(spec, arrays, *args)

    def run(number: jax.Array) -> Result:
        return body(*block(number))

    return _join(n, cast("Result", lax.map(run, jnp.arange(count))))


def _fixed_value(spec: Spec, *args: Any) -> tuple[jax.Array, jax.Array]:
    """Computes `fixed_gallery_loss` of `Arrays(*args)` where no derivative is asked for."""
    arrays = Arrays(*args)

    def body(block: Arrays) -> tuple[jax.Array, jax.Array]:
        terms = _block_terms(spec, block.constants, make_pairs(spec, block))
        return balanced(block.constants.balance, terms), terms.log_mass

    return _map_blocks(spec, body, arrays)


def _fixed_forward(spec: Spec, *args: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Computes the value, and the gradient (N, D) of every L_i by its query.

    That gradient needs nothing but the pairs of the block. So it is worked out together with the
    value, and no pair is kept or computed again.
    """
    arrays = Arrays(*args)
    balance = arrays.constants.balance

    def body(block: Arrays) -> tuple[tuple[jax.Array, jax.Array], _Gradient]:
        pairs = make_pairs(spec, block)
        scale_pos, scale_neg = _ratio(1 - balance, pairs.sum_pos), _ratio(balance, pairs.sum_neg)
        if spec.weight_gradient:
            terms = _block_terms(spec, block.constants, pairs)
            loss = balanced(balance, terms)
        else:
            # One sum over the pairs instead of a sum for each list.
            terms = None
            scale = jnp.where(pairs.weight > 0, scale_pos, scale_neg)
            loss = row_sum(pairs.weight * scale * _hinge(spec, block.constants, pairs.excess))
        log_mass = _log_mass(pairs)
        factors = _Factors(scale_pos, scale_neg, terms, None, None)
        coefficient = functools.partial(_coefficient, spec, block.constants, factors)
        gradient = _block_gradient(block, pairs, coefficient, gallery_gradient=False)
        return (loss, log_mass), gradient

    outputs, gradient = _map_blocks(spec, body, arrays)
    return outputs, gradient.total * arrays.rows.centred - gradient.pull


def _fixed_backward(
    spec: Spec, gradient: jax.Array, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, None, None, None, None]:
    """Returns the gradient of the queries, and None for the other arrays."""
    loss_cotangent, _ = cotangents
    return loss_cotangent * gradient, None, None, None, None


def _terms_value(spec: Spec, *args: Any) -> Terms:
    """Computes `list_terms` of `Arrays(*args)`."""

    def body(block: Arrays) -> Terms:
        return _block_terms(spec, block.constants, make_pairs(spec, block))

    return _map_blocks(spec, body, Arrays(*args))


def _terms_forward(spec: Spec, *args: Any) -> tuple[Terms, Arrays]:
    """Computes the value, and keeps the arrays for the derivative."""
    arrays = Arrays(*args)
    return list_terms(spec, arrays), arrays


def _terms_backward(
    spec: Spec, arrays: Arrays, cotangents: Terms
) -> tuple[jax.Array, None, jax.Array | None, None, None]:
    """Returns the gradients of the queries and of the gallery, and None for the other arrays."""
    by_term = (cotangents.positive, cotangents.negative, cotangents.log_mass)
    body = functools.partial(_terms_block_gradient, spec)
    if not spec.gallery_gradient:
        gradient = _map_blocks(spec, body, arrays, by_term)
    else:
        count, block = _split(spec, arrays, by_term)

        def step(
            on_gallery: jax.Array, number: jax.Array
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            gradient = body(*block(number))
            if gradient.gallery is not None:
                on_gallery = on_gallery + gradient.gallery
            return on_gallery, (gradient.total, gradient.pull)

        zero = jnp.zeros_like(arrays.gallery)
        on_gallery, on_queries = lax.scan(step, zero, jnp.arange(count))
        total, pull = _join(arrays.queries.shape[0], on_queries)
        gradient = _Gradient(total, pull, on_gallery)
    on_queries = gradient.total * arrays.rows.centred - gradient.pull
    return on_queries, None, gradient.gallery, None, None


def _terms_block_gradient(
    spec: Spec, block: Arrays, cotangents: tuple[jax.Array, jax.Array, jax.Array]
) -> _Gradient:
    """Returns a block's gradient for the cotangents of L_P, L_N and the log of the mass, (B, 1)."""
    positive, negative, log_mass = cotangents
    pairs = make_pairs(spec, block)
    scale_pos, scale_neg = _ratio(positive, pairs.sum_pos), _ratio(negative, pairs.sum_neg)
    terms = _block_terms(spec, block.constants, pairs)
    factors = _Factors(
        scale_pos,
        scale_neg,
        terms,
        _mass_factor(log_mass, pairs.sum_pos, pairs.log_scale_pos, terms.log_mass),
        _mass_factor(log_mass, pairs.sum_neg, pairs.log_scale_neg, terms.log_mass),
    )
    coefficient = functools.partial(_coefficient, spec, block.constants, factors)
    return _block_gradient(block, pairs, coefficient, gallery_gradient=spec.gallery_gradient)


_fixed_loss = cast("Any", jax.custom_vjp(_fixed_value, nondiff_argnums=(0,)))
_fixed_loss.defvjp(_fixed_forward, _fixed_backward)
_compiled_fixed_loss = jax.jit(_fixed_loss, static_argnums=0)

_list_terms = cast("Any", jax.custom_vjp(_terms_value, nondiff_argnums=(0,)))
_list_terms.defvjp(_terms_forward, _terms_backward)
_compiled_list_terms = jax.jit(_list_terms, static_argnums=0)
