"""The pairs of a block of queries and the gallery: distances, lists and weights.

Private to `rll_jax.loss`. Imports jax and numpy alone.
"""

# jax's stubs leave some parameters of dot_general and broadcasted_iota without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Hashable
import functools
from typing import Any, NamedTuple, TypeVar, TypeVarTuple, cast

import jax
from jax import lax
import jax.numpy as jnp

from rll_jax.loss._differences import is_symbolic, squared_distances

# A pair is near where d^2 < _NEAR * (|q|^2 + |g|^2): |q|^2 + |g|^2 - 2 q.g then loses its digits.
# A block with a near pair that counts is computed from the differences of all its pairs.
_NEAR = 2e-2

# Parts of a row that are combined before they are reduced.
_PARTS = 8

Tree = TypeVar("Tree")
Matrices = TypeVarTuple("Matrices")


class Spec(NamedTuple):
    """What is known when tracing. Another value compiles another program."""

    squared: bool  # the pair term is half the squared distance
    weight_gradient: bool  # the weights are differentiated
    gallery_gradient: bool  # the gallery is differentiated
    own_gallery: bool  # the gallery holds the queries; a query is not paired with itself
    mass: bool  # queries are weighted by their mass, not alike
    axis_name: Hashable | None  # of the devices whose queries count together
    ring: bool  # the gallery is one device's shard, and the shards go round
    block_size: int  # queries in one block
    high_precision: bool  # products of tensor cores (Precision.HIGH) instead of HIGHEST


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
    gallery: jax.Array  # (M, D), all devices', or a shard
    columns: Columns
    origin: jax.Array  # (1, D), a constant: what centred rows are less
    constants: Constants


class Lists(NamedTuple):
    """What the weights of a query's two lists are relative to, and their sums, (B, 1) each."""

    farthest: jax.Array  # the excess of the pair in P* with |weight| = 1; 0 for an empty list
    nearest: jax.Array  # the excess of the pair in N* with |weight| = 1; 0 for an empty list
    sum_pos: jax.Array  # sum of |weight| over P*: 0 for an empty list, otherwise at least 1
    sum_neg: jax.Array  # the same over N*


class Pairs(NamedTuple):
    """The pairs of one block: matrices (B, M), and a number for each query."""

    distance: jax.Array  # d, 0 for a pair left out
    excess: jax.Array  # d - alpha_pos > 0 in P*, d - alpha < 0 in N*, 0 for a pair on neither list
    weight: jax.Array  # sign(excess) w / the largest w in the list; 0 for a pair on neither list
    lists: Lists  # of the whole gallery
    any_near: jax.Array  # scalar bool: whether distances are those of differences, not of products


def dot(
    a: jax.Array,
    b: jax.Array,
    axes: tuple[tuple[int], tuple[int]],
    precision: lax.Precision = lax.Precision.HIGHEST,
) -> jax.Array:
    """Returns the product of two matrices over the given axis of each.

    JAX's default precision, bfloat16 on TPUs, would move a distance by 1e-2.
    """
    return lax.dot_general(
        a, b, (axes, ((), ())), precision=precision, preferred_element_type=a.dtype
    )


def precision_of(spec: Spec) -> lax.Precision:
    """Returns the precision of the products of queries and gallery."""
    return lax.Precision.HIGH if spec.high_precision else lax.Precision.HIGHEST


def row_sum(function: Callable[[*Matrices], jax.Array], *matrices: *Matrices) -> jax.Array:
    """Returns the sums over the rows, (B, 1), of an elementwise function of matrices (B, M)."""
    return _reduce_rows(jnp.add, jnp.sum, function, *matrices)


def _reduce_rows(
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    reduce: Callable[..., jax.Array],
    function: Callable[[*Matrices], jax.Array],
    *matrices: *Matrices,
) -> jax.Array:
    """Returns `reduce(function(*matrices), axis=1, keepdims=True)`.

    On CPUs parts of the rows are combined first. XLA would store what it reduces, and a minimum of
    long rows takes seven times as long.
    """
    arrays = cast("tuple[jax.Array, ...]", matrices)
    width = arrays[0].shape[1]

    def values(arrays: tuple[jax.Array, ...]) -> jax.Array:
        return cast("Any", function)(*arrays)

    def plain(*arrays: jax.Array) -> jax.Array:
        return reduce(values(arrays), axis=1, keepdims=True)

    def folded(*arrays: jax.Array) -> jax.Array:
        def part(start: int, stop: int) -> jax.Array:
            return values(tuple(x[:, start:stop] for x in arrays))

        size = width // _PARTS
        parts = [part(k * size, (k + 1) * size) for k in range(_PARTS)]
        result = reduce(functools.reduce(combine, parts), axis=1, keepdims=True)
        if width % _PARTS == 0:
            return result
        return combine(result, reduce(part(size * _PARTS, width), axis=1, keepdims=True))

    if is_symbolic(width) or width < _PARTS:
        return plain(*arrays)
    return cast("jax.Array", lax.platform_dependent(*arrays, cpu=folded, default=plain))


def make_rows(queries: jax.Array, label: jax.Array, number: jax.Array, origin: jax.Array) -> Rows:
    """Returns the constants of queries (n, D), of labels and numbers (n, 1)."""
    centred = lax.stop_gradient(queries) - origin
    return Rows(centred, label, number, size=jnp.sum(centred * centred, axis=1)[:, None])


def make_columns(
    gallery: jax.Array,
    label: jax.Array,
    number: jax.Array,
    valid: jax.Array | None,
    origin: jax.Array,
) -> Columns:
    """Returns the constants of a gallery (M, D), of labels, numbers and a mask (1, M)."""
    centred = lax.stop_gradient(gallery) - origin
    size = jnp.sum(centred * centred, axis=1)[None, :]
    return Columns(centred, label, number, size, valid)


def make_pairs(spec: Spec, arrays: Arrays, whole: Lists | None = None) -> Pairs:
    """Returns the pairs of a block of queries with the gallery.

    Args:
      spec: the variant.
      arrays: the block's.
      whole: the lists over the whole gallery, where `arrays` has a shard of it and they are known.
        None: those of this gallery.
    """
    constants = arrays.constants
    distance, any_near = _distances_by_product(spec, arrays)
    distance = exact_where_near(any_near, distance, lambda: _distances_by_difference(spec, arrays))
    excess = _excess(arrays, distance)
    if whole is None:
        farthest = _reduce_rows(jnp.maximum, jnp.max, lambda e: jnp.maximum(e, 0), excess)
        nearest = _reduce_rows(jnp.minimum, jnp.min, lambda e: jnp.minimum(e, 0), excess)
    else:
        farthest, nearest = whole.farthest, whole.nearest

    positive = excess > 0
    exponent = jnp.where(
        positive,
        constants.temperature_pos * (excess - farthest),
        constants.temperature_neg * (nearest - excess),
    )
    if whole is not None:
        # It is above 0 in the rows that fill a block, and must not overflow there.
        exponent = jnp.where(exponent > 0, 0, exponent)
    weight = jnp.exp(exponent)
    # A NaN in excess is not 0, so it remains visible.
    weight = jnp.where(excess == 0, 0, jnp.where(positive, weight, -weight))
    if whole is None:
        sum_pos = row_sum(lambda w: jnp.maximum(w, 0), weight)
        sum_neg = row_sum(lambda w: jnp.maximum(-w, 0), weight)
        whole = Lists(farthest, nearest, sum_pos, sum_neg)
    return Pairs(distance, excess, weight, whole, any_near)


def exact_where_near(any_near: jax.Array, value: Tree, exact: Callable[[], Tree]) -> Tree:
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


def _distances_by_product(spec: Spec, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Returns distances by a matrix product, and whether a pair is too near for that."""
    rows, columns, constants = arrays.rows, arrays.columns, arrays.constants
    size = rows.size + columns.size
    product = dot(rows.centred, columns.centred, ((1,), (1,)), precision_of(spec))
    squared = jnp.maximum(size - 2 * product, 0)
    distance = _without_left_out(spec, arrays, jnp.sqrt(squared))
    reach = _NEAR * (rows.size + jnp.max(columns.size))

    def below_alpha(
        distance: jax.Array, label: jax.Array, valid: jax.Array | None = None
    ) -> jax.Array:
        part = columns._replace(label=label, valid=valid)
        return jnp.minimum(_excess(arrays, distance, part), 0)

    if columns.valid is None:
        nearest = _reduce_rows(jnp.minimum, jnp.min, below_alpha, distance, columns.label)
    else:
        nearest = _reduce_rows(
            jnp.minimum, jnp.min, below_alpha, distance, columns.label, columns.valid
        )
    near_negative = constants.alpha + nearest < jnp.sqrt(reach)

    def is_positive_near() -> jax.Array:
        near = (distance**2 < _NEAR * (rows.size + columns.size)) & _same_class(rows, columns)
        near = near & _without_left_out(spec, arrays, jnp.ones_like(near))
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
    return distance, jnp.any(near_negative | near_positive)


def _distances_by_difference(spec: Spec, arrays: Arrays) -> jax.Array:
    """Returns distances by the difference of every pair."""
    squared = squared_distances(arrays.queries, arrays.gallery)
    return _without_left_out(spec, arrays, jnp.sqrt(squared))


def _without_left_out(spec: Spec, arrays: Arrays, values: jax.Array) -> jax.Array:
    """Returns (B, M) values, 0 for pairs that do not exist: a query with itself, and padding."""
    rows, columns = arrays.rows, arrays.columns
    zero = jnp.zeros((), values.dtype)
    values = values if columns.valid is None else jnp.where(columns.valid, values, zero)
    return jnp.where(rows.number == columns.number, zero, values) if spec.own_gallery else values


def _excess(arrays: Arrays, distance: jax.Array, columns: Columns | None = None) -> jax.Array:
    """Returns each pair's excess as in `Pairs`, (B, M). A positive at distance 0 is on no list."""
    columns, constants = columns or arrays.columns, arrays.constants
    return jnp.where(
        _same_class(arrays.rows, columns),
        jnp.maximum(distance - constants.alpha_pos, 0),
        jnp.minimum(distance - constants.alpha, 0),
    )


def _same_class(rows: Rows, columns: Columns) -> jax.Array:
    """Returns whether the pairs share a class, (B, M). Padding shares every class."""
    same = rows.label == columns.label
    return same if columns.valid is None else same | ~columns.valid
