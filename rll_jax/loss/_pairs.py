"""The pairs of a block of queries and the gallery: distances, lists and weights.

Private to `rll_jax.loss`. Imports jax and numpy alone.
"""

# jax's stubs leave some parameters of dot_general and broadcasted_iota without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# A pair is near where d^2 < _NEAR * (|q|^2 + |g|^2): |q|^2 + |g|^2 - 2 q.g then loses its digits.
_NEAR = 2e-2

Carry = TypeVar("Carry")


class Spec(NamedTuple):
    """What is known when tracing. Another value compiles another program."""

    squared: bool  # the pair term is half the squared distance
    weight_gradient: bool  # the weights are differentiated
    gallery_gradient: bool  # the gallery is differentiated
    own_gallery: bool  # the gallery holds the queries; a query is not paired with itself
    block_size: int  # queries in one block


class Constants(NamedTuple):
    """Scalars of the computing dtype, traced or not. None is differentiated."""

    alpha: jax.Array  # the negatives' boundary
    alpha_pos: jax.Array  # the positives' boundary, alpha - margin, at least 0
    temperature_pos: jax.Array
    temperature_neg: jax.Array
    balance: jax.Array


class Rows(NamedTuple):
    """Constants of the queries, each (n, 1) but the first."""

    centred: jax.Array  # (n, D): the queries less the common origin
    label: jax.Array  # integer class
    number: jax.Array  # int32, the query's number in the batch of all devices
    size: jax.Array  # squared norm of the centred row


class Columns(NamedTuple):
    """Constants of the gallery, each (1, M) but the first."""

    centred: jax.Array  # (M, D): the gallery less the common origin
    label: jax.Array  # integer class
    number: jax.Array  # int32, the row's number in the gallery of all devices
    size: jax.Array  # squared norm of the centred row
    valid: jax.Array | None  # bool: False for padding; None where every row is valid


class Arrays(NamedTuple):
    """The arrays of all queries or of a block. Only `queries` and `gallery` are differentiated."""

    queries: jax.Array  # (n, D), this device's
    rows: Rows
    gallery: jax.Array  # (M, D), all devices'
    columns: Columns
    constants: Constants


class Pairs(NamedTuple):
    """The pairs of one block: matrices (B, M), and columns (B, 1) with a number for each query."""

    # The signs of `distance` and `excess` replace two masks, which would have to be stored.
    distance: jax.Array  # negative (-d) for a near pair, 0 for a pair left out, otherwise d
    excess: jax.Array  # d - alpha_pos > 0 in P*, d - alpha < 0 in N*, 0 for a pair on neither list
    weight: jax.Array  # sign(excess) w / the largest w in the list; 0 for a pair on neither list
    sum_pos: jax.Array  # (B, 1) sum of |weight| over P*: 0 for an empty list, otherwise at least 1
    sum_neg: jax.Array  # (B, 1) the same over N*
    log_scale_pos: jax.Array  # (B, 1) log of the true weight w of a pair in P* with |weight| = 1
    log_scale_neg: jax.Array  # (B, 1) the same in N*
    any_near: jax.Array  # scalar bool: False when no pair of the block is near


class _Lists(NamedTuple):
    """Distances and lists while near pairs are corrected."""

    distance: jax.Array  # (B, M) as in `Pairs`
    excess: jax.Array  # (B, M) as in `Pairs`
    farthest: jax.Array  # (B, 1) excess of the farthest positive in P*, 0 for an empty list
    nearest: jax.Array  # (B, 1) excess of the nearest negative in N*, 0 for an empty list


def dot(a: jax.Array, b: jax.Array, axes: tuple[tuple[int], tuple[int]]) -> jax.Array:
    """Returns the product of two matrices over the given axis of each, in full precision.

    Products in TF32 (GPU) or bfloat16 (TPU) would move a distance by 1e-2.
    """
    return lax.dot_general(
        a, b, (axes, ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=a.dtype
    )


def row_sum(x: jax.Array) -> jax.Array:
    """Returns the sum of each row, (B, 1)."""
    return jnp.sum(x, axis=1, keepdims=True)


def loop_over_near_pairs(
    any_near: jax.Array,
    carry: Carry,
    body: Callable[[Carry, jax.Array, jax.Array], Carry],
    distances: Callable[[Carry], jax.Array],
) -> Carry:
    """Returns the carry after `body` has seen every near pair of the block.

    One round takes the k-th near pair of every query, in the order of the gallery.

    Args:
      any_near: scalar bool: False skips the loop.
      carry: the initial carry.
      body: (carry, column, hit) -> carry. `column` (B, 1) is the pair's place in the gallery, M for
        a query without a k-th near pair. `hit` (B, M) is True at that place.
      distances: the carry's (B, M) distances, negative for a near pair.
    """
    size = distances(carry).shape[1]
    iota = lax.broadcasted_iota(jnp.int32, (1, size), 1)

    def has_pair(state: tuple[jax.Array, jax.Array, Carry]) -> jax.Array:
        _, any_pair, _ = state
        return any_pair

    def step(
        state: tuple[jax.Array, jax.Array, Carry],
    ) -> tuple[jax.Array, jax.Array, Carry]:
        column, _, carry = state
        # Not `distance < 0` alone: the compiler would compute and store that before the loop, which
        # mostly does not run.
        later = jnp.where(iota > column, distances(carry), 0) < 0
        column = jnp.min(jnp.where(later, iota, size), axis=1, keepdims=True)
        return column, jnp.any(column < size), body(carry, column, iota == column)

    # The first column comes from the data, so that its type varies over the same mesh axes as the
    # loop's columns.
    start = jnp.zeros_like(distances(carry)[:, :1], jnp.int32) - 1
    _, _, carry = lax.while_loop(has_pair, step, (start, any_near, carry))
    return carry


def take_rows(x: jax.Array, column: jax.Array) -> jax.Array:
    """Returns one row of x (M, ...) for each query, by its column (B, 1); any row for column M."""
    return jnp.take(x, column[:, 0], axis=0, mode="clip")


def make_pairs(spec: Spec, arrays: Arrays) -> Pairs:
    """Returns the pairs of a block of queries with the gallery."""
    constants = arrays.constants
    distance, same = _distances_by_product(spec, arrays)
    excess = _excess(constants, same, jnp.abs(distance))
    farthest, nearest = _extremes(excess)
    any_near = _may_have_near_pairs(arrays, nearest)
    lists = _Lists(distance, excess, farthest, nearest)
    distance, excess, farthest, nearest = _correct_near_pairs(arrays, any_near, lists)

    positive = excess > 0
    weight = jnp.exp(
        jnp.where(
            positive,
            constants.temperature_pos * (excess - farthest),
            constants.temperature_neg * (nearest - excess),
        )
    )
    # A NaN in excess is not 0, so it remains visible.
    weight = jnp.where(excess == 0, 0, jnp.where(positive, weight, -weight))
    # The zeros of the two sums differ: XLA on the CPU would share equal ones, stored as a matrix.
    return Pairs(
        distance,
        excess,
        weight,
        sum_pos=row_sum(jnp.maximum(weight, 0)),
        sum_neg=-row_sum(jnp.minimum(weight, -0.0)),
        log_scale_pos=constants.temperature_pos * farthest,
        log_scale_neg=-constants.temperature_neg * nearest,
        any_near=any_near,
    )


def _distances_by_product(spec: Spec, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Returns distances as in `Pairs`, near ones uncorrected, and whether pairs share a class."""
    _, rows, _, columns, constants = arrays
    size = rows.size + columns.size
    squared = jnp.maximum(size - 2 * dot(rows.centred, columns.centred, ((1,), (1,))), 0)
    distance = jnp.sqrt(squared)
    same = rows.label == columns.label
    # A positive so near is trivial and needs no digits, unless alpha - margin is tiny too.
    near = (squared < _NEAR * size) & ~(same & (constants.alpha_pos**2 > 2 * _NEAR * size))
    # At least the tiniest number: the loop finds negative distances and would miss -0.
    distance = jnp.where(near, -jnp.maximum(distance, np.finfo(distance.dtype).tiny), distance)
    # A pair left out becomes a positive at distance 0, which is on no list.
    if columns.valid is not None:
        same = same | ~columns.valid
        distance = jnp.where(columns.valid, distance, 0)
    if spec.own_gallery:
        distance = jnp.where(rows.number == columns.number, 0, distance)
    return distance, same


def _excess(constants: Constants, same: jax.Array, distance: jax.Array) -> jax.Array:
    """Returns each pair's excess as in `Pairs`, from its distance and whether it shares a class."""
    return jnp.where(
        same,
        jnp.maximum(distance - constants.alpha_pos, 0),
        jnp.minimum(distance - constants.alpha, 0),
    )


def _extremes(excess: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the farthest positive's and the nearest negative's excess, 0 for an empty list."""
    farthest = jnp.maximum(jnp.max(excess, axis=1, keepdims=True), 0)
    return farthest, jnp.minimum(jnp.min(excess, axis=1, keepdims=True), 0)


def _may_have_near_pairs(arrays: Arrays, nearest: jax.Array) -> jax.Array:
    """Returns a scalar bool: False where no pair of the block can be near.

    A query can have a near pair only if its nearest negative is near, or if positives that are near
    can lie beyond their boundary.
    """
    constants = arrays.constants
    reach = jnp.sqrt(_NEAR * (arrays.rows.size + jnp.max(arrays.columns.size)))
    slack = 8 * np.finfo(nearest.dtype).eps * constants.alpha
    near_negative = constants.alpha + nearest <= reach + slack
    return jnp.any(near_negative | (constants.alpha_pos <= 1.5 * reach))


def _correct_near_pairs(arrays: Arrays, any_near: jax.Array, lists: _Lists) -> _Lists:
    """Returns the lists with the distance of each near pair computed from its difference."""
    queries, rows, gallery, columns, constants = arrays

    def correct(lists: _Lists, column: jax.Array, hit: jax.Array) -> _Lists:
        exact = jnp.sqrt(row_sum((queries - take_rows(gallery, column)) ** 2))
        same = rows.label == take_rows(columns.label.T, column)
        excess = jnp.where(hit, _excess(constants, same, exact), lists.excess)
        return _Lists(jnp.where(hit, -exact, lists.distance), excess, *_extremes(excess))

    def distances(lists: _Lists) -> jax.Array:
        return lists.distance

    return loop_over_near_pairs(any_near, lists, correct, distances)
