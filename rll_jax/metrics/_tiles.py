"""Counts tiles on devices: a block of queries against a block of the gallery, in every level."""

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
_SUM_ERROR = 2.0**-22  # what a float32 sum of a few similarities adds to their errors
_BELOW_ALL = -1e4  # a similarity that is below every threshold, also in a sum with others

Counts = tuple[jax.Array, jax.Array]  # (I, C, M, B) int32: similarity >= low, similarity > high


_Array = TypeVar("_Array", np.ndarray, jax.Array)  # on the host, on a device


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


class Plan(NamedTuple):
    """How the tiles are counted; known when the program is compiled."""

    mesh: Mesh  # the devices, along an axis "device"
    symmetric: bool  # the blocks of queries are the first of the gallery
    combinations: tuple[Combination, ...]


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
    add: Callable[[jax.Array, Counts], Counts],
    counts: Counts,
) -> Counts:
    """Returns the counts after `add(number, counts)` for the numbers from `first` to `stop` - 1."""
    return lax.fori_loop(first, stop, add, counts)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


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
        of_rows = functools.partial(_count_positive, operands, similarity, place, query_block, 1)
        counts = _repeat(0, most_of_rows[place], of_rows, counts)
        if plan.symmetric:
            of_columns = functools.partial(
                _count_positive, operands, similarity, place, gallery_block, 0
            )
            counts = _repeat(0, most_of_columns[place], of_columns, counts)
    return counts


def _barrier(values: Any) -> Any:
    return lax.optimization_barrier(values)  # pyright: ignore[reportUnknownMemberType] (jax)


def _similarities(
    operands: Operands[jax.Array], query_block: jax.Array, gallery_block: jax.Array
) -> list[jax.Array]:
    """Returns the (B, B) similarities of a tile in each level.

    They are below every threshold for items of the query's class, and for those left out.
    """
    block_size = operands.low.shape[3]

    def block(values: jax.Array, number: jax.Array, axis: int = 0) -> jax.Array:
        return lax.dynamic_slice_in_dim(values, number * block_size, block_size, axis)

    not_counted = (
        block(operands.query_labels, query_block)[:, None]
        == block(operands.gallery_labels, gallery_block)[None, :]
    )
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


def _count_positive(
    operands: Operands[jax.Array],
    similarity: jax.Array,
    combination: int,
    block: jax.Array,
    axis: int,
    positive: jax.Array,
    counts: Counts,
) -> Counts:
    """Adds the items of a tile before one positive of each query of a block.

    Args:
      operands: has the thresholds.
      similarity: (B, B) of the tile, summed over the levels of the combination.
      combination: the number of the combination.
      block: the number of the block of queries.
      axis: the axis of `similarity` over which items are counted: 1 where the queries are its
        rows, 0 where they are its columns.
      positive: the number of the positive, from 0 to M - 1.
      counts: the counts so far.
    """
    low = jnp.expand_dims(operands.low[block, combination, positive], axis)
    high = jnp.expand_dims(operands.high[block, combination, positive], axis)
    may_be = (similarity >= low).astype(jnp.uint32)
    surely = (similarity > high).astype(jnp.uint32)
    # One sum gives both counts: a block has fewer than 2^16 rows.
    both = _sum(may_be + (surely << 16), axis)
    all_may_be, all_surely = counts
    place = (block, combination, positive)
    return (
        all_may_be.at[place].add((both & 0xFFFF).astype(jnp.int32)),
        all_surely.at[place].add((both >> 16).astype(jnp.int32)),
    )


def _sum(values: jax.Array, axis: int) -> jax.Array:
    """Sums (B, B) values over an axis, in the two steps that XLA vectorises best on CPUs.

    They take 0.4 of the time of one step: 64 columns, or 8 rows, are summed side by side.
    """
    block_size = len(values)
    if axis == 1:
        parts = values.reshape(block_size, -1, BLOCK_MULTIPLE).sum(axis=1)
        return _barrier(parts).sum(axis=1)
    return _barrier(values.reshape(-1, 8, block_size).sum(axis=1)).sum(axis=0)
