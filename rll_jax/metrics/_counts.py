"""Counts, on all devices of this process, the items that a query ranks before its positives.

The similarities of all queries with the gallery are computed in tiles: a block of queries against
a block of the gallery. The tiles are shared out over the devices, and each device holds all
queries and the whole gallery. Where the queries rank each other, one tile serves both its rows
and its columns as queries, so that half of the tiles are enough.

Where there are several levels, a tile has the product of each, and the similarity of a combination
of levels is the mean of theirs: one pass counts for all combinations.
"""

from collections.abc import Sequence
import time
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from rll_jax.metrics import _tiles, _vectors
from rll_jax.metrics._problem import Problem
from rll_jax.metrics._progress import Watch

METHOD = 2  # change it when the same tiles get other counts: kept counts are then refused
_SECONDS = 0.5  # that the devices count before Python has a say again


def count_before(
    problem: Problem,
    combinations: Sequence[_tiles.Combination],
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
      block_size: B, the rows and columns of a tile, a multiple of `BLOCK_MULTIPLE` below
        65536.
      watch: hears how many tiles are counted, and keeps the counts so far.

    Returns:
      Two (C, Q, M) int64 counts: the items that may be before a positive (at least as similar, as
      far as float32 can tell), and those that surely are. Both may be too small for a positive
      that is not the first, where both put it behind rank R. Counts where `similarity` is -inf
      mean nothing.
    """
    items = np.arange(len(problem.gallery_labels))
    if problem.symmetric:
        # The queries first, in their order: the gallery then has the blocks of the queries.
        items = np.concatenate([rows, np.setdiff1d(items, rows)])
    low, high = _thresholds(similarity, combinations, _bands(problem), block_size)
    operands = _make_operands(problem, rows, items, low, high)
    devices = _devices()
    plan = _tiles.Plan(
        Mesh(np.array(devices), ("device",)),
        problem.symmetric,
        tuple(map(tuple, combinations)),
        by_groups=_by_groups(devices),
    )
    tiles, num_tiles = _share_tiles(
        operands.most_positives.max(axis=1),
        len(operands.gallery_labels) // block_size,
        len(devices),
        symmetric=problem.symmetric,
    )
    may_be, surely = _count_in_parts(operands, tiles, num_tiles, plan, watch)
    return (
        _sum_over_devices(may_be, len(devices))[:, : len(rows)],
        _sum_over_devices(surely, len(devices))[:, : len(rows)],
    )


def _devices() -> list[Any]:
    return cast(list[Any], jax.local_devices())  # pyright: ignore[reportUnknownMemberType] (jax)


def _by_groups(devices: Sequence[Any]) -> bool:
    return devices[0].platform == "cpu"


def num_devices() -> int:
    """Returns the number of devices that count."""
    return len(_devices())


def _bands(problem: Problem) -> list[float]:
    """Returns how far a float32 product of each level may be off."""
    dims = [level.gallery.shape[1] for level in problem.levels]
    return [_vectors.rotation_and_band(dim)[1] for dim in dims]


def _make_operands(
    problem: Problem,
    rows: np.ndarray,
    items: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> _tiles.Operands[np.ndarray]:
    """Returns what the devices count with: some queries, some items, and the thresholds."""
    block_size: int = low.shape[3]
    padding, query_padding = -len(items) % block_size, -len(rows) % block_size
    queries: list[np.ndarray] = []
    gallery: list[np.ndarray] = []
    for level in problem.levels:
        rotation, _ = _vectors.rotation_and_band(level.gallery.shape[1])
        gallery.append(
            _vectors.unit_rows(level.gallery, level.gallery_norms, rotation, items, padding)
        )
        if problem.symmetric:
            queries.append(gallery[-1])
        else:
            queries.append(
                _vectors.unit_rows(level.queries, level.query_norms, rotation, rows, query_padding)
            )
    codes = list(problem.mixed_codes)
    gallery_labels = _padded(problem.gallery_labels[items], padding)
    gallery_codes = _padded(problem.gallery_codes[codes][:, items], padding)
    query_labels, query_codes = gallery_labels, gallery_codes
    if not problem.symmetric:
        query_labels = _padded(problem.query_labels[rows], query_padding)
        query_codes = _padded(problem.query_codes[codes][:, rows], query_padding)
    return _tiles.Operands(
        queries=tuple(queries),
        query_labels=query_labels,
        query_codes=query_codes,
        gallery=tuple(gallery),
        gallery_labels=gallery_labels,
        gallery_codes=gallery_codes,
        low=low,
        high=high,
        most_positives=(low < _tiles.ABOVE_ALL).any(axis=3).sum(axis=2).astype(np.int32),
        enough=_enough(problem.num_positives[rows], *low.shape[2:]),
    )


def _enough(num_positives: np.ndarray, most: int, block_size: int) -> np.ndarray:
    """Returns (I, M, B) counts of items that put a positive behind rank R.

    Positive j, from 0, has the rank j + 1 + (the items before it): above R from R - j items on.

    Args:
      num_positives: (Q,) of the queries: their R.
      most: M.
      block_size: B.
    """
    of_queries = np.pad(num_positives, (0, -len(num_positives) % block_size))
    enough = of_queries.reshape(-1, 1, block_size) - np.arange(most)[:, None]
    enough[:, 0] = np.iinfo(np.int32).max  # Recall@K and MRR need the first rank
    return enough.astype(np.int32)


def _padded(values: np.ndarray, padding: int) -> np.ndarray:
    """Returns (..., N) values with -1, which no query has, behind them."""
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padding)], constant_values=-1)


def _thresholds(
    similarity: np.ndarray,
    combinations: Sequence[_tiles.Combination],
    bands: Sequence[float],
    block_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (I, C, M, B) thresholds of the sums of a combination's similarities.

    Args:
      similarity: (C, Q, M) float64 similarities with the positives, or -inf.
      combinations: the C combinations.
      bands: how far the float32 product of each level may be off.
      block_size: B.
    """
    num_combinations, rows, most = similarity.shape
    shape = (num_combinations, rows + -rows % block_size, most)
    low, high = (
        np.full(shape, _tiles.ABOVE_ALL, np.float32),
        np.full(shape, _tiles.ABOVE_ALL, np.float32),
    )
    for number, combination in enumerate(combinations):
        size = len(combination)
        band = _tiles.band_of_sum(bands, combination)
        of_sum = size * similarity[number]
        finite = np.isfinite(of_sum)
        low[number, :rows] = np.where(finite, of_sum - band, _tiles.ABOVE_ALL)
        high[number, :rows] = np.where(finite, of_sum + band, _tiles.ABOVE_ALL)

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
    operands: _tiles.Operands[np.ndarray],
    tiles: np.ndarray,
    num_tiles: np.ndarray,
    plan: _tiles.Plan,
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
    on_devices = cast(_tiles.Operands[jax.Array], _put_operands(operands, plan, on_all))
    tiles_on_devices, numbers = _put((tiles, num_tiles), per_device)
    progress: tuple[int, _tiles.Counts] = (done, _put(host_counts, per_device))
    last = int(num_tiles.max(initial=0))
    step = 1
    try:
        while progress[0] < last:
            begin = time.monotonic()
            stop = min(progress[0] + step, last)
            part = (np.int32(progress[0]), np.int32(stop))
            counts = cast(
                _tiles.Counts,
                _tiles.count_on_devices(
                    on_devices, tiles_on_devices, numbers, *part, progress[1], plan=plan
                ),
            )
            jax.block_until_ready(counts)  # pyright: ignore[reportUnknownMemberType] (jax)
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


def _put(values: Any, sharding: NamedSharding) -> Any:
    return jax.device_put(values, sharding)  # pyright: ignore[reportUnknownMemberType] (jax)


def _put_operands(
    operands: _tiles.Operands[np.ndarray], plan: _tiles.Plan, sharding: NamedSharding
) -> Any:
    """Returns the operands on all devices; queries that are the gallery are put there once."""
    if not plan.symmetric:
        return _put(operands, sharding)
    shared: dict[str, Any] = {"queries": (), "query_labels": (), "query_codes": ()}
    put = _put(operands._replace(**shared), sharding)
    return put._replace(
        queries=put.gallery, query_labels=put.gallery_labels, query_codes=put.gallery_codes
    )


def _sum_over_devices(counts: np.ndarray, devices: int) -> np.ndarray:
    """Adds the (devices * I, C, M, B) int32 counts of all devices to (C, I * B, M) int64."""
    total = counts.reshape(devices, -1, *counts.shape[1:]).sum(axis=0, dtype=np.int64)
    _, num_combinations, most, _ = total.shape
    return total.transpose(1, 0, 3, 2).reshape(num_combinations, -1, most)
