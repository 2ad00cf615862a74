"""Counts tiles on devices: a block of queries against a block of the gallery, in every level.

Nearly all of a tile's items are farther than all positives. On CPUs the largest similarities of a
tile say for which positives and groups of 16 queries it counts, and often there are none. There, a
positive behind rank R is not counted on, unless it is the first: no score depends on its rank.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

Combination = tuple[int, ...]  # the numbers of the levels whose mean similarity ranks

ABOVE_ALL = 1e4  # a threshold above every sum of similarities
BLOCK_MULTIPLE = 64  # of the rows and columns of a tile
_GROUP = 16  # queries that are counted together where a tile counts for few: 64 bytes of float32
_FEW = 4  # of so many groups one alone may be counted by itself; for more, all are at once
_SUM_ERROR = 2.0**-22  # what a float32 sum of a few similarities adds to their errors
_BELOW_ALL = -1e4  # a similarity that is below every threshold, also in a sum with others

Counts = tuple[jax.Array, jax.Array]  # (I, C, M, B) int32: similarity >= low, similarity > high


_Array = TypeVar("_Array", np.ndarray, jax.Array)  # on the host, on a device
_State = TypeVar("_State")


def band_of_sum(bands: Sequence[float], combination: Combination) -> float:
    """Returns how far the float32 sum of a combination's similarities may be off.

    Args:
      bands: how far the float32 product of each level may be off.
      combination: the levels.
    """
    size = len(combination)
    return sum(bands[level] for level in combination) + (size > 1) * size * _SUM_ERROR


class Operands(NamedTuple, Generic[_Array]):
    """What every device counts with: I blocks of B queries, J blocks of B items, M positives."""

    queries: tuple[_Array, ...]  # (I * B, D) float32 of length 1, rotated, of each level
    query_labels: _Array  # (I * B,) int32
    query_codes: _Array  # (K, I * B) int32: of the codes that leave items of other classes out
    gallery: tuple[_Array, ...]  # (J * B, D) float32 of length 1, rotated, of each level
    gallery_labels: _Array  # (J * B,) int32
    gallery_codes: _Array  # (K, J * B) int32
    low: _Array  # (I, C, M, B) float32: from here on an item may be before a positive
    high: _Array  # (I, C, M, B) float32: above, an item is surely before a positive
    most_positives: _Array  # (I, C) int32: the most positives of a block's queries
    enough: _Array  # (I, M, B) int32: with so many items before it, no score needs the rank


class Plan(NamedTuple):
    """How the tiles are counted; known when the program is compiled."""

    mesh: Mesh  # the devices, along an axis "device"
    symmetric: bool  # the blocks of queries are the first of the gallery
    combinations: tuple[Combination, ...]
    by_groups: bool  # count for few groups alone; accelerators would wait for each of them


@jax.jit(static_argnames=("plan",))  # pyright: ignore[reportUnknownMemberType]
def count_on_devices(
    operands: Operands[jax.Array],
    tiles: jax.Array,
    num_tiles: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    counts: Counts,
    *,
    plan: Plan,
) -> Counts:
    """Counts some tiles of each device.

    Args:
      operands: the same for every device.
      tiles: (devices * T, 2) int32, as `_share_tiles` returns them.
      num_tiles: (devices,) int32.
      first: the number, on its device, of the first tile to count.
      stop: the number behind the last one.
      counts: (devices * I, C, M, B) int32 counts so far, each device's own one after the other.
      plan: the devices and the combinations.

    Returns:
      The counts with those of these tiles.
    """
    per_device, on_all = PartitionSpec("device"), PartitionSpec()
    count = jax.shard_map(
        functools.partial(_count_tiles, plan=plan),
        mesh=plan.mesh,
        in_specs=(on_all, per_device, per_device, on_all, on_all, per_device),
        out_specs=(per_device, per_device),
        check_vma=False,
    )
    return count(operands, tiles, num_tiles, first, stop, counts)


def _count_tiles(
    operands: Operands[jax.Array],
    tiles: jax.Array,
    num_tiles: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    counts: Counts,
    *,
    plan: Plan,
) -> Counts:
    """Counts the tiles of one device from `first` on, before `stop` and `num_tiles[0]`."""
    count = functools.partial(_count_tile, operands, tiles, plan)
    return _repeat(first, jnp.minimum(stop, num_tiles[0]), count, counts)


def _repeat(
    first: jax.Array | int,
    stop: jax.Array,
    step: Callable[[jax.Array, _State], _State],
    state: _State,
) -> _State:
    """Returns the state after `step(number, state)` for the numbers from `first` to `stop` - 1."""
    return lax.fori_loop(first, stop, step, state)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _count_tile(
    operands: Operands[jax.Array],
    tiles: jax.Array,
    plan: Plan,
    number: jax.Array,
    counts: Counts,
) -> Counts:
    """Adds what one tile counts."""
    query_block, gallery_block = tiles[number, 0], tiles[number, 1]
    levels = _similarities(operands, query_block, gallery_block)
    most_of_rows = operands.most_positives[query_block]
    # A tile on the diagonal counts its columns as rows. Blocks without queries are behind the last.
    has_columns = plan.symmetric & (query_block != gallery_block)
    most_of_columns = jnp.where(
        has_columns, operands.most_positives.at[gallery_block].get(mode="fill", fill_value=0), 0
    )
    for place, combination in enumerate(plan.combinations):
        similarity = functools.reduce(jnp.add, [levels[level] for level in combination])
        # Behind the barrier XLA computes the similarities once, not once for each positive.
        similarity, counts = _barrier((similarity, counts))
        largest = _largest(similarity) if plan.by_groups else None
        rows = _Half(query_block, place, 1)
        counts = _count_half(operands, similarity, largest, rows, most_of_rows[place], counts)
        if plan.symmetric:
            columns = _Half(gallery_block, place, 0)
            counts = _count_half(
                operands, similarity, largest, columns, most_of_columns[place], counts
            )
    return counts


def _barrier(values: Any) -> Any:
    return lax.optimization_barrier(values)  # pyright: ignore[reportUnknownMemberType] (jax)


def _similarities(
    operands: Operands[jax.Array], query_block: jax.Array, gallery_block: jax.Array
) -> list[jax.Array]:
    """Returns the (B, B) similarities of a tile in each level.

    They are below every threshold for items of the query's class, for those left out, and for the
    padding.
    """
    block_size = operands.low.shape[3]

    def block(values: jax.Array, number: jax.Array, axis: int = 0) -> jax.Array:
        return lax.dynamic_slice_in_dim(values, number * block_size, block_size, axis)

    gallery_labels = block(operands.gallery_labels, gallery_block)[None, :]
    not_counted = block(operands.query_labels, query_block)[:, None] == gallery_labels
    not_counted |= gallery_labels < 0
    query_codes = block(operands.query_codes, query_block, 1)
    gallery_codes = block(operands.gallery_codes, gallery_block, 1)
    for of_queries, of_items in zip(query_codes, gallery_codes, strict=True):
        not_counted |= of_queries[:, None] == of_items[None, :]
    products = [
        jnp.matmul(
            block(queries, query_block),
            block(gallery, gallery_block).T,
            precision=lax.Precision.HIGHEST,
        )
        for queries, gallery in zip(operands.queries, operands.gallery, strict=True)
    ]
    return [jnp.where(not_counted, _BELOW_ALL, product) for product in products]


class _Half(NamedTuple):
    """The rows of a tile, or its columns, as queries."""

    block: jax.Array  # the number of the block of queries
    combination: int  # the number of the combination
    axis: int  # over which items are counted: 1 where the queries are the rows, 0 for the columns


def _count_half(
    operands: Operands[jax.Array],
    similarity: jax.Array,
    largest: tuple[jax.Array, jax.Array] | None,
    half: _Half,
    most: jax.Array,
    counts: Counts,
) -> Counts:
    """Adds the items of a tile before the positives of one half's queries.

    Args:
      operands: has the thresholds.
      similarity: (B, B) of the tile, summed over the levels of the combination.
      largest: of `_largest`, or None: all positives are counted, for all queries.
      half: the queries.
      most: the most positives of one of them; 0 where this half is not counted.
      counts: the counts so far.
    """
    place = (half.block, half.combination)
    low, high = operands.low[place], operands.high[place]

    def add_positive(positive: jax.Array, counts: Counts) -> Counts:
        found = _count(similarity, low[positive], high[positive], half.axis)
        return _add(counts, (*place, positive, 0), found)

    def add_group(number: jax.Array, counts: Counts) -> Counts:
        positive, first = number // num_groups, number % num_groups * _GROUP
        part = lax.dynamic_slice_in_dim(similarity, first, _GROUP, 1 - half.axis)
        low_of_group = lax.dynamic_slice_in_dim(low[positive], first, _GROUP)
        high_of_group = lax.dynamic_slice_in_dim(high[positive], first, _GROUP)
        found = _count(part, low_of_group, high_of_group, half.axis)
        return _add(counts, (*place, positive, first), found)

    if largest is None:
        return _repeat(0, most, add_positive, counts)
    is_wanted = np.arange(low.shape[0])[:, None] < most
    is_wanted &= counts[1][place] < operands.enough[half.block]
    low = jnp.where(is_wanted, low, ABOVE_ALL)
    num_groups = low.shape[1] // _GROUP
    hit = _hit_groups(largest, low, half.axis)
    in_many = hit.sum(axis=1) > num_groups // _FEW
    counts = _for_each(in_many, add_positive, counts)
    return _for_each((hit & ~in_many[:, None]).ravel(), add_group, counts)


def _largest(similarity: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the largest similarity of each column, (B,), and of each group of rows, (B / G,)."""
    of_groups = _barrier(similarity.reshape(-1, _GROUP, similarity.shape[1]).max(axis=1))
    return of_groups.max(axis=0), of_groups.max(axis=1)


def _hit_groups(largest: tuple[jax.Array, jax.Array], low: jax.Array, axis: int) -> jax.Array:
    """Returns (M, B / G): whether an item may be before a positive of a query of the group."""
    of_columns, of_row_groups = largest
    if axis == 0:
        return (of_columns >= low).reshape(len(low), -1, _GROUP).any(axis=2)
    return of_row_groups >= low.reshape(len(low), -1, _GROUP).min(axis=2)


def _for_each(
    flags: jax.Array, add: Callable[[jax.Array, Counts], Counts], counts: Counts
) -> Counts:
    """Returns the counts after `add(place, counts)` for each place where a flag is set."""

    def add_next(_: jax.Array, state: tuple[jax.Array, Counts]) -> tuple[jax.Array, Counts]:
        flags, counts = state
        place = jnp.argmax(flags)
        return flags.at[place].set(False), add(place, counts)

    return _repeat(0, flags.sum(), add_next, (flags, counts))[1]


def _count(similarity: jax.Array, low: jax.Array, high: jax.Array, axis: int) -> Counts:
    """Counts over an axis the similarities that are at least `low`, and those above `high`."""
    low, high = jnp.expand_dims(low, axis), jnp.expand_dims(high, axis)
    may_be = (similarity >= low).astype(jnp.uint32)
    surely = (similarity > high).astype(jnp.uint32)
    # One sum gives both counts: a block has fewer than 2^16 rows.
    both = _sum(may_be + (surely << 16), axis)
    return (both & 0xFFFF).astype(jnp.int32), (both >> 16).astype(jnp.int32)


def _add(counts: Counts, place: tuple[Any, ...], found: Counts) -> Counts:
    """Adds to the counts, from a place on, (W,) counts of some queries for one positive."""
    start = [lax.convert_element_type(number, jnp.int32) for number in place]

    def added(values: jax.Array, part: jax.Array) -> jax.Array:
        shape = (1, 1, 1, len(part))
        part = lax.dynamic_slice(values, start, shape) + part
        return lax.dynamic_update_slice(values, part, start)

    return added(counts[0], found[0]), added(counts[1], found[1])


def _sum(values: jax.Array, axis: int) -> jax.Array:
    """Sums values over an axis, in the two steps that XLA vectorises best on CPUs.

    They take 0.4 of the time of one step: 64 columns, or 8 rows, are summed side by side.
    """
    if axis == 1:
        parts = values.reshape(len(values), -1, BLOCK_MULTIPLE).sum(axis=1)
        return _barrier(parts).sum(axis=1)
    return _barrier(values.reshape(-1, 8, values.shape[1]).sum(axis=1)).sum(axis=0)
