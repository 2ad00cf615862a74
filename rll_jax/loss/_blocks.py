"""The terms and the loss of blocks of queries, and their hand-written derivatives.

A block's pairs are computed, used and dropped, so memory is O(block_size * M).
Private to `rll_jax.loss`. Imports jax and numpy alone.
"""

# jax's stubs leave some parameters of jit, map, pad, psum and pmax without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, TypeVarTuple, cast

import jax
from jax import lax
import jax.numpy as jnp

from rll_jax.loss._pairs import Arrays, Spec, make_pairs
from rll_jax.loss._ring import over_shards
from rll_jax.loss._terms import (
    Cotangents,
    Gradient,
    Sums,
    Terms,
    block_gradient,
    block_sums,
    joined,
    log_mass_of,
    no_sums,
    sum_of_lists,
    terms_of,
)
from rll_jax.loss.rows import sum_over_devices

Tree = TypeVar("Tree")
Result = TypeVar("Result")
Parts = TypeVarTuple("Parts")


def loss(spec: Spec, arrays: Arrays, valid: jax.Array | None) -> jax.Array:
    """Computes sum_i weight_i L_i over this device's queries.

    It is differentiable once, forward and in reverse, by the queries, and by the gallery where
    `spec.gallery_gradient`. Over the devices the derivatives sum to that of the whole batch's loss.

    Args:
      spec: the variant.
      arrays: this device's queries, and the gallery of all devices, or this device's shard of it
        where `spec.ring`.
      valid: (N, 1) bool, False for a query that is padding; None where every query is valid.
    """
    return _compiled_loss(spec, *arrays, valid)


def list_terms(spec: Spec, arrays: Arrays) -> Terms:
    """Computes the `Terms` of every query.

    The first three are differentiable once: by the queries, forward and in reverse, where the
    gallery is a constant, and otherwise by the queries and the gallery, in reverse. Where the
    gallery is a constant, `log_mass` is one too unless the loss differentiates it.
    """
    if spec.gallery_gradient:
        return _compiled_terms_of_both_ends(spec, *arrays)
    return _with_counts_as(jnp.int32, _compiled_list_terms(spec, *arrays))


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
    return mass / jnp.where(none_active, 1, sum_over_devices(jnp.sum(mass), spec.axis_name))


def _uniform_weights(
    axis_name: Hashable | None, ones: jax.Array, valid: jax.Array | None
) -> jax.Array:
    """Returns 1 / number of valid queries of all devices, and 0 for padding."""
    if valid is None:
        count = ones.shape[0] if axis_name is None else ones.shape[0] * lax.axis_size(axis_name)
        return ones / jnp.asarray(count, ones.dtype)
    count = sum_over_devices(jnp.sum(valid, dtype=jnp.int32), axis_name)
    return jnp.where(valid, ones, 0) / jnp.maximum(count, 1).astype(ones.dtype)


def _balanced(balance: jax.Array, terms: Terms) -> jax.Array:
    """Returns L_i = (1 - balance) L_P + balance L_N of every query."""
    return (1 - balance) * terms.positive + balance * terms.negative


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
    body: Callable[[Arrays, *Parts], tuple[Result, Gradient]],
    arrays: Arrays,
    *args: *Parts,
) -> tuple[Result, Gradient]:
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
    return result, Gradient(on_queries, on_gallery)


def _losses(spec: Spec, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Returns L_i and the log of the mass of every query, (N, 1) each."""
    terms = _terms_value(spec, *arrays)
    return _balanced(arrays.constants.balance, terms), terms.log_mass


def _sums(spec: Spec, arrays: Arrays) -> Sums:
    """Returns the sums over both lists of every query."""

    def body(block: Arrays) -> Sums:
        return block_sums(spec, block.constants, make_pairs(spec, block))

    def visit(visited: Arrays, sums: Sums) -> tuple[Sums, None]:
        return joined(arrays.constants, sums, _map_blocks(spec, body, visited)), None

    if not spec.ring:
        return _map_blocks(spec, body, arrays)
    sums, _ = over_shards(spec.axis_name, arrays, visit, no_sums(arrays.rows.size), None)
    return sums


def _gradient(
    spec: Spec, arrays: Arrays, cotangents: Cotangents, sums: Sums | None = None
) -> Gradient:
    """Returns the gradient for given derivatives by every query's terms.

    A ring takes the sums over the lists of every query, or computes them.
    """
    if spec.ring and sums is None:
        sums = _sums(spec, arrays)

    def body(block: Arrays, cotangents: Cotangents, sums: Sums | None) -> tuple[None, Gradient]:
        pairs = make_pairs(spec, block, None if sums is None else sums.lists)
        sums = block_sums(spec, block.constants, pairs) if sums is None else sums
        terms = terms_of(block.constants, sums)
        return None, block_gradient(spec, block, pairs, terms, cotangents)

    def visit(visited: Arrays, on_queries: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        _, gradient = _sum_blocks(spec, body, visited, cotangents, sums)
        return on_queries + gradient.queries, gradient.gallery

    if not spec.ring:
        return _sum_blocks(spec, body, arrays, cotangents, None)[1]
    none = jnp.zeros_like(arrays.gallery) if spec.gallery_gradient else None
    return Gradient(
        *over_shards(spec.axis_name, arrays, visit, jnp.zeros_like(arrays.queries), none)
    )


def _weighted_losses(
    spec: Spec, arrays: Arrays, weight: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Gradient]:
    """Returns weight_i L_i, the log of the mass, and the gradient of their sum, in one pass.

    The gradient of L_i needs nothing but the pairs of query i. So no pair is kept or computed
    again.
    """
    balance = arrays.constants.balance

    def body(block: Arrays, weight: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Gradient]:
        pairs = make_pairs(spec, block)
        cotangents = Cotangents((1 - balance) * weight, balance * weight, None)
        if spec.weight_gradient:
            terms = terms_of(block.constants, block_sums(spec, block.constants, pairs))
            losses = weight * _balanced(balance, terms)
        else:
            terms, losses = None, sum_of_lists(spec, block.constants, pairs, cotangents)
        gradient = block_gradient(spec, block, pairs, terms, cotangents)
        return (losses, log_mass_of(block.constants, pairs.lists)), gradient

    return _sum_blocks(spec, body, arrays, weight)


def _loss_value(spec: Spec, *args: Any) -> jax.Array:
    """Computes `loss` where no derivative is asked for."""
    arrays, valid = Arrays(*args[:-1]), args[-1]
    losses, log_mass = _losses(spec, arrays)
    return jnp.sum(query_weights(spec, log_mass, valid) * losses)


def _loss_and_gradient(spec: Spec, *args: Any) -> tuple[jax.Array, Gradient]:
    """Computes `loss` and its derivative by the queries and the gallery."""
    arrays, valid = Arrays(*args[:-1]), args[-1]
    if spec.ring or (spec.mass and (spec.weight_gradient or spec.gallery_gradient)):
        return _loss_and_gradient_in_two_passes(spec, arrays, valid)
    ones = jnp.ones_like(arrays.rows.size)
    if not spec.mass:
        weight = _uniform_weights(spec.axis_name, ones, valid)
        (losses, _), gradient = _weighted_losses(spec, arrays, weight)
        return jnp.sum(losses), gradient
    (losses, log_mass), gradient = _weighted_losses(spec, arrays, ones)
    weight = query_weights(spec, log_mass, valid)
    return jnp.sum(weight * losses), Gradient(weight * gradient.queries, None)


def _loss_and_gradient_in_two_passes(
    spec: Spec, arrays: Arrays, valid: jax.Array | None
) -> tuple[jax.Array, Gradient]:
    """Computes the same where the gradient needs what is known after all pairs.

    That is the weights of queries by mass, or in a ring the sums over the lists.
    """
    balance, pairs = arrays.constants.balance, None
    if spec.ring or spec.block_size < arrays.queries.shape[0]:
        sums = _sums(spec, arrays)
    else:
        pairs = make_pairs(spec, arrays)
        sums = block_sums(spec, arrays.constants, pairs)
    terms = terms_of(arrays.constants, sums)
    losses = _balanced(balance, terms)
    weight = query_weights(spec, terms.log_mass, valid)
    share = jnp.sum(weight * losses)
    by_mass = None
    if spec.mass and spec.weight_gradient:
        by_mass = weight * (losses - sum_over_devices(share, spec.axis_name))
    cotangents = Cotangents((1 - balance) * weight, balance * weight, by_mass)
    if pairs is None:
        return share, _gradient(spec, arrays, cotangents, sums if spec.ring else None)
    return share, block_gradient(spec, arrays, pairs, terms, cotangents)


def _loss_tangent(
    spec: Spec, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    """Returns the value and the tangent of `loss`."""
    share, gradient = _differentiable_once(_loss_and_gradient, spec, *primals)
    on_queries, _, on_gallery, *_ = tangents
    tangent = jnp.sum(gradient.queries * on_queries)
    if gradient.gallery is not None:
        tangent = tangent + jnp.sum(gradient.gallery * on_gallery)
    return share, tangent


def _terms_value(spec: Spec, *args: Any) -> Terms:
    """Computes `list_terms` of `Arrays(*args)`."""
    arrays = Arrays(*args)
    return terms_of(arrays.constants, _sums(spec, arrays))


def _terms_and_slopes(spec: Spec, *args: Any) -> tuple[Terms, tuple[jax.Array, ...]]:
    """Computes the terms, and the derivative of each of the first ones by its query, (N, D) each.

    Two of them, or three where the mass is differentiated.
    """
    arrays = Arrays(*args)
    one, zero = jnp.ones_like(arrays.rows.size), jnp.zeros_like(arrays.rows.size)
    by_term = [Cotangents(one, zero, None), Cotangents(zero, one, None)]
    if spec.mass and spec.weight_gradient:
        by_term.append(Cotangents(zero, zero, one))
    if spec.ring:
        sums = _sums(spec, arrays)
        slopes = tuple(_gradient(spec, arrays, by, sums).queries for by in by_term)
        return terms_of(arrays.constants, sums), slopes

    def body(block: Arrays, by_term: list[Cotangents]) -> tuple[Terms, tuple[jax.Array, ...]]:
        pairs = make_pairs(spec, block)
        terms = terms_of(block.constants, block_sums(spec, block.constants, pairs))
        slopes = (block_gradient(spec, block, pairs, terms, by).queries for by in by_term)
        return terms, tuple(slopes)

    return _map_blocks(spec, body, arrays, by_term)


def _terms_in_floats(spec: Spec, *args: Any) -> Terms:
    """Computes the terms with the bits of their counts as float32."""
    return _with_counts_as(jnp.float32, _terms_value(spec, *args))


def _with_counts_as(dtype: Any, terms: Terms) -> Terms:
    """Returns the terms with the bits of their counts as another dtype.

    A tangent of integers is a NumPy array, which has no symbolic shape, and no axes over which it
    varies under shard_map.
    """
    counts = terms.num_positives, terms.num_negatives
    positives, negatives = (lax.bitcast_convert_type(count, dtype) for count in counts)
    return terms._replace(num_positives=positives, num_negatives=negatives)


def _terms_tangent(
    spec: Spec, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Terms, Terms]:
    """Returns the terms and their tangents, where the gallery is a constant."""
    terms, slopes = _differentiable_once(_terms_and_slopes, spec, *primals)
    along = [jnp.sum(slope * tangents[0], axis=1, keepdims=True) for slope in slopes]
    log_mass = along[2] if len(along) > 2 else jnp.zeros_like(terms.log_mass)
    terms = _with_counts_as(jnp.float32, terms)
    count = jnp.zeros_like(terms.num_positives)
    return terms, Terms(along[0], along[1], log_mass, count, count)


def _terms_forward(spec: Spec, *args: Any) -> tuple[Terms, tuple[Any, ...]]:
    """Computes the value, and keeps the arrays for the derivative."""
    return _differentiable_once(_terms_value, spec, *args), args


def _terms_gradient(spec: Spec, cotangents: Terms, *args: Any) -> Gradient:
    """Computes the derivative by the queries and the gallery for a derivative by the terms."""
    by_terms = Cotangents(cotangents.positive, cotangents.negative, cotangents.log_mass)
    return _gradient(spec, Arrays(*args), by_terms)


def _terms_backward(
    spec: Spec, args: tuple[Any, ...], cotangents: Terms
) -> tuple[jax.Array, None, jax.Array | None, None, None, None]:
    """Returns the gradients of the queries and of the gallery, and None for the other arrays."""
    gradient = _differentiable_once(_terms_gradient, spec, cotangents, *args)
    return gradient.queries, None, gradient.gallery, None, None, None


def _once(function: Callable[..., Tree], spec: Spec, *args: Any) -> Tree:
    """Returns `function(spec, *args)`, which has no derivative."""
    return function(spec, *args)


def _refuse(*_: object) -> Any:
    """Refuses a derivative that would be taken of the constants of the first one."""
    raise NotImplementedError(
        "Ranked List Loss has first derivatives only: found a second derivative. "
        "The mean of jax.vmap(ranked_list_loss_of_query) has all of them."
    )


_differentiable_once: Any = jax.custom_jvp(_once, nondiff_argnums=(0, 1))
_differentiable_once.defjvp(_refuse)

_loss = jax.custom_jvp(_loss_value, nondiff_argnums=(0,))
_loss.defjvp(_loss_tangent)
_compiled_loss: Any = jax.jit(_loss, static_argnums=0)

_list_terms = jax.custom_jvp(_terms_in_floats, nondiff_argnums=(0,))
_list_terms.defjvp(_terms_tangent)
_compiled_list_terms: Any = jax.jit(_list_terms, static_argnums=0)

# A tangent by the gallery would keep a matrix of all pairs for its transpose.
_terms_of_both_ends: Any = jax.custom_vjp(_terms_value, nondiff_argnums=(0,))
_terms_of_both_ends.defvjp(_terms_forward, _terms_backward)
_compiled_terms_of_both_ends: Any = jax.jit(_terms_of_both_ends, static_argnums=0)
