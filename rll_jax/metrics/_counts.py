"""Counts, on all devices of this process, the items that a query ranks before its positives.

The similarities of all queries with the gallery are computed in tiles: a block of queries against
a block of the gallery. The tiles are shared out over the devices, and each device holds all
queries and the whole gallery. Where the queries rank each other, one tile serves both its rows
and its columns as queries, so that half of the tiles are enough.
"""

from collections.abc import Callable
import functools
from typing import Any, Generic, NamedTuple, TypeVar, cast

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from rll_jax.metrics import _vectors
from rll_jax.metrics._problem import Problem

_ABOVE_ALL = 3.0  # a threshold above every similarity
_BELOW_ALL = -2  # a similarity below every threshold

_Counts = tuple[jax.Array, jax.Array]  # (I, M, B) int32: similarity >= low, similarity > high


_Array = TypeVar("_Array", np.ndarray, jax.Array)  # on the host, on a device


class _Operands(NamedTuple, Generic[_Array]):
    """What every device counts with: I blocks of B queries, J blocks of B items, M positives."""

    queries: _Array  # (I * B, D) float32 of length 1, rotated
    query_labels: _Array  # (I * B,) int32
    gallery: _Array  # (J * B, D) float32 of length 1, rotated
    gallery_labels: _Array  # (J * B,) int32
    low: _Array  # (I, M, B) float32: from here on an item may be before a positive
    high: _Array  # (I, M, B) float32: above, an item is surely before a positive
    most_positives: _Array  # (I,) int32: the most positives of a block's queries


def count_before(
    problem: Problem, rows: np.ndarray, similarity: np.ndarray, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts the items of other classes before each positive, by float32 products.

    Args:
      problem: the queries and the gallery.
      rows: (Q,) queries, those with most positives first.
      similarity: (Q, M) float64 similarities with their positives, descending, then -inf.
      block_size: B, the rows and columns of a tile, less than 65536.

    Returns:
      Two (Q, M) int64 counts: the items that may be before a positive (at least as similar, as
      far as float32 can tell), and those that surely are. Counts where `similarity` is -inf mean
      nothing.
    """
    rotation, band = _vectors.rotation_and_band(problem.gallery.shape[1])
    operands, padding = _make_operands(problem, rows, similarity, block_size, rotation, band)
    devices = cast(list[Any], jax.local_devices())  # pyright: ignore[reportUnknownMemberType] (jax)
    mesh = Mesh(np.array(devices), ("device",))
    tiles, num_tiles = _share_tiles(
        operands.most_positives,
        len(operands.gallery) // block_size,
        mesh.size,
        symmetric=problem.leave_one_out,
    )
    may_be, surely = cast(
        _Counts,
        _count_on_devices(operands, tiles, num_tiles, mesh=mesh, symmetric=problem.leave_one_out),
    )
    # The similarity of the padding is exactly 0.
    padding_may_be = padding * (operands.low <= 0)
    padding_surely = padding * (operands.high < 0)
    return (
        _sum_over_devices(may_be, mesh.size, padding_may_be)[: len(rows)],
        _sum_over_devices(surely, mesh.size, padding_surely)[: len(rows)],
    )


def _make_operands(
    problem: Problem,
    rows: np.ndarray,
    similarity: np.ndarray,
    block_size: int,
    rotation: np.ndarray,
    band: float,
) -> tuple[_Operands[np.ndarray], int]:
    """Returns what the devices count with, and the number of rows that pad the gallery."""
    gallery_rows = np.arange(len(problem.gallery))
    if problem.leave_one_out:
        # The queries first, in their order: the gallery then has the blocks of the queries.
        gallery_rows = np.concatenate([rows, np.setdiff1d(gallery_rows, rows)])
    gallery = _padded(
        _vectors.unit_rows(
            problem.gallery[gallery_rows], problem.gallery_norms[gallery_rows], rotation
        ),
        block_size,
        0,
    )
    gallery_labels = _padded(problem.gallery_labels[gallery_rows], block_size, -1)
    queries, query_labels = gallery, gallery_labels
    if not problem.leave_one_out:
        units = _vectors.unit_rows(problem.queries[rows], problem.query_norms[rows], rotation)
        queries = _padded(units, block_size, 0)
        query_labels = _padded(problem.query_labels[rows], block_size, -1)
    thresholds = np.full((len(queries), similarity.shape[1]), _ABOVE_ALL)
    thresholds[: len(rows)] = np.where(np.isfinite(similarity), similarity, _ABOVE_ALL)
    thresholds = thresholds.reshape(-1, block_size, similarity.shape[1]).transpose(0, 2, 1)
    operands = _Operands(
        queries=queries,
        query_labels=query_labels,
        gallery=gallery,
        gallery_labels=gallery_labels,
        low=(thresholds - band).astype(np.float32),
        high=(thresholds + band).astype(np.float32),
        most_positives=(thresholds < _ABOVE_ALL).any(axis=2).sum(axis=1).astype(np.int32),
    )
    return operands, len(gallery) - len(gallery_rows)


def _padded(rows: np.ndarray, multiple: int, value: int) -> np.ndarray:
    """Returns rows, with rows of a value behind them up to a multiple in number."""
    padding = -len(rows) % multiple
    if not padding:
        return rows
    return np.concatenate([rows, np.full((padding, *rows.shape[1:]), value, rows.dtype)])


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


def _sum_over_devices(
    counts: jax.Array, num_devices: int, padding_counts: np.ndarray
) -> np.ndarray:
    """Adds the counts of all devices and takes those of the padding off.

    Args:
      counts: (num_devices * I, M, B) int32.
      num_devices: the number of devices.
      padding_counts: (I, M, B) integers.

    Returns:
      (I * B, M) int64.
    """
    by_device = np.asarray(counts).reshape(num_devices, *padding_counts.shape)
    total = by_device.sum(axis=0, dtype=np.int64) - padding_counts
    return total.transpose(0, 2, 1).reshape(-1, padding_counts.shape[1])


@jax.jit(static_argnames=("mesh", "symmetric"))  # pyright: ignore[reportUnknownMemberType]
def _count_on_devices(
    operands: _Operands[jax.Array],
    tiles: jax.Array,
    num_tiles: jax.Array,
    *,
    mesh: Mesh,
    symmetric: bool,
) -> _Counts:
    """Counts all tiles, each on its device.

    Args:
      operands: the same for every device.
      tiles: (devices * T, 2) int32, as `_share_tiles` returns them.
      num_tiles: (devices,) int32.
      mesh: the devices, along an axis "device".
      symmetric: as for `_share_tiles`.

    Returns:
      (devices * I, M, B) int32 counts, each device's own one after the other.
    """
    per_device, on_all = PartitionSpec("device"), PartitionSpec()
    count = jax.shard_map(
        functools.partial(_count_tiles, symmetric=symmetric),
        mesh=mesh,
        in_specs=(on_all, per_device, per_device),
        out_specs=(per_device, per_device),
        check_vma=False,
    )
    return count(operands, tiles, num_tiles)


def _count_tiles(
    operands: _Operands[jax.Array], tiles: jax.Array, num_tiles: jax.Array, *, symmetric: bool
) -> _Counts:
    """Counts the tiles of one device: the first `num_tiles[0]` of (T, 2) `tiles`."""
    zeros = lax.full_like(operands.low, 0, jnp.int32)
    count = functools.partial(_count_tile, operands, tiles, symmetric)
    return _repeat(num_tiles[0], count, (zeros, zeros))


def _repeat(
    times: jax.Array, add: Callable[[jax.Array, _Counts], _Counts], counts: _Counts
) -> _Counts:
    """Returns the counts after `add(number, counts)` for the numbers from 0 to `times` - 1."""
    return lax.fori_loop(0, times, add, counts)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _count_tile(
    operands: _Operands[jax.Array],
    tiles: jax.Array,
    symmetric: bool,
    number: jax.Array,
    counts: _Counts,
) -> _Counts:
    """Adds what one tile counts."""
    query_block, gallery_block = tiles[number, 0], tiles[number, 1]
    similarity = jnp.matmul(
        _block(operands.queries, query_block, operands),
        _block(operands.gallery, gallery_block, operands).T,
        precision=lax.Precision.HIGHEST,
    )
    same_class = (
        _block(operands.query_labels, query_block, operands)[:, None]
        == _block(operands.gallery_labels, gallery_block, operands)[None, :]
    )
    # Behind the barrier XLA computes the similarities once, not once for each positive.
    similarity = jnp.where(same_class, _BELOW_ALL, similarity)
    similarity = lax.optimization_barrier(similarity)  # pyright: ignore[reportUnknownMemberType] (jax)
    of_rows = functools.partial(_count_positive, operands, similarity, query_block, 1)
    counts = _repeat(operands.most_positives[query_block], of_rows, counts)
    if symmetric:
        # A tile on the diagonal has counted its columns as rows.
        on_diagonal = query_block == gallery_block
        of_columns = functools.partial(_count_positive, operands, similarity, gallery_block, 0)
        num_positives = jnp.where(on_diagonal, 0, operands.most_positives[gallery_block])
        counts = _repeat(num_positives, of_columns, counts)
    return counts


def _block(rows: jax.Array, number: jax.Array, operands: _Operands[jax.Array]) -> jax.Array:
    """Returns a block of rows by its number."""
    block_size = operands.low.shape[2]
    return lax.dynamic_slice_in_dim(rows, number * block_size, block_size)


def _count_positive(
    operands: _Operands[jax.Array],
    similarity: jax.Array,
    block: jax.Array,
    axis: int,
    positive: jax.Array,
    counts: _Counts,
) -> _Counts:
    """Adds the items of a tile before one positive of each query of a block.

    Args:
      operands: has the thresholds.
      similarity: (B, B) of the tile.
      block: the number of the block of queries.
      axis: the axis of `similarity` over which items are counted: 1 where the queries are its
        rows, 0 where they are its columns.
      positive: the number of the positive, from 0 to M - 1.
      counts: the counts so far.
    """
    low = jnp.expand_dims(operands.low[block, positive], axis)
    high = jnp.expand_dims(operands.high[block, positive], axis)
    may_be = (similarity >= low).astype(jnp.uint32)
    surely = (similarity > high).astype(jnp.uint32)
    # One sum gives both counts: a block has fewer than 2^16 rows.
    both = jnp.sum(may_be + (surely << 16), axis=axis)
    all_may_be, all_surely = counts
    return (
        all_may_be.at[block, positive].add((both & 0xFFFF).astype(jnp.int32)),
        all_surely.at[block, positive].add((both >> 16).astype(jnp.int32)),
    )
