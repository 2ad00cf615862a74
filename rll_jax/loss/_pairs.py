"""The pairs of a block of queries and the gallery: distances, lists and weights.

Private to `rll_jax.loss`. Imports jax and numpy alone.
"""

# jax's stubs leave some parameters of dot_general and broadcasted_iota without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar, cast

import jax
from jax import lax
import jax.numpy as jnp

from rll_jax.loss._differences import squared_distances

# A pair is near where d^2 < _NEAR * (|q|^2 + |g|^2): |q|^2 + |g|^2 - 2 q.g then loses its digits.
# A block with a near pair that counts is computed from the differences of all its pairs.
_NEAR = 2e-2

Tree = TypeVar("Tree")


class Spec(NamedTuple):
    """What is known when tracing. Another value compiles another program."""

    squared: bool  # the pair term is half the squared distance
    weight_gradient: bool  # the weights are differentiated
    gallery_gradient: bool  # the gallery is differentiated
    own_gallery: bool  # the gallery holds the queries; a query is not paired with itself
    mass: bool  # queries are weighted by their mass, not alike
    axis_name: Hashable | None  # of the devices whose queries count together
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

    distance: jax.Array  # d, 0 for a pair left out
    excess: jax.Array  # d - alpha_pos > 0 in P*, d - alpha < 0 in N*, 0 for a pair on neither list
    weight: jax.Array  # sign(excess) w / the largest w in the list; 0 for a pair on neither list
    sum_pos: jax.Array  # (B, 1) sum of |weight| over P*: 0 for an empty list, otherwise at least 1
    sum_neg: jax.Array  # (B, 1) the same over N*
    log_scale_pos: jax.Array  # (B, 1) log of the true weight w of a pair in P* with |weight| = 1
    log_scale_neg: jax.Array  # (B, 1) the same in N*
    any_near: jax.Array  # scalar bool: whether distances are those of differences, not of products


class _Lists(NamedTuple):
    """Distances and lists, by products or by differences."""

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


def make_pairs(spec: Spec, arrays: Arrays) -> Pairs:
    """Returns the pairs of a block of queries with the gallery."""
    constants = arrays.constants
    lists, any_near = _lists_by_product(spec, arrays)
    lists = while_near(any_near, lists, lambda: _lists_by_difference(spec, arrays))
    distance, excess, farthest, nearest = lists

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


def while_near(any_near: jax.Array, value: Tree, exact: Callable[[], Tree]) -> Tree:
    """Returns `exact()` where the block has a near pair, and otherwise `value`.

    A loop of at most one round: it leaves `value` where it is, and `lax.cond` would copy it. The
    loop also keeps XLA on the CPU from fusing a product with what follows it, which would slow the
    product down by a third.
    """

    def is_near(state: tuple[jax.Array, Tree]) -> jax.Array:
        return state[0]

    def step(state: tuple[jax.Array, Tree]) -> tuple[jax.Array, Tree]:
        return jnp.zeros_like(state[0]), exact()

    _, value = lax.while_loop(is_near, step, (any_near, value))
    return value


def _lists_by_product(spec: Spec, arrays: Arrays) -> tuple[_Lists, jax.Array]:
    """Returns the lists by one matrix product, and whether a pair is too near for that."""
    _, rows, _, columns, constants = arrays
    size = rows.size + columns.size
    squared = jnp.maximum(size - 2 * dot(rows.centred, columns.centred, ((1,), (1,))), 0)
    lists = _make_lists(spec, arrays, jnp.sqrt(squared))
    reach = _NEAR * (rows.size + jnp.max(columns.size))
    near_negative = constants.alpha + lists.nearest < jnp.sqrt(reach)

    def is_positive_near() -> jax.Array:
        near = (squared < _NEAR * size) & (rows.label == columns.label)
        left_out = _left_out(spec, arrays)
        near = near if left_out is None else near & ~left_out
        return jnp.any(near, axis=1, keepdims=True)

    # A positive so near is trivial and needs no digits, unless alpha - margin is as small.
    near_positive = cast(
        "jax.Array",
        lax.cond(
            jnp.any(constants.alpha_pos**2 <= 2 * reach),
            is_positive_near,
            lambda: jnp.zeros_like(near_negative),
        ),
    )
    return lists, jnp.any(near_negative | near_positive)


def _lists_by_difference(spec: Spec, arrays: Arrays) -> _Lists:
    """Returns the lists by the difference of every pair."""
    return _make_lists(spec, arrays, jnp.sqrt(squared_distances(arrays.queries, arrays.gallery)))


def _left_out(spec: Spec, arrays: Arrays) -> jax.Array | None:
    """Returns which pairs do not exist, (B, M) or (1, M); None where all do."""
    own = arrays.rows.number == arrays.columns.number if spec.own_gallery else None
    if arrays.columns.valid is None:
        return own
    padding = ~arrays.columns.valid
    return padding if own is None else own | padding


def _make_lists(spec: Spec, arrays: Arrays, distance: jax.Array) -> _Lists:
    """Returns the lists of a block's queries from its distances (B, M)."""
    constants, left_out = arrays.constants, _left_out(spec, arrays)
    same = arrays.rows.label == arrays.columns.label
    if left_out is not None:
        # It becomes a positive at distance 0, which is on no list.
        same, distance = same | left_out, jnp.where(left_out, 0, distance)
    excess = jnp.where(
        same,
        jnp.maximum(distance - constants.alpha_pos, 0),
        jnp.minimum(distance - constants.alpha, 0),
    )
    farthest = jnp.maximum(jnp.max(excess, axis=1, keepdims=True), 0)
    nearest = jnp.minimum(jnp.min(excess, axis=1, keepdims=True), 0)
    return _Lists(distance, excess, farthest, nearest)
