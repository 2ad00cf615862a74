"""The exact ranks of each query's positives in a gallery, and the scores that follow from them.

A positive's rank is one more than the number of items before it. Two steps find it, and neither
sorts the gallery:

1. `rll_jax.metrics._counts` counts, with float32 products on all devices, the items that are surely
   more similar than a positive, and the items that may be. The last bits of a float32 product
   depend on the backend, on the block, and on the place in the block. The two counts allow for
   that.
2. A query whose scores differ between the two counts is ranked again on the CPU, with float64
   where float32 cannot tell (`rll_jax.metrics._settle`).

So the scores depend on neither the backend nor the blocks.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from rll_jax.metrics import _counts, _scores
from rll_jax.metrics._problem import Problem
from rll_jax.metrics._progress import Watch
from rll_jax.metrics._scores import Scores
from rll_jax.metrics._settle import settle
from rll_jax.metrics._tiles import Combination

MOST_POSITIVES = 64  # a query with more is ranked in float64 at once
_MRR_EXACT_TO = 1e-6
_SIMILARITIES = 1 << 20  # similarities with items of the class that are held at once


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
            _scores.assign(scores[number], few, counted)
            ambiguous[number, few[unclear]] = True
    settle(problem, combinations, ambiguous, scores, watch)
    return rows, [Scores(*(values[rows] for values in part)) for part in scores]


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
    # Half of _scores.ABSENT: adding a count does not overflow.
    place = np.where(np.isfinite(similarity), np.arange(1, most + 1), _scores.ABSENT // 2)
    worst = _scores.scores_of_ranks(place + maybe_before, num_positives)
    best = _scores.scores_of_ranks(place + surely_before, num_positives)
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
    # Largest class first: the queries of a part then have classes of about one size. And class by
    # class: each is one product.
    order = np.lexsort((problem.query_labels[rows], -problem.class_size[rows]))
    first = 0
    while first < len(rows):
        largest_class = int(problem.class_size[rows[order[first]]])
        step = max(1, _SIMILARITIES // largest_class)
        part = order[first : first + step]
        levels, is_positive = _scores.similarity_of_class(problem, rows[part], largest_class)
        columns = min(most, largest_class)
        for number, combination in enumerate(combinations):
            values = np.where(is_positive, _scores.mean(levels, combination), -np.inf)
            similarity[number, part, :columns] = -np.sort(-values, axis=1)[:, :columns]
        first += len(part)
        watch.tell("positives", first, len(rows))
    return similarity
