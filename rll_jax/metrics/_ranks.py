"""Where the positives of a query stand in the ranking of a gallery, exactly, with nothing sorted but a few rows.

Private to `rll_jax.metrics`. The last bits of a float32 product depend on the backend, on the block and on the place in it, so
float32 decides only what it can: items clearly more similar than a positive, and items that may be. Where the two counts
lead to different scores, the query is ranked again in float64. What comes out depends on none of that.

A random rotation of all vectors comes first. It changes no cosine, and makes the rounding errors of a sum of D products
independent, about sqrt(D) of them instead of D: in vectors of equal components, or of 0 and 1, all would go one way.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

TIE = 1e-14  # similarities this close, in float64, are equal
MOST_POSITIVES = 64  # a query with more is ranked in float64 at once
_MRR_EXACT_TO = 1e-6
_FLOAT64_NUMBERS, _FLOAT64_COLUMNS = 1 << 24, 8192
_ABSENT = np.iinfo(np.int64).max  # the rank of a positive that is not there


class Problem(NamedTuple):
    """Queries with at least one positive, and a gallery; `own` says that they are the same rows."""

    queries: np.ndarray
    query_norms: np.ndarray  # (Q, 1) float64
    query_labels: np.ndarray  # dense: 0, 1, ...
    gallery: np.ndarray
    gallery_norms: np.ndarray
    gallery_labels: np.ndarray
    own: bool
    order: np.ndarray  # the gallery's rows, class by class
    start: np.ndarray  # (Q,) where in `order` the query's class begins
    size: np.ndarray  # (Q,) how many there are of it, the query itself counted


class Scores(NamedTuple):
    """One value for each query."""

    first_rank: np.ndarray
    r_precision: np.ndarray
    average_precision: np.ndarray

    @classmethod
    def of(cls, ranks: np.ndarray, positives: np.ndarray) -> "Scores":
        """From (Q, M) ranks in ascending order, `_ABSENT` behind a query's last, and its (Q,) number of positives."""
        within = ranks <= positives[:, None]
        precision = np.arange(1, ranks.shape[1] + 1) / ranks
        average = np.where(within, precision, 0).sum(1) / positives
        return cls(ranks[:, 0], within.sum(1) / positives, average)


def make_problem(queries, query_labels, gallery, gallery_labels) -> Problem:
    own = gallery is None
    if own:
        gallery, gallery_labels = queries, query_labels
    if not np.issubdtype(np.result_type(query_labels, gallery_labels), np.integer):
        raise TypeError(
            f"query_labels and gallery_labels are {query_labels.dtype} and {gallery_labels.dtype}: no integer type holds both"
        )
    classes, dense = np.unique(np.concatenate([query_labels, gallery_labels]), return_inverse=True)
    query_labels, gallery_labels = (
        dense[: len(queries)].astype(np.int32),
        dense[len(queries) :].astype(np.int32),
    )
    counts = np.bincount(gallery_labels, minlength=len(classes))
    start = np.cumsum(counts) - counts
    order = np.argsort(gallery_labels, kind="stable")
    gallery_norms = _norms(gallery)
    query_norms = gallery_norms if own else _norms(queries)
    start, size = start[query_labels], counts[query_labels]
    return Problem(
        queries,
        query_norms,
        query_labels,
        gallery,
        gallery_norms,
        gallery_labels,
        own,
        order,
        start,
        size,
    )


def score(problem: Problem, ks, block_size: int) -> tuple[np.ndarray, Scores]:
    """The rows of the queries that have a positive, and their scores."""
    positives = problem.size - problem.own
    rows = np.flatnonzero(positives > 0)
    few = rows[positives[rows] <= MOST_POSITIVES]
    few = few[
        np.argsort(-positives[few], kind="stable")
    ]  # so that a block's queries have about as many positives
    scores = Scores(*(np.zeros(len(positives)) for _ in Scores._fields))

    def put(at, values):
        for whole, part in zip(scores, values):
            whole[at] = part

    exactly = np.setdiff1d(rows, few)
    if len(few):
        similarity = _similarity_of_positives(problem, few)
        at_least, above = _count(problem, few, similarity, block_size)
        place = np.where(
            np.isfinite(similarity), np.arange(1, similarity.shape[1] + 1), _ABSENT // 2
        )
        worst, best = (Scores.of(place + count, positives[few]) for count in (at_least, above))
        put(few, worst)
        unclear = (worst.r_precision != best.r_precision) | (
            worst.average_precision != best.average_precision
        )
        unclear |= 1 / best.first_rank - 1 / worst.first_rank > _MRR_EXACT_TO
        for k in ks:
            unclear |= (best.first_rank <= k) & (worst.first_rank > k)
        exactly = np.concatenate([exactly, few[unclear]])
    step = max(16, _FLOAT64_NUMBERS // len(problem.gallery))
    for first in range(0, len(exactly), step):
        some = exactly[first : first + step]
        put(some, _score_exactly(problem, some, positives[some]))
    return rows, Scores(*(x[rows] for x in scores))


def _norms(x) -> np.ndarray:
    """(N, 1) float64 lengths; squares neither overflow nor vanish."""
    out = np.empty((len(x), 1))
    for first in range(0, len(x), _FLOAT64_COLUMNS):
        part = x[first : first + _FLOAT64_COLUMNS].astype(np.float64)
        largest = np.abs(part).max(axis=1, keepdims=True)
        part /= largest
        out[first : first + len(part)] = (
            largest * np.sqrt(np.einsum("nd,nd->n", part, part))[:, None]
        )
    return out


def unit_rows(x, norms=None, rotation=None) -> np.ndarray:
    """Float32 rows of length 1, rotated where a rotation is given."""
    norms, out = _norms(x) if norms is None else norms, np.empty(x.shape, np.float32)
    for first in range(0, len(x), _FLOAT64_COLUMNS):
        part = slice(first, first + _FLOAT64_COLUMNS)
        rows = x[part] / norms[part]
        out[part] = rows if rotation is None else rows @ rotation
    return out


def _similarity_of_positives(problem, rows) -> np.ndarray:
    """(Q, M) float64, in descending order; -inf behind a query's last. `rows` are sorted, most positives first."""
    out = np.full((len(rows), int(problem.size[rows[0]] - problem.own)), -np.inf)
    first = 0
    while first < len(rows):
        largest = int(problem.size[rows[first]])
        some = rows[first : first + max(1, (1 << 22) // (largest * problem.gallery.shape[1]))]
        place = np.arange(largest)
        there = place < problem.size[some][:, None]
        found = problem.order[np.where(there, problem.start[some][:, None] + place, 0)]
        there &= ~(problem.own & (found == some[:, None]))
        positives = problem.gallery[found.ravel()] / problem.gallery_norms[found.ravel()]
        queries = problem.queries[some] / problem.query_norms[some]
        similarity = positives.reshape(*found.shape, -1) @ queries[:, :, None]
        similarity = -np.sort(-np.where(there, similarity[:, :, 0], -np.inf), axis=1)
        most = largest - problem.own
        out[first : first + len(some), :most] = similarity[:, :most]
        first += len(some)
    return out


def _score_exactly(problem, rows, positives) -> Scores:
    """By float64 similarities of a few queries with the whole gallery; of the negatives, those that may count are sorted."""
    queries = problem.queries[rows] / problem.query_norms[rows]
    similarity = np.empty((len(rows), len(problem.gallery)))
    for first in range(0, len(problem.gallery), _FLOAT64_COLUMNS):
        part = slice(first, first + _FLOAT64_COLUMNS)
        similarity[:, part] = queries @ (problem.gallery[part] / problem.gallery_norms[part]).T
    ranks = np.full((len(rows), positives.max()), _ABSENT)
    for row, values, found in zip(rows, similarity, ranks):
        same = problem.gallery_labels == problem.query_labels[row]
        other = ~same
        if problem.own:
            same[row] = False
        own = -np.sort(-values[same])
        negatives = np.sort(values[other & (values >= own[-1] - TIE)])
        before = len(negatives) - np.searchsorted(negatives, own - TIE)
        found[: len(own)] = before + np.arange(1, len(own) + 1)
    return Scores.of(ranks, positives)


def rotation_and_band(dim: int) -> tuple[np.ndarray, float]:
    """A (D, D) rotation, and how far a float32 product of rotated unit vectors may be from the truth: some 15 deviations."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))
    return rotation, 2.0**-22 * np.sqrt(dim)


def _count(problem, rows, similarity, block_size) -> tuple[np.ndarray, np.ndarray]:
    """Items of other classes that may stand before each positive, and those that surely do: two (Q, M) counts."""
    rotation, band = rotation_and_band(problem.gallery.shape[1])
    columns = np.arange(len(problem.gallery))
    if problem.own:  # the queries' order first: the gallery is then the queries, and one product serves both ways
        columns = np.concatenate([rows, np.setdiff1d(columns, rows)])
    gallery, pad = _padded(
        unit_rows(problem.gallery[columns], problem.gallery_norms[columns], rotation), block_size
    )
    gallery_labels, _ = _padded(problem.gallery_labels[columns], block_size)
    if problem.own:
        queries, query_labels, blocks = gallery, gallery_labels, len(gallery) // block_size
    else:
        queries, _ = _padded(
            unit_rows(problem.queries[rows], problem.query_norms[rows], rotation), block_size
        )
        query_labels, blocks = (
            _padded(problem.query_labels[rows], block_size)[0],
            len(queries) // block_size,
        )
    most = similarity.shape[1]
    # absent positives and queries have a threshold above every similarity
    thresholds = np.full((blocks * block_size, most), 3.0)
    thresholds[: len(rows)] = np.where(np.isfinite(similarity), similarity, 3.0)
    thresholds = thresholds.reshape(blocks, block_size, most).transpose(0, 2, 1)
    slots = (thresholds < 3).any(axis=2).sum(axis=1).astype(np.int32)
    low, high = (thresholds - band).astype(np.float32), (thresholds + band).astype(np.float32)

    mesh = Mesh(np.array(jax.local_devices()), ("device",))
    tiles = [
        (i, j)
        for i in range(blocks)
        if slots[i]
        for j in range(i if problem.own else 0, len(gallery) // block_size)
    ]
    share = -(-len(tiles) // mesh.size)
    number = np.clip(len(tiles) - share * np.arange(mesh.size), 0, share).astype(np.int32)
    tiles = np.pad(np.array(tiles, np.int32), [(0, share * mesh.size - len(tiles)), (0, 0)])
    found = _count_on_devices(
        queries,
        query_labels,
        low,
        high,
        slots,
        gallery,
        gallery_labels,
        tiles,
        number,
        mesh=mesh,
        own=problem.own,
    )
    counts = []
    for count, counted in zip(found, (low <= 0, high < 0)):
        count = np.asarray(count).reshape(mesh.size, *low.shape).sum(axis=0, dtype=np.int64)
        count -= pad * counted  # the padding's similarity is exactly 0
        counts.append(count.transpose(0, 2, 1).reshape(-1, most)[: len(rows)])
    return tuple(counts)


def _padded(x, multiple):
    pad = -len(x) % multiple
    return (
        (
            np.pad(
                x, [(0, pad)] + [(0, 0)] * (x.ndim - 1), constant_values=-1 if x.ndim == 1 else 0
            ),
            pad,
        )
        if pad
        else (x, 0)
    )


@functools.partial(jax.jit, static_argnames=("mesh", "own"))
def _count_on_devices(
    queries, query_labels, low, high, slots, gallery, gallery_labels, tiles, number, *, mesh, own
):
    block = low.shape[2]

    def count_tiles(
        tiles, number, queries, query_labels, low, high, slots, gallery, gallery_labels
    ):
        def tile(n, counts):
            i, j = tiles[n]
            rows = lax.dynamic_slice_in_dim(queries, i * block, block)
            columns = lax.dynamic_slice_in_dim(gallery, j * block, block)
            similarity = jnp.matmul(rows, columns.T, precision=lax.Precision.HIGHEST)
            same = (
                lax.dynamic_slice_in_dim(query_labels, i * block, block)[:, None]
                == lax.dynamic_slice_in_dim(gallery_labels, j * block, block)[None, :]
            )
            similarity = lax.optimization_barrier(
                jnp.where(same, -2, similarity)
            )  # once, not once for each positive
            counts = lax.fori_loop(0, slots[i], functools.partial(slot, similarity, i, 1), counts)
            if own:
                counts = lax.fori_loop(
                    0,
                    jnp.where(i == j, 0, slots[j]),
                    functools.partial(slot, similarity, j, 0),
                    counts,
                )
            return counts

        def slot(similarity, at, axis, k, counts):
            at_least, above = (jnp.expand_dims(limit[at, k], axis) for limit in (low, high))
            # two counts in one sum: a block has fewer than 2^16 rows
            both = (similarity >= at_least).astype(jnp.uint32) + (
                (similarity > above).astype(jnp.uint32) << 16
            )
            both = jnp.sum(both, axis=axis)
            return counts[0].at[at, k].add((both & 0xFFFF).astype(jnp.int32)), counts[1].at[
                at, k
            ].add((both >> 16).astype(jnp.int32))

        none = jnp.zeros(low.shape, jnp.int32)
        return lax.fori_loop(0, number[0], tile, (none, none))

    split, whole = PartitionSpec("device"), PartitionSpec()
    sharded = jax.shard_map(
        count_tiles,
        mesh=mesh,
        in_specs=(split, split) + (whole,) * 7,
        out_specs=(split, split),
        check_vma=False,
    )
    return sharded(tiles, number, queries, query_labels, low, high, slots, gallery, gallery_labels)
