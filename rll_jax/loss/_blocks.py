"""The terms and the loss of blocks of queries, and their hand-written derivatives.

A block's pairs are computed, used and dropped, so memory is O(block_size * M).
Private to `rll_jax.loss`. Imports jax and numpy alone.
"""

# jax's stubs leave some parameters of jit, map, pad, psum and pmax without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar, TypeVarTuple, cast

import jax
from jax import lax
import jax.numpy as jnp

from rll_jax.loss._differences import weighted_sums, weighted_sums_of_columns
from rll_jax.loss._pairs import (
    Arrays,
    Constants,
    Pairs,
    Spec,
    dot,
    exact_where_near,
    make_pairs,
    precision_of,
    row_sum,
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


class _Cotangents(NamedTuple):
    """The derivative of the loss by each query's terms, (n, 1)."""

    positive: jax.Array
    negative: jax.Array
    log_mass: jax.Array | None  # None where the mass is a constant


class _Factors(NamedTuple):
    """What turns a pair's weight into its coefficient, (B, 1) each."""

    scale_pos: jax.Array  # derivative by L_P over the sum of its weights
    scale_neg: jax.Array  # derivative by L_N over the sum of its weights
    terms: Terms | None  # needed where weights are differentiated
    mass_pos: jax.Array | None  # derivative by the log of the mass, through a positive's weight
    mass_neg: jax.Array | None  # the same through a negative's; None where mass is a constant


class _Gradient(NamedTuple):
    """The derivative by the queries of a block, or of all, and by the gallery."""

    queries: jax.Array  # (B, D)
    gallery: jax.Array | None  # (M, D), or None where the gallery is a constant


def loss(spec: Spec, arrays: Arrays, valid: jax.Array | None) -> jax.Array:
    """Computes sum_i weight_i L_i over this device's queries.

    It is differentiable once, forward and in reverse, by the queries, and by the gallery where
    `spec.gallery_gradient`. Over the devices the derivatives sum to that of the whole batch's loss.

    Args:
      spec: the variant.
      arrays: this device's queries, and the gallery of all devices.
      valid: (N, 1) bool, False for a query that is padding; None where every query is valid.
    """
    return cast("jax.Array", _compiled_loss(spec, *arrays, valid))


def list_terms(spec: Spec, arrays: Arrays) -> Terms:
    """Computes the `Terms` of every query.

    The first three are differentiable by the queries, and by the gallery where
    `spec.gallery_gradient`: once, in reverse.
    """
    return cast("Terms", _compiled_list_terms(spec, *arrays))


def query_weights(spec: Spec, log_mass: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Returns weight_i, (N, 1). The weights of all devices sum to 1, or to 0 where none count."""
    if not spec.mass:
        return _uniform_weights(spec.axis_name, jnp.ones_like(log_mass), valid)
    active = ~(log_mass == -jnp.inf)
    active = active if valid is None else active & valid
    largest = lax.stop_gradient(jnp.max(jnp.where(active, log_mass, -jnp.inf)))
    if spec.axis_name is not None:
        largest = cast("jax.Array", lax.pmax(largest, spec.axis_name))
    # The largest mass becomes 1, so that no mass overflows. It is -inf where no query is active.
    none_active = largest == -jnp.inf
    shift = jnp.where(none_active, 0, largest)
    mass = jnp.where(active, jnp.exp(jnp.where(active, log_mass, 0) - shift), 0)
    return mass / jnp.where(none_active, 1, _sum_over_devices(jnp.sum(mass), spec.axis_name))


def _uniform_weights(
    axis_name: Hashable | None, ones: jax.Array, valid: jax.Array | None
) -> jax.Array:
    """Returns 1 / number of valid queries of all devices, and 0 for padding."""
    if valid is None:
        count = ones.shape[0] if axis_name is None else ones.shape[0] * lax.axis_size(axis_name)
        return ones / jnp.asarray(count, ones.dtype)
    count = _sum_over_devices(jnp.sum(valid, dtype=jnp.int32), axis_name)
    return jnp.where(valid, ones, 0) / jnp.maximum(count, 1).astype(ones.dtype)


def _sum_over_devices(x: jax.Array, axis_name: Hashable | None) -> jax.Array:
    """Returns the sum over the devices of the axis, or `x` itself without an axis."""
    return x if axis_name is None else cast("jax.Array", lax.psum(x, axis_name))


def _balanced(balance: jax.Array, terms: Terms) -> jax.Array:
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

    def hinge(excess: jax.Array) -> jax.Array:
        return _hinge(spec, constants, excess)

    def count(is_listed: Callable[[jax.Array], jax.Array]) -> jax.Array:
        counts = row_sum(lambda excess: is_listed(excess).astype(jnp.int32), pairs.excess)
        return counts.astype(jnp.int32)

    positive = row_sum(lambda w, e: w * jnp.maximum(hinge(e), 0), pairs.weight, pairs.excess)
    negative = row_sum(lambda w, e: w * jnp.minimum(hinge(e), 0), pairs.weight, pairs.excess)
    return Terms(
        _ratio(positive, pairs.sum_pos),
        _ratio(negative, pairs.sum_neg),
        _log_mass(pairs),
        count(lambda excess: excess > 0),
        count(lambda excess: excess < 0),
    )


def _mass_factor(
    cotangent: jax.Array, total: jax.Array, log_scale: jax.Array, log_mass: jax.Array
) -> jax.Array:
    """Returns the derivative by the log of the mass through one list, 0 for an empty list."""
    return cotangent * jnp.where(total == 0, 0, jnp.exp(log_scale - log_mass))


def _coefficients(spec: Spec, constants: Constants, factors: _Factors, pairs: Pairs) -> jax.Array:
    """Returns the derivative by each pair's distance, over that distance, (B, M)."""
    positive, distance = pairs.weight > 0, pairs.distance
    by_distance = jnp.where(positive, factors.scale_pos, factors.scale_neg)
    slope = distance if spec.squared else 1
    if spec.weight_gradient and factors.terms is not None:
        temperature = jnp.where(positive, constants.temperature_pos, constants.temperature_neg)
        term = jnp.where(positive, factors.terms.positive, factors.terms.negative)
        slope = slope + temperature * (jnp.abs(_hinge(spec, constants, pairs.excess)) - term)
    by_distance = by_distance * slope
    if factors.mass_pos is not None and factors.mass_neg is not None:
        by_distance += jnp.where(
            positive,
            constants.temperature_pos * factors.mass_pos,
            constants.temperature_neg * factors.mass_neg,
        )
    # A pair at distance 0 has no direction.
    apart = distance != 0
    return jnp.where(apart, pairs.weight * by_distance / jnp.where(apart, distance, 1), 0)


def _pull(spec: Spec, arrays: Arrays, pairs: Pairs, coefficients: jax.Array) -> _Gradient:
    """Returns a block's gradient: by products, or by differences where a pair is near."""
    rows, columns = arrays.rows, arrays.columns
    queries, gallery = arrays.queries, arrays.gallery
    total = row_sum(lambda c: c, coefficients)
    precision = precision_of(spec)
    pulled = dot(coefficients, columns.centred, ((1,), (0,)), precision)
    on_queries = total * rows.centred - pulled
    on_gallery = None
    if spec.gallery_gradient:
        total = jnp.sum(coefficients, axis=0)[:, None]
        pulled = dot(coefficients, rows.centred, ((0,), (0,)), precision)
        on_gallery = total * columns.centred - pulled

    def exact() -> _Gradient:
        return _Gradient(
            weighted_sums(coefficients, queries, gallery),
            weighted_sums_of_columns(coefficients, queries, gallery)
            if spec.gallery_gradient
            else None,
        )

    return exact_where_near(pairs.any_near, _Gradient(on_queries, on_gallery), exact)


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


def _sum_blocks(
    spec: Spec,
    body: Callable[[Arrays, *Parts], tuple[Result, _Gradient]],
    arrays: Arrays,
    *args: *Parts,
) -> tuple[Result, _Gradient]:
    """Returns the same for a body with a gradient, summed over the blocks for the gallery."""
    n = arrays.queries.shape[0]
    if spec.block_size >= n:
        return body(arrays, *args)
    count, block = _split(spec, arrays, *args)

    def step(
        on_gallery: jax.Array | None, number: jax.Array
    ) -> tuple[jax.Array | None, tuple[Result, jax.Array]]:
        result, gradient = body(*block(number))
        if on_gallery is not None and gradient.gallery is not None:
            on_gallery = on_gallery + gradient.gallery
        return on_gallery, (result, gradient.queries)

    zero = jnp.zeros_like(arrays.gallery) if spec.gallery_gradient else None
    on_gallery, blocks = lax.scan(step, zero, jnp.arange(count))
    result, on_queries = _join(n, blocks)
    return result, _Gradient(on_queries, on_gallery)


def _losses(spec: Spec, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Returns L_i and the log of the mass of every query, (N, 1) each."""
    terms = _terms_value(spec, *arrays)
    return _balanced(arrays.constants.balance, terms), terms.log_mass


def _gradient(spec: Spec, arrays: Arrays, cotangents: _Cotangents) -> _Gradient:
    """Returns the gradient for given derivatives by every query's terms."""

    def body(block: Arrays, cotangents: _Cotangents) -> tuple[None, _Gradient]:
        pairs = make_pairs(spec, block)
        terms = _block_terms(spec, block.constants, pairs)
        return None, _block_gradient(spec, block, pairs, terms, cotangents)

    _, gradient = _sum_blocks(spec, body, arrays, cotangents)
    return gradient


def _block_gradient(
    spec: Spec, block: Arrays, pairs: Pairs, terms: Terms | None, cotangents: _Cotangents
) -> _Gradient:
    """Returns the gradient of one block whose pairs are known.

    Its terms are needed where the weights are differentiated, or the mass.
    """
    mass_pos = mass_neg = None
    if cotangents.log_mass is not None and terms is not None:
        mass_pos, mass_neg = (
            _mass_factor(cotangents.log_mass, total, log_scale, terms.log_mass)
            for total, log_scale in (
                (pairs.sum_pos, pairs.log_scale_pos),
                (pairs.sum_neg, pairs.log_scale_neg),
            )
        )
    factors = _Factors(
        _ratio(cotangents.positive, pairs.sum_pos),
        _ratio(cotangents.negative, pairs.sum_neg),
        terms,
        mass_pos,
        mass_neg,
    )
    coefficients = _coefficients(spec, block.constants, factors, pairs)
    return _pull(spec, block, pairs, coefficients)


def _weighted_losses(
    spec: Spec, arrays: Arrays, weight: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], _Gradient]:
    """Returns weight_i L_i, the log of the mass, and the gradient of their sum, in one pass.

    The gradient of L_i needs nothing but the pairs of query i. So no pair is kept or computed
    again.
    """
    balance = arrays.constants.balance

    def body(block: Arrays, weight: jax.Array) -> tuple[tuple[jax.Array, jax.Array], _Gradient]:
        pairs = make_pairs(spec, block)
        cotangents = _Cotangents((1 - balance) * weight, balance * weight, None)
        if spec.weight_gradient:
            terms = _block_terms(spec, block.constants, pairs)
            losses = weight * _balanced(balance, terms)
        else:
            terms, losses = None, _sum_of_lists(spec, block.constants, pairs, cotangents)
        gradient = _block_gradient(spec, block, pairs, terms, cotangents)
        return (losses, _log_mass(pairs)), gradient

    return _sum_blocks(spec, body, arrays, weight)


def _sum_of_lists(
    spec: Spec, constants: Constants, pairs: Pairs, by_terms: _Cotangents
) -> jax.Array:
    """Returns what the terms give by their factors, (B, 1): one sum over the pairs for both."""
    scale_pos = _ratio(by_terms.positive, pairs.sum_pos)
    scale_neg = _ratio(by_terms.negative, pairs.sum_neg)

    def pair_loss(weight: jax.Array, excess: jax.Array) -> jax.Array:
        scale = jnp.where(weight > 0, scale_pos, scale_neg)
        return weight * scale * _hinge(spec, constants, excess)

    return row_sum(pair_loss, pairs.weight, pairs.excess)


def _loss_value(spec: Spec, *args: Any) -> jax.Array:
    """Computes `loss` where no derivative is asked for."""
    arrays, valid = Arrays(*args[:-1]), args[-1]
    losses, log_mass = _losses(spec, arrays)
    return jnp.sum(query_weights(spec, log_mass, valid) * losses)


def _loss_and_gradient(spec: Spec, *args: Any) -> tuple[jax.Array, _Gradient]:
    """Computes `loss` and its derivative by the queries and the gallery."""
    arrays, valid = Arrays(*args[:-1]), args[-1]
    ones = jnp.ones_like(arrays.rows.size)
    if not spec.mass:
        weight = _uniform_weights(spec.axis_name, ones, valid)
        (losses, _), gradient = _weighted_losses(spec, arrays, weight)
        return jnp.sum(losses), gradient
    if not (spec.weight_gradient or spec.gallery_gradient):
        (losses, log_mass), gradient = _weighted_losses(spec, arrays, ones)
        weight = query_weights(spec, log_mass, valid)
        return jnp.sum(weight * losses), _Gradient(weight * gradient.queries, None)
    return _loss_and_gradient_by_mass(spec, arrays, valid)


def _loss_and_gradient_by_mass(
    spec: Spec, arrays: Arrays, valid: jax.Array | None
) -> tuple[jax.Array, _Gradient]:
    """Computes the same where the gradient needs the weights, which are known after all masses."""
    balance = arrays.constants.balance
    pairs = terms = None
    if spec.block_size >= arrays.queries.shape[0]:
        pairs = make_pairs(spec, arrays)
        terms = _block_terms(spec, arrays.constants, pairs)
        losses, log_mass = _balanced(balance, terms), terms.log_mass
    else:
        losses, log_mass = _losses(spec, arrays)
    weight = query_weights(spec, log_mass, valid)
    share = jnp.sum(weight * losses)
    by_mass = None
    if spec.weight_gradient:
        by_mass = weight * (losses - _sum_over_devices(share, spec.axis_name))
    cotangents = _Cotangents((1 - balance) * weight, balance * weight, by_mass)
    if pairs is None or terms is None:
        return share, _gradient(spec, arrays, cotangents)
    return share, _block_gradient(spec, arrays, pairs, terms, cotangents)


def _loss_tangent(
    spec: Spec, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    """Returns the value and the tangent of `loss`."""
    share, gradient = cast("Any", _differentiable_once)(_loss_and_gradient, spec, *primals)
    on_queries, _, on_gallery, *_ = tangents
    tangent = jnp.sum(gradient.queries * on_queries)
    if gradient.gallery is not None:
        tangent = tangent + jnp.sum(gradient.gallery * on_gallery)
    return share, tangent


def _terms_value(spec: Spec, *args: Any) -> Terms:
    """Computes `list_terms` of `Arrays(*args)`."""

    def body(block: Arrays) -> Terms:
        return _block_terms(spec, block.constants, make_pairs(spec, block))

    return _map_blocks(spec, body, Arrays(*args))


def _terms_forward(spec: Spec, *args: Any) -> tuple[Terms, tuple[Any, ...]]:
    """Computes the value, and keeps the arrays for the derivative."""
    return cast("Any", _differentiable_once)(_terms_value, spec, *args), args


def _terms_gradient(spec: Spec, cotangents: Terms, *args: Any) -> _Gradient:
    """Computes the derivative by the queries and the gallery for a derivative by the terms."""
    by_terms = _Cotangents(cotangents.positive, cotangents.negative, cotangents.log_mass)
    return _gradient(spec, Arrays(*args), by_terms)


def _terms_backward(
    spec: Spec, args: tuple[Any, ...], cotangents: Terms
) -> tuple[jax.Array, None, jax.Array | None, None, None]:
    """Returns the gradients of the queries and of the gallery, and None for the other arrays."""
    gradient = cast("Any", _differentiable_once)(_terms_gradient, spec, cotangents, *args)
    return gradient.queries, None, gradient.gallery, None, None


def _once(function: Callable[..., Tree], spec: Spec, *args: Any) -> Tree:
    """Returns `function(spec, *args)`, which has no derivative."""
    return function(spec, *args)


def _refuse(*_: object) -> Any:
    """Refuses a derivative that would be taken of the constants of the first one."""
    raise NotImplementedError(
        "Ranked List Loss has first derivatives only: found a second derivative. "
        "The mean of jax.vmap(ranked_list_loss_of_query) has all of them."
    )


_differentiable_once = jax.custom_jvp(_once, nondiff_argnums=(0, 1))
_differentiable_once.defjvp(_refuse)

_loss = jax.custom_jvp(_loss_value, nondiff_argnums=(0,))
_loss.defjvp(_loss_tangent)
_compiled_loss = jax.jit(_loss, static_argnums=0)

_list_terms = cast("Any", jax.custom_vjp(_terms_value, nondiff_argnums=(0,)))
_list_terms.defvjp(_terms_forward, _terms_backward)
_compiled_list_terms = jax.jit(_list_terms, static_argnums=0)
