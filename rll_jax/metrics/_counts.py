"""Counts, on all devices of this process, the items that a query ranks before its positives.

The similarities of all queries with the gallery are computed in tiles: a block of queries against
a block of the gallery. The tiles are shared out over the devices, and each device holds all
queries and the whole gallery. Where the queries rank each other, one tile serves both its rows
and its columns as queries, so that half of the tiles are enough.

Where there are several levels, a tile has the product of each, and the similarity of a combination
of levels is the mean of theirs: one pass counts for all combinations.
"""

from collections.abc import Callable, Sequence
import functools
import time
from typing import Any, Generic, NamedTuple, TypeVar, cast

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from rll_jax.metrics import _vectors
from rll_jax.metrics._problem import Problem
from rll_jax.metrics._progress import Watch

Combination = tuple[int, ...]  # the numbers of the levels whose mean similarity ranks

_ABOVE_ALL = 1e4  # a threshold above every sum of similarities
_BELOW_ALL = -1e4  # a similarity that is below every threshold, also in a sum with others
_SUM_ERROR = 2.0**-22  # what a float32 sum of a few similarities adds to their errors
_SECONDS = 0.5  # that the devices count before Python has a say again

_Counts = tuple[jax.Array, jax.Array]  # (I, C, M, B) int32: similarity >= low, similarity > high


_Array = TypeVar("_Array", np.ndarray, jax.Array)  # on the host, on a device


class _Operands(NamedTuple, Generic[_Array]):
    """What every device counts with: I blocks of B queries, J blocks of B items, M positives."""

    queries: tuple[_Array, ...]  # (I * B, D) float32 of length 1, rotated, of each level
    query_labels: _Array  # (I * B,) int32
    query_codes: _Array  # (K, I * B) int32: of the codes that leave items of other classes out
    gallery: tuple[_Array, ...]  # (J * B, D) float32 of length 1, rotated, of each level
    gallery_labels: _Array  # (J * B,) int32
    gallery_codes: _Array  # (K, J * B) int32
    low: _Array  # (I, C, M, B) float32: from here on an item may be before a positive
    high: _Array  # (I, C, M, B) float32: above, an item is surely before a positive
    most_positives: _Array  # (I,) int32: the most positives of a block's queries


class _Plan(NamedTuple):
    """How the tiles are counted; known when the program is compiled."""

    mesh: Mesh  # the devices, along an axis "device"
    symmetric: bool  # the blocks of queries are the first of the gallery
    combinations: tuple[Combination, ...]


def count_before(
    problem: Problem,
    combinations: Sequence[Combination],
    rows: np.ndarray,
    similarity: np.ndarray,
    block_size: int,
    watch: Watch,
) -> tuple[np.ndarray, np.ndarray]:
    """Counts the items of other classes before each positive, by float32 products.

    Items that a query leaves out are not counted.

    Args:
      problem: the queries and the gallery.
      combinations: C combinations of levels.
      rows: (Q,) queries, those with most positives first.
      similarity: (C, Q, M) float64 similarities with their positives, descending, then -inf.
      block_size: B, the rows and columns of a tile, less than 65536.
      watch: hears how many tiles are counted, and keeps the counts so far.

    Returns:
      Two (C, Q, M) int64 counts: the items that may be before a positive (at least as similar, as
      far as float32 can tell), and those that surely are. Counts where `similarity` is -inf mean
      nothing.
    """
    operands, padding = _make_operands(problem, combinations, rows, similarity, block_size)
    devices = cast(list[Any], jax.local_devices())  # pyright: ignore[reportUnknownMemberType] (jax)
    plan = _Plan(
        Mesh(np.array(devices), ("device",)), problem.symmetric, tuple(map(tuple, combinations))
    )
    tiles, num_tiles = _share_tiles(
        operands.most_positives,
        len(operands.gallery_labels) // block_size,
        len(devices),
        symmetric=problem.symmetric,
    )
    may_be, surely = _count_in_parts(operands, tiles, num_tiles, plan, watch)
    # The similarity of the padding is exactly 0.
    padding_may_be = padding * (operands.low <= 0)
    padding_surely = padding * (operands.high < 0)
    return (
        _sum_over_devices(may_be, len(devices), padding_may_be)[:, : len(rows)],
        _sum_over_devices(surely, len(devices), padding_surely)[:, : len(rows)],
    )


def _make_operands(
    problem: Problem,
    combinations: Sequence[Combination],
    rows: np.ndarray,
    similarity: np.ndarray,
    block_size: int,
) -> tuple[_Operands[np.ndarray], int]:
    """Returns what the devices count with, and the number of rows that pad the gallery."""
    gallery_rows = np.arange(len(problem.gallery_labels))
    if problem.symmetric:
        # The queries first, in their order: the gallery then has the blocks of the queries.
        gallery_rows = np.concatenate([rows, np.setdiff1d(gallery_rows, rows)])
    padding = -len(gallery_rows) % block_size
    query_padding = -len(rows) % block_size
    queries, gallery, bands = [], [], []
    for level in problem.levels:
        rotation, band = _vectors.rotation_and_band(level.gallery.shape[1])
        bands.append(band)
        gallery.append(
            _vectors.unit_rows(level.gallery, level.gallery_norms, rotation, gallery_rows, padding)
        )
        queries.append(
            gallery[-1]
            if problem.symmetric
            else _vectors.unit_rows(level.queries, level.query_norms, rotation, rows, query_padding)
        )
    codes = list(problem.mixed_codes)
    gallery_labels = _padded(problem.gallery_labels[gallery_rows], padding)
    gallery_codes = _padded(problem.gallery_codes[codes][:, gallery_rows], padding)
    query_labels, query_codes = gallery_labels, gallery_codes
    if not problem.symmetric:
        query_labels = _padded(problem.query_labels[rows], query_padding)
        query_codes = _padded(problem.query_codes[codes][:, rows], query_padding)
    low, high = _thresholds(similarity, combinations, bands, len(query_labels), block_size)
    operands = _Operands(
        queries=tuple(queries),
        query_labels=query_labels,
        query_codes=query_codes,
        gallery=tuple(gallery),
        gallery_labels=gallery_labels,
        gallery_codes=gallery_codes,
        low=low,
        high=high,
        most_positives=(low[:, 0] < _ABOVE_ALL).any(axis=2).sum(axis=1).astype(np.int32),
    )
    return operands, padding


def _padded(values: np.ndarray, padding: int) -> np.ndarray:
    """Returns (..., N) values with -1, which no query has, behind them."""
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padding)], constant_values=-1)


def _thresholds(
    similarity: np.ndarray,
    combinations: Sequence[Combination],
    bands: Sequence[float],
    num_queries: int,
    block_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (I, C, M, B) thresholds of the sums of a combination's similarities.

    Args:
      similarity: (C, Q, M) float64 similarities with the positives, or -inf.
      combinations: the C combinations.
      bands: how far the float32 product of each level may be off.
      num_queries: I * B.
      block_size: B.
    """
    num_combinations, rows, most = similarity.shape
    shape = (num_combinations, num_queries, most)
    low, high = np.full(shape, _ABOVE_ALL, np.float32), np.full(shape, _ABOVE_ALL, np.float32)
    for number, combination in enumerate(combinations):
        size = len(combination)
        band = sum(bands[level] for level in combination) + (size > 1) * size * _SUM_ERROR
        of_sum = size * similarity[number]
        finite = np.isfinite(of_sum)
        low[number, :rows] = np.where(finite, of_sum - band, _ABOVE_ALL)
        high[number, :rows] = np.where(finite, of_sum + band, _ABOVE_ALL)

    def in_blocks(thresholds: np.ndarray) -> np.ndarray:
        blocks = thresholds.reshape(num_combinations, -1, block_size, most)
        return np.ascontiguousarray(blocks.transpose(1, 0, 3, 2))

    return in_blocks(low), in_blocks(high)


def _share_tiles(
    most_positives: np.ndarray, gallery_blocks: int, num_devices: int, *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Shares the tiles out over devices, about as many to each.

    Args:
      most_positives: (I,) of the blocks of queries, in descending order. Blocks of 0 need no tile.
      gallery_blocks: J.
      num_devices: the number of devices.
      symmetric: the blocks of queries are the first of the gallery: tile (i, j) serves (j, i) too.

    Returns:
      (num_devices * T, 2) int32 pairs of a block of queries and a block of the gallery, T for
      each device in turn, and how many of its T pairs each device counts, (num_devices,) int32.
    """
    wanted = np.tile((most_positives > 0)[:, None], (1, gallery_blocks))
    tiles = np.argwhere(np.triu(wanted) if symmetric else wanted)
    per_device = -(-len(tiles) // num_devices)
    num_tiles = np.clip(len(tiles) - per_device * np.arange(num_devices), 0, per_device)
    padded = np.zeros((per_device * num_devices, 2), np.int32)
    padded[: len(tiles)] = tiles
    return padded, num_tiles.astype(np.int32)


def _count_in_parts(
    operands: _Operands[np.ndarray],
    tiles: np.ndarray,
    num_tiles: np.ndarray,
    plan: _Plan,
    watch: Watch,
) -> tuple[np.ndarray, np.ndarray]:
    """Counts all tiles, so many at a time that Python has a say about twice a second.

    Returns:
      Two (devices * I, C, M, B) int32 counts, each device's own one after the other.
    """
    on_all = NamedSharding(plan.mesh, PartitionSpec())
    per_device = NamedSharding(plan.mesh, PartitionSpec("device"))
    shape = (plan.mesh.size * len(operands.low), *operands.low.shape[1:])
    saved = watch.saved_counts()
    zeros = np.zeros(shape, np.int32)
    done, host_counts = (0, (zeros, zeros)) if saved is None else saved
    on_devices = cast(_Operands[jax.Array], _put(operands, plan, on_all))
    tiles_on_devices, numbers = jax.device_put((tiles, num_tiles), per_device)
    progress: tuple[int, _Counts] = (done, jax.device_put(host_counts, per_device))
    last = int(num_tiles.max(initial=0))
    step = 1
    try:
        while progress[0] < last:
            begin = time.monotonic()
            stop = min(progress[0] + step, last)
            counts = _count_on_devices(
                on_devices, tiles_on_devices, numbers, progress[0], stop, progress[1], plan=plan
            )
            jax.block_until_ready(counts)
            # One assignment: an interruption leaves counts and their number together.
            progress = (stop, counts)
            seconds = max(time.monotonic() - begin, 1e-4)
            step = max(1, min(2 * step, int(step * _SECONDS / seconds)))
            watch.counted(*progress, last)
    except BaseException:
        watch.keep_counts(*progress)
        raise
    may_be, surely = progress[1]
    return np.asarray(may_be), np.asarray(surely)


def _put(operands: _Operands[np.ndarray], plan: _Plan, sharding: NamedSharding) -> Any:
    """Returns the operands on all devices; queries that are the gallery are put there once."""
    if not plan.symmetric:
        return jax.device_put(operands, sharding)
    shared = {"queries": (), "query_labels": (), "query_codes": ()}
    put: Any = jax.device_put(operands._replace(**shared), sharding)
    return put._replace(
        queries=put.gallery, query_labels=put.gallery_labels, query_codes=put.gallery_codes
    )


def _sum_over_devices(
    counts: np.ndarray, num_devices: int, padding_counts: np.ndarray
) -> np.ndarray:
    """Adds the counts of all devices and takes those of the padding off.

    Args:
      counts: (num_devices * I, C, M, B) int32.
      num_devices: the number of devices.
      padding_counts: (I, C, M, B) integers.

    Returns:
      (C, I * B, M) int64.
    """
    by_device = counts.reshape(num_devices, *padding_counts.shape)
    total = by_device.sum(axis=0, dtype=np.int64) - padding_counts
    _, num_combinations, most, _ = total.shape
    return total.transpose(1, 0, 3, 2).reshape(num_combinations, -1, most)


@jax.jit(static_argnames=("plan",))  # pyright: ignore[reportUnknownMemberType]
def _count_on_devices(
    operands: _Operands[jax.Array],
    tiles: jax.Array,
    num_tiles: jax.Array,
    first: jax.Array | int,
    stop: jax.Array | int,
    counts: _Counts,
    *,
    plan: _Plan,
) -> _Counts:
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
    operands: _Operands[jax.Array],
    tiles: jax.Array,
    num_tiles: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    counts: _Counts,
    *,
    plan: _Plan,
) -> _Counts:
    """Counts the tiles of one device from `first` on, before `stop` and `num_tiles[0]`."""
    count = functools.partial(_count_tile, operands, tiles, plan)
    return _repeat(first, jnp.minimum(stop, num_tiles[0]), count, counts)


def _repeat(
    first: jax.Array | int,
    stop: jax.Array,
    add: Callable[[jax.Array, _Counts], _Counts],
    counts: _Counts,
) -> _Counts:
    """Returns the counts after `add(number, counts)` for the numbers from `first` to `stop` - 1."""
    return lax.fori_loop(first, stop, add, counts)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _count_tile(
    operands: _Operands[jax.Array],
    tiles: jax.Array,
    plan: _Plan,
    number: jax.Array,
    counts: _Counts,
) -> _Counts:
    """Adds what one tile counts."""
    query_block, gallery_block = tiles[number, 0], tiles[number, 1]
    levels = _similarities(operands, query_block, gallery_block)
    # A tile on the diagonal counts its columns as rows.
    most_of_columns = jnp.where(
        query_block == gallery_block, 0, operands.most_positives[gallery_block]
    )
    for place, combination in enumerate(plan.combinations):
        similarity = functools.reduce(jnp.add, [levels[level] for level in combination])
        # Behind the barrier XLA computes the similarities once, not once for each positive.
        similarity, counts = _barrier((similarity, counts))
        of_rows = functools.partial(_count_positive, operands, similarity, place, query_block, 1)
        counts = _repeat(0, operands.most_positives[query_block], of_rows, counts)
        if plan.symmetric:
            of_columns = functools.partial(
                _count_positive, operands, similarity, place, gallery_block, 0
            )
            counts = _repeat(0, most_of_columns, of_columns, counts)
    return counts


def _barrier(values: Any) -> Any:
    return lax.optimization_barrier(values)  # pyright: ignore[reportUnknownMemberType] (jax)


def _similarities(
    operands: _Operands[jax.Array], query_block: jax.Array, gallery_block: jax.Array
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
    operands: _Operands[jax.Array],
    similarity: jax.Array,
    combination: int,
    block: jax.Array,
    axis: int,
    positive: jax.Array,
    counts: _Counts,
) -> _Counts:
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
    both = jnp.sum(may_be + (surely << 16), axis=axis)
    all_may_be, all_surely = counts
    place = (block, combination, positive)
    return (
        all_may_be.at[place].add((both & 0xFFFF).astype(jnp.int32)),
        all_surely.at[place].add((both >> 16).astype(jnp.int32)),
    )
