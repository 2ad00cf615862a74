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

from collections.abc import Iterable, Mapping, Sequence
import functools
from typing import NamedTuple

import numpy as np

from rll_jax.metrics import _counts, _vectors
from rll_jax.metrics._problem import Problem
from rll_jax.metrics._progress import Watch
from rll_jax.metrics._tiles import Combination

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


def score(
    problem: Problem,
    combinations: Sequence[Combination],
    ks: Iterable[int],
    block_size: int,
    watch: Watch,
) -> tuple[np.ndarray, list[Scores]]:
    """Scores the queries that have a positive in the gallery.

    Args:
      problem: the queries and the gallery.
      combinations: the levels whose mean similarity ranks, each once.
      ks: the K of Recall@K: whether a query's first rank is at most K is exact for each K.
      block_size: rows and columns of a block of similarities on a device, at most 32768.
      watch: hears how far it is.

    Returns:
      The rows of these queries in ascending order, (M,), and for each combination their scores,
      (M,) each.
    """
    num_positives = problem.num_positives
    rows = np.flatnonzero(num_positives > 0)
    few = rows[num_positives[rows] <= MOST_POSITIVES]
    # Most positives first: the queries of a block then have about as many positives.
    few = few[np.argsort(-num_positives[few], kind="stable")]
    ambiguous = np.zeros((len(combinations), len(num_positives)), bool)
    ambiguous[:, np.setdiff1d(rows, few)] = True
    scores = [Scores(*(np.zeros(len(num_positives)) for _ in Scores._fields)) for _ in combinations]
    if len(few):
        similarity = _similarity_of_positives(problem, combinations, few, watch)
        counts = _counts.count_before(problem, combinations, few, similarity, block_size, watch)
        for number in range(len(combinations)):
            of_combination = (similarity[number], counts[0][number], counts[1][number])
            counted, unclear = _score_counts(*of_combination, num_positives[few], ks)
            _assign(scores[number], few, counted)
            ambiguous[number, few[unclear]] = True
    _settle(problem, combinations, ambiguous, scores, watch)
    return rows, [Scores(*(values[rows] for values in part)) for part in scores]


def _settle(
    problem: Problem,
    combinations: Sequence[Combination],
    ambiguous: np.ndarray,
    scores: Sequence[Scores],
    watch: Watch,
) -> None:
    """Writes the scores of (C, Q) ambiguous queries, by float64 products."""
    rows = np.flatnonzero(ambiguous.any(axis=0))
    # Queries that are unclear in the same combinations come together, for few products.
    rows = rows[np.lexsort(ambiguous[:, rows])]
    num_items = len(problem.gallery_labels) * len(problem.levels)
    step = max(16, _FLOAT64_SIMILARITIES // num_items)
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        wanted = [number for number in range(len(combinations)) if ambiguous[number, part].any()]
        levels = _similarity_in_float64(
            problem, part, {level for number in wanted for level in combinations[number]}
        )
        for number in wanted:
            chosen = ambiguous[number, part]
            similarity = _mean(levels, combinations[number])[chosen]
            exact = _score_in_float64(problem, part[chosen], similarity)
            _assign(scores[number], part[chosen], exact)
        watch.tell("close ties", first + len(part), len(rows))


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


def _score_counts(
    similarity: np.ndarray,
    maybe_before: np.ndarray,
    surely_before: np.ndarray,
    num_positives: np.ndarray,
    ks: Iterable[int],
) -> tuple[Scores, np.ndarray]:
    """Scores queries by the counts of `_counts.count_before`.

    Args:
      similarity: (Q, M) similarities with their positives, descending, then -inf.
      maybe_before: (Q, M) counts of items that may be before a positive.
      surely_before: (Q, M) counts of those that surely are.
      num_positives: (Q,).
      ks: as for `score`.

    Returns:
      The scores, (Q,) each, and the (Q,) rows of the queries whose scores float32 cannot tell.
    """
    most: int = similarity.shape[1]
    # Half of _ABSENT: adding a count does not overflow.
    place = np.where(np.isfinite(similarity), np.arange(1, most + 1), _ABSENT // 2)
    worst = _scores_of_ranks(place + maybe_before, num_positives)
    best = _scores_of_ranks(place + surely_before, num_positives)
    unclear = worst.r_precision != best.r_precision
    unclear |= worst.average_precision != best.average_precision
    unclear |= 1 / best.first_rank - 1 / worst.first_rank > _MRR_EXACT_TO
    for k in ks:
        unclear |= (best.first_rank <= k) & (worst.first_rank > k)
    return worst, unclear


def _similarity_of_positives(
    problem: Problem, combinations: Sequence[Combination], rows: np.ndarray, watch: Watch
) -> np.ndarray:
    """Computes each query's similarities with its positives.

    Args:
      problem: the queries and the gallery.
      combinations: C combinations of levels.
      rows: (Q,) queries.
      watch: hears how far it is.

    Returns:
      (C, Q, M) float64 in descending order, with -inf behind a query's last positive. M is the
      most positives of a query.
    """
    most = int(problem.num_positives[rows].max())
    similarity = np.full((len(combinations), len(rows), most), -np.inf)
    # Largest class first: the queries of a part then have classes of about one size.
    order = np.argsort(-problem.class_size[rows], kind="stable")
    dim = max(level.gallery.shape[1] for level in problem.levels)
    first = 0
    while first < len(rows):
        largest_class = int(problem.class_size[rows[order[first]]])
        step = max(1, _FLOAT64_COMPONENTS // (largest_class * dim))
        part = order[first : first + step]
        levels, is_positive = _similarity_of_class(problem, rows[part], largest_class)
        columns = min(most, largest_class)
        for number, combination in enumerate(combinations):
            values = np.where(is_positive, _mean(levels, combination), -np.inf)
            similarity[number, part, :columns] = -np.sort(-values, axis=1)[:, :columns]
        first += len(part)
        watch.tell("positives", first, len(rows))
    return similarity


def _similarity_of_class(
    problem: Problem, rows: np.ndarray, largest_class: int
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Computes the similarities of queries with the items of their class.

    Returns:
      {level: (Q, largest_class) float64}, and whether each is a positive: those that a query
      leaves out are not, and places behind the end of its class are not.
    """
    place = np.arange(largest_class)
    is_positive = place < problem.class_size[rows][:, None]
    in_order = np.where(is_positive, problem.class_start[rows][:, None] + place, 0)
    members = problem.rows_by_class[in_order]
    is_positive &= ~problem.left_out(rows[:, None], members)
    levels: dict[int, np.ndarray] = {}
    for number, level in enumerate(problem.levels):
        items = level.unit_items(members.ravel()).reshape(*members.shape, -1)
        levels[number] = (items @ level.unit_queries(rows)[:, :, None])[:, :, 0]
    return levels, is_positive


def _similarity_in_float64(
    problem: Problem, rows: np.ndarray, levels: Iterable[int]
) -> dict[int, np.ndarray]:
    """Returns {level: (Q, N) float64 similarities of some queries with the gallery}."""
    found: dict[int, np.ndarray] = {}
    for number in levels:
        level = problem.levels[number]
        queries = level.unit_queries(rows)
        found[number] = similarity = np.empty((len(rows), len(level.gallery)))
        for first in range(0, len(level.gallery), _vectors.FLOAT64_ROWS):
            part = slice(first, first + _vectors.FLOAT64_ROWS)
            similarity[:, part] = queries @ level.unit_items(part).T
    return found


def _mean(levels: Mapping[int, np.ndarray], combination: Combination) -> np.ndarray:
    """Returns the mean of the similarities of a combination's levels."""
    first, *others = (levels[level] for level in combination)
    return functools.reduce(np.add, others, first) / len(combination)


def _score_in_float64(problem: Problem, rows: np.ndarray, similarity: np.ndarray) -> Scores:
    """Scores a few queries by their float64 similarities with the whole gallery.

    Only the negatives that may be before a positive are sorted.

    Args:
      problem: the queries and the gallery.
      rows: (Q,) queries.
      similarity: (Q, N) float64.
    """
    num_positives = problem.num_positives[rows]
    ranks = np.full((len(rows), num_positives.max()), _ABSENT)
    items = np.arange(len(problem.gallery_labels))
    for number, row in enumerate(rows):
        same_class = problem.gallery_labels == problem.query_labels[row]
        is_ranked = ~problem.left_out(row, items)
        ranks[number, : num_positives[number]] = _ranks_of_positives(
            similarity[number], same_class & is_ranked, ~same_class & is_ranked
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
