"""The scores that follow from ranks, and the similarities of queries with their class."""

from collections.abc import Iterable, Mapping
import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rll_jax.metrics._problem import Problem
from rll_jax.metrics._tiles import Combination

ABSENT = np.iinfo(np.int64).max  # the rank that fills a row behind a query's last positive


class Scores(NamedTuple):
    """One value for each query."""

    first_rank: np.ndarray
    r_precision: np.ndarray
    average_precision: np.ndarray


def assign(scores: Scores, rows: np.ndarray, part: Scores) -> None:
    """Writes the scores of some rows into the scores of all."""
    for values, values_of_rows in zip(scores, part, strict=True):
        values[rows] = values_of_rows


def scores_of_ranks(ranks: np.ndarray, num_positives: np.ndarray) -> Scores:
    """Computes scores from the ranks of the positives.

    Args:
      ranks: (Q, M) in ascending order. Behind a query's last positive they are at least
        `ABSENT // 2`.
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


def by_name(by_query: Mapping[str, npt.ArrayLike], ks: Iterable[int]) -> dict[str, np.ndarray]:
    """Returns {score: (M,) float64, what each query adds to the mean}.

    Args:
      by_query: of `scores_by_query`.
      ks: the K of Recall@K.
    """
    first_rank = np.asarray(by_query["first_rank"], np.float64)
    recalls = {f"recall@{k}": (first_rank <= k).astype(np.float64) for k in ks}
    return recalls | {
        "map@r": np.asarray(by_query["average_precision"], np.float64),
        "r_precision": np.asarray(by_query["r_precision"], np.float64),
        "mrr": 1 / first_rank,
    }


def similarity_of_class(
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
    levels = {number: np.zeros(members.shape) for number in range(len(problem.levels))}
    by_class = np.argsort(problem.query_labels[rows], kind="stable")
    labels = problem.query_labels[rows[by_class]]
    # One product for each class: its items are converted to float64 once for these queries.
    for queries in np.split(by_class, np.flatnonzero(np.diff(labels)) + 1):
        size = problem.class_size[rows[queries[0]]]
        items = members[queries[0], :size]
        for number, level in enumerate(problem.levels):
            product = level.unit_queries(rows[queries]) @ level.unit_items(items).T
            levels[number][queries, :size] = product
    return levels, is_positive


def mean(levels: Mapping[int, np.ndarray], combination: Combination) -> np.ndarray:
    """Returns the mean of the similarities of a combination's levels."""
    first, *others = (levels[level] for level in combination)
    return functools.reduce(np.add, others, first) / len(combination)
