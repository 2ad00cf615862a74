"""Settles in float64 what float32 products cannot tell: the ranks of a few queries' positives.

A query's similarities with the gallery are computed in float32 again. Those so near to a positive
that float32 cannot tell which is larger are computed in float64. Where these are many, as where
most similarities tie, all of them are.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from rll_jax.metrics import _scores, _vectors
from rll_jax.metrics._problem import Problem
from rll_jax.metrics._progress import Watch
from rll_jax.metrics._scores import Scores
from rll_jax.metrics._tiles import Combination, band_of_sum

TIE = 1e-13  # similarities this close, in float64, are equal; products of 5,000 err by 2e-14
_SIMILARITIES = 1 << 24  # similarities that are held at once
_MOST_NEAR = 16  # more than a 16th of the gallery near to positives: all in float64


def settle(
    problem: Problem,
    combinations: Sequence[Combination],
    ambiguous: np.ndarray,
    scores: Sequence[Scores],
    watch: Watch,
) -> None:
    """Writes the scores of (C, Q) ambiguous queries.

    Args:
      problem: the queries and the gallery.
      combinations: the C combinations of levels.
      ambiguous: (C, Q) bool.
      scores: of each combination, (Q,) each; those of the ambiguous queries are written.
      watch: hears how far it is.
    """
    rows = np.flatnonzero(ambiguous.any(axis=0))
    if not len(rows):
        return
    # Queries that are unclear in the same combinations come together, for few products.
    rows = rows[np.lexsort(ambiguous[:, rows])]
    nearly = _Nearly(problem)
    step = max(16, _SIMILARITIES // (len(problem.gallery_labels) * len(problem.levels)))
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        wanted = [number for number in range(len(combinations)) if ambiguous[number, part].any()]
        levels = nearly.similarity(part, {i for number in wanted for i in combinations[number]})
        positives, is_positive = _scores.similarity_of_class(
            problem, part, int(problem.class_size[part].max())
        )
        for number in wanted:
            combination = combinations[number]
            float32 = _scores.mean(levels, combination)
            float64 = _scores.mean(positives, combination)
            hard: list[int] = []
            for place in np.flatnonzero(ambiguous[number, part]):
                exact = np.sort(float64[place][is_positive[place]])
                ranks = nearly.ranks(part[place], float32[place], exact, combination)
                if ranks is None:
                    hard.append(part[place])
                    continue
                one = part[place : place + 1]
                found = _scores.scores_of_ranks(ranks[None], problem.num_positives[one])
                _scores.assign(scores[number], one, found)
            if hard:
                few = np.array(hard)
                _scores.assign(scores[number], few, _score_in_float64(problem, few, combination))
        watch.tell("close ties", first + len(part), len(rows))


class _Nearly:
    """Similarities in float32, made exact where that decides ranks."""

    def __init__(self, problem: Problem) -> None:
        """Rotates the gallery, as `_vectors.rotation_and_band` says why."""
        self._problem = problem
        self._rotations: list[np.ndarray] = []
        self._bands: list[float] = []
        for level in problem.levels:
            rotation, band = _vectors.rotation_and_band(level.gallery.shape[1])
            self._rotations.append(rotation)
            self._bands.append(band)
        self._gallery = [
            _vectors.unit_rows(level.gallery, level.gallery_norms, rotation)
            for level, rotation in zip(problem.levels, self._rotations, strict=True)
        ]

    def similarity(self, rows: np.ndarray, levels: Iterable[int]) -> dict[int, np.ndarray]:
        """Returns {level: (Q, N) float32 similarities of some queries with the gallery}."""
        found: dict[int, np.ndarray] = {}
        for number in levels:
            level = self._problem.levels[number]
            queries = _vectors.unit_rows(
                level.queries, level.query_norms, self._rotations[number], rows
            )
            found[number] = queries @ self._gallery[number].T
        return found

    def ranks(
        self, row: int, similarity: np.ndarray, positives: np.ndarray, combination: Combination
    ) -> np.ndarray | None:
        """Returns the ascending ranks of one query's positives.

        Args:
          row: the query.
          similarity: (N,) float32.
          positives: (R,) float64 similarities of the positives, ascending.
          combination: the levels whose mean the similarities are.

        Returns:
          (R,) ranks, or None where too many items are too near to positives. A rank above R may be
          too small, but stays above R, unless it is the first.
        """
        band = band_of_sum(self._bands, combination) / len(combination)
        items = self._negatives(row, similarity >= positives[-1] - band)
        if (similarity[items] > positives[-1] + band).sum() < len(positives):
            items = self._negatives(row, similarity >= positives[0] - band)
        # Else R negatives are before the first positive: no score needs the ranks of the others.
        values = similarity[items].astype(np.float64)
        # Near is an item with a positive within a band of it, on either side.
        below = np.searchsorted(positives, values - band)
        near = np.flatnonzero(below < np.searchsorted(positives, values + band, side="right"))
        if _MOST_NEAR * len(near) > len(similarity):
            return None
        if len(near):
            exact = {level: self._exact(row, items[near], level) for level in combination}
            values[near] = _scores.mean(exact, combination)
        return _ranks_among(positives[::-1], values)

    def _negatives(self, row: int, are_near: np.ndarray) -> np.ndarray:
        """Returns the items of other classes, not left out, among those that are near."""
        items = np.flatnonzero(are_near)
        items = items[self._problem.gallery_labels[items] != self._problem.query_labels[row]]
        return items[~self._problem.left_out(np.asarray(row), items)]

    def _exact(self, row: int, items: np.ndarray, number: int) -> np.ndarray:
        level = self._problem.levels[number]
        return level.unit_items(items) @ level.unit_queries(np.array([row]))[0]


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


def _score_in_float64(problem: Problem, rows: np.ndarray, combination: Combination) -> Scores:
    """Scores a few queries by float64 products with the whole gallery.

    Only the negatives that may be before a positive are sorted.

    Args:
      problem: the queries and the gallery.
      rows: (Q,) queries.
      combination: the levels whose mean similarity ranks.
    """
    levels = _similarity_in_float64(problem, rows, combination)
    similarity = _scores.mean(levels, combination)
    num_positives = problem.num_positives[rows]
    ranks = np.full((len(rows), num_positives.max()), _scores.ABSENT)
    items = np.arange(len(problem.gallery_labels))
    for number, row in enumerate(rows):
        same_class = problem.gallery_labels == problem.query_labels[row]
        is_ranked = ~problem.left_out(row, items)
        ranks[number, : num_positives[number]] = _ranks_of_positives(
            similarity[number], same_class & is_ranked, ~same_class & is_ranked
        )
    return _scores.scores_of_ranks(ranks, num_positives)


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
    negatives = similarity[is_negative & (similarity >= positives[-1] - TIE)]
    return _ranks_among(positives, negatives)


def _ranks_among(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Returns the ascending ranks of (R,) descending positives among negatives in any order."""
    negatives = np.sort(negatives)
    before = len(negatives) - np.searchsorted(negatives, positives - TIE)
    return before + np.arange(1, len(positives) + 1)
