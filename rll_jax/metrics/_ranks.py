"""The exact ranks of each query's positives in a gallery, and the scores that follow from them.

A positive's rank is one more than the number of items before it. Two steps find it, and neither
sorts the gallery:

1. `rll_jax.metrics._counts` counts, with float32 products on all devices, the items that are surely
   more similar than a positive, and the items that may be. The last bits of a float32 product
   depend on the backend, on the block, and on the place in the block. The two counts allow for
   that.
2. A query whose scores differ between the two counts is ranked again with float64 products on the
   CPU.

So the scores depend on neither the backend nor the blocks.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from rll_jax.metrics import _counts, _vectors
from rll_jax.metrics._problem import Problem

TIE = 1e-14  # similarities this close, in float64, are equal
MOST_POSITIVES = 64  # a query with more is ranked in float64 at once
_MRR_EXACT_TO = 1e-6
_FLOAT64_SIMILARITIES = 1 << 24  # similarities that are held in float64 at once
_FLOAT64_COMPONENTS = 1 << 22  # components of positives that are held in float64 at once
_ABSENT = np.iinfo(np.int64).max  # the rank that fills a row behind a query's last positive


class Scores(NamedTuple):
    """One value for each query."""

    first_rank: np.ndarray
    r_precision: np.ndarray
    average_precision: np.ndarray


def score(problem: Problem, ks: Iterable[int], block_size: int) -> tuple[np.ndarray, Scores]:
    """Scores the queries that have a positive in the gallery.

    Args:
      problem: the queries and the gallery.
      ks: the K of Recall@K: whether a query's first rank is at most K is exact for each K.
      block_size: rows and columns of a block of similarities on a device, at most 32768.

    Returns:
      The rows of these queries in ascending order, (M,), and their scores, (M,) each.
    """
    num_positives = problem.num_positives
    rows = np.flatnonzero(num_positives > 0)
    few = rows[num_positives[rows] <= MOST_POSITIVES]
    # Most positives first: the queries of a block then have about as many positives.
    few = few[np.argsort(-num_positives[few], kind="stable")]
    ambiguous = np.setdiff1d(rows, few)
    scores = Scores(*(np.zeros(len(num_positives)) for _ in Scores._fields))
    if len(few):
        counted, unclear = _score_by_counting(problem, few, ks, block_size)
        _assign(scores, few, counted)
        ambiguous = np.concatenate([ambiguous, few[unclear]])
    step = max(16, _FLOAT64_SIMILARITIES // len(problem.gallery))
    for first in range(0, len(ambiguous), step):
        part = ambiguous[first : first + step]
        _assign(scores, part, _score_in_float64(problem, part))
    return rows, Scores(*(values[rows] for values in scores))


def _assign(scores: Scores, rows: np.ndarray, part: Scores) -> None:
    """Writes the scores of some rows into the scores of all."""
    for values, values_of_rows in zip(scores, part, strict=True):
        values[rows] = values_of_rows


def _scores_of_ranks(ranks: np.ndarray, num_positives: np.ndarray) -> Scores:
    """Computes scores from the ranks of the positives.

    Args:
      ranks: (Q, M) in ascending order. Behind a query's last positive they are at least
        `_ABSENT // 2`.
      num_positives: (Q,).
    """
    within_r = ranks <= num_positives[:, None]
    most: int = ranks.shape[1]
    precision = np.divide(np.arange(1, most + 1), ranks)
    return Scores(
        first_rank=ranks[:, 0],
        r_precision=within_r.sum(1) / num_positives,
        average_precision=np.where(within_r, precision, 0).sum(1) / num_positives,
    )


def _score_by_counting(
    problem: Problem, rows: np.ndarray, ks: Iterable[int], block_size: int
) -> tuple[Scores, np.ndarray]:
    """Scores queries by float32 products on all devices.

    Args:
      problem: the queries and the gallery.
      rows: (Q,) queries, those with most positives first.
      ks: as for `score`.
      block_size: as for `score`.

    Returns:
      The scores, (Q,) each, and the (Q,) places in `rows` whose scores float32 cannot tell.
    """
    similarity = _similarity_of_positives(problem, rows)
    maybe_before, surely_before = _counts.count_before(problem, rows, similarity, block_size)
    most: int = similarity.shape[1]
    # Half of _ABSENT: adding a count does not overflow.
    place = np.where(np.isfinite(similarity), np.arange(1, most + 1), _ABSENT // 2)
    num_positives = problem.num_positives[rows]
    worst = _scores_of_ranks(place + maybe_before, num_positives)
    best = _scores_of_ranks(place + surely_before, num_positives)
    unclear = worst.r_precision != best.r_precision
    unclear |= worst.average_precision != best.average_precision
    unclear |= 1 / best.first_rank - 1 / worst.first_rank > _MRR_EXACT_TO
    for k in ks:
        unclear |= (best.first_rank <= k) & (worst.first_rank > k)
    return worst, unclear


def _similarity_of_positives(problem: Problem, rows: np.ndarray) -> np.ndarray:
    """Computes each query's similarities with its positives.

    Args:
      problem: the queries and the gallery.
      rows: (Q,) queries, those with most positives first.

    Returns:
      (Q, M) float64 in descending order, with -inf behind a query's last positive. M is the most
      positives of a query.
    """
    similarity = np.full((len(rows), int(problem.num_positives[rows[0]])), -np.inf)
    first = 0
    while first < len(rows):
        largest_class = int(problem.class_size[rows[first]])
        step = max(1, _FLOAT64_COMPONENTS // (largest_class * problem.gallery.shape[1]))
        part = rows[first : first + step]
        columns = largest_class - problem.leave_one_out
        similarity[first : first + len(part), :columns] = _similarity_of_class(
            problem, part, largest_class
        )[:, :columns]
        first += len(part)
    return similarity


def _similarity_of_class(problem: Problem, rows: np.ndarray, largest_class: int) -> np.ndarray:
    """Computes (Q, largest_class) similarities of queries with their class, in descending order.

    A query's similarity with itself and places behind the end of its class are -inf, at the end.
    """
    place = np.arange(largest_class)
    is_positive = place < problem.class_size[rows][:, None]
    in_order = np.where(is_positive, problem.class_start[rows][:, None] + place, 0)
    members = problem.rows_by_class[in_order]
    if problem.leave_one_out:
        is_positive &= members != rows[:, None]
    positives = problem.gallery[members.ravel()] / problem.gallery_norms[members.ravel()]
    queries = problem.queries[rows] / problem.query_norms[rows]
    similarity = (positives.reshape(*members.shape, -1) @ queries[:, :, None])[:, :, 0]
    return -np.sort(-np.where(is_positive, similarity, -np.inf), axis=1)


def _score_in_float64(problem: Problem, rows: np.ndarray) -> Scores:
    """Scores a few queries by float64 products with the whole gallery.

    Only the negatives that may be before a positive are sorted.

    Args:
      problem: the queries and the gallery.
      rows: (Q,) queries.
    """
    queries = problem.queries[rows] / problem.query_norms[rows]
    similarity = np.empty((len(rows), len(problem.gallery)))
    for first in range(0, len(problem.gallery), _vectors.FLOAT64_ROWS):
        part = slice(first, first + _vectors.FLOAT64_ROWS)
        similarity[:, part] = queries @ (problem.gallery[part] / problem.gallery_norms[part]).T
    num_positives = problem.num_positives[rows]
    ranks = np.full((len(rows), num_positives.max()), _ABSENT)
    for number, row in enumerate(rows):
        is_positive = problem.gallery_labels == problem.query_labels[row]
        is_negative = ~is_positive
        if problem.leave_one_out:
            is_positive[row] = False
        ranks[number, : num_positives[number]] = _ranks_of_positives(
            similarity[number], is_positive, is_negative
        )
    return _scores_of_ranks(ranks, num_positives)


def _ranks_of_positives(
    similarity: np.ndarray, is_positive: np.ndarray, is_negative: np.ndarray
) -> np.ndarray:
    """Returns the ascending ranks of one query's positives. Ties count against the query.

    Args:
      similarity: (N,) float64 similarities of the query with the gallery.
      is_positive: (N,) bool.
      is_negative: (N,) bool.
    """
    positives = -np.sort(-similarity[is_positive])
    negatives = np.sort(similarity[is_negative & (similarity >= positives[-1] - TIE)])
    before = len(negatives) - np.searchsorted(negatives, positives - TIE)
    return before + np.arange(1, len(positives) + 1)
