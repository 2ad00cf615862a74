"""Retrieval scores from embeddings and labels: arrays in, a dict of floats out.

The scores follow from the ranks of each query's positives, and `rll_jax.metrics._ranks` finds these
ranks with blocks of a matrix product, comparisons and counts. It does not sort the gallery.
"""

from collections.abc import Iterable
import numbers

import jax
import numpy as np
import numpy.typing as npt

from rll_jax._jaxlib_fault import warn_of_wrong_sums
from rll_jax.metrics import _checks, _problem, _ranks, _vectors

_BLOCK_SIZE = 1024
_MAX_BLOCK_SIZE = 1 << 15
_NEAREST_QUERIES = 256  # queries whose similarities `nearest` holds at once


def retrieval_metrics(
    queries: jax.Array | np.ndarray,
    query_labels: jax.Array | np.ndarray,
    gallery: jax.Array | np.ndarray | None = None,
    gallery_labels: jax.Array | np.ndarray | None = None,
    *,
    ks: Iterable[int] = (1, 10, 100, 1000),
    block_size: int | None = None,
) -> dict[str, float]:
    """Scores how well queries rank a gallery by cosine similarity.

    Ties count against the query: an item of another class that is exactly as similar as an item of
    the query's class is ranked before it. Similarities are compared in float64 and are equal where
    they agree to 1e-14. "mrr" is exact to 1e-6, all other scores are exact. The scores depend
    neither on the block size nor on the devices, which share the work.

    A query with more than 64 positives costs a float64 product with the gallery on the CPU, and so
    does every query where most similarities tie, as those of a collapsed network do: minutes for
    60,000 of them.

    Args:
      queries: (Q, D) floating, finite, no zero vectors. They may have any length: the function
        normalises them.
      query_labels: (Q,) integers.
      gallery: (N, D) as the queries, or None: the queries rank each other, and each query leaves
        itself out (Song et al. 2016).
      gallery_labels: (N,) integers. A gallery needs them.
      ks: the K of Recall@K, at least one. A K larger than the gallery asks for all of it.
      block_size: the rows and columns of a block of similarities, from 1 to 32768. None means 1024.
        Each device needs memory for one block and two copies of the embeddings. The process needs
        about 80 bytes for each query and each item of the largest class, of which at most 64
        count.

    Returns:
      The scores, each in [0, 1] and a mean over the queries that have a match in the gallery. R is
      the number of items of a query's class in the gallery.
      "recall@K", for each K: the share of queries with an item of their class among the K nearest.
      "r_precision": the share of the R nearest items that are of the query's class.
      "map@r": the mean over the ranks 1 to R of the precision at that rank, taken as 0 where the
      item is of another class. (Both: Musgrave et al. 2020, "A Metric Learning Reality Check".)
      "mrr": the mean of 1 / (rank of the nearest item of the query's class).
      And "queries_without_match": the number of queries without an item of their class in the
      gallery. They have no part in the scores.

    Raises:
      ValueError: lengths or dimensions differ, rows are not finite or zero (the message says
        which), the gallery is empty, no query has a match, only one of gallery and gallery_labels
        is there, or a K or block_size is out of range.
      TypeError: embeddings are not floating, labels are not integers, or no integer type holds the
        labels of both queries and gallery.
    """
    ks = tuple(ks)
    if not ks or not all(isinstance(k, numbers.Integral) and k >= 1 for k in ks):
        raise ValueError(f"ks must be integers of at least 1, found {ks}")
    rows, scores = _score(queries, query_labels, gallery, gallery_labels, ks, block_size)
    recalls = {f"recall@{k}": float(np.mean(scores.first_rank <= k)) for k in ks}
    return recalls | {
        "map@r": float(scores.average_precision.mean()),
        "r_precision": float(scores.r_precision.mean()),
        "mrr": float(np.mean(1 / scores.first_rank)),
        "queries_without_match": len(queries) - len(rows),
    }


def scores_by_query(
    queries: jax.Array | np.ndarray,
    query_labels: jax.Array | np.ndarray,
    gallery: jax.Array | np.ndarray | None = None,
    gallery_labels: jax.Array | np.ndarray | None = None,
    *,
    block_size: int | None = None,
) -> dict[str, np.ndarray]:
    """Returns the values whose means `retrieval_metrics` returns, one for each query.

    Arguments and errors are those of `retrieval_metrics`.

    Returns:
      Arrays over the M queries that have a match in the gallery. "query": (M,) their rows in
      `queries`. "first_rank": (M,) the rank of the nearest item of the query's class, from 1; its
      reciprocal is exact to 1e-6. "r_precision" and "average_precision": (M,), the mean of the
      latter is "map@r".
    """
    rows, scores = _score(queries, query_labels, gallery, gallery_labels, (1,), block_size)
    return {"query": rows} | scores._asdict()


def _score(
    queries: jax.Array | np.ndarray,
    query_labels: jax.Array | np.ndarray,
    gallery: jax.Array | np.ndarray | None,
    gallery_labels: jax.Array | np.ndarray | None,
    ks: tuple[int, ...],
    block_size: int | None,
) -> tuple[np.ndarray, _ranks.Scores]:
    """Checks the arguments and returns the rows of the queries with a match and their scores."""
    queries, query_labels = _checks.labelled_rows("queries", queries, "query_labels", query_labels)
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels go together: found one without the other")
    items = item_labels = None
    if gallery is not None and gallery_labels is not None:
        items, item_labels = _checks.labelled_rows(
            "gallery", gallery, "gallery_labels", gallery_labels
        )
        if items.shape[1] != queries.shape[1]:
            raise ValueError(
                f"queries have {queries.shape[1]} dimensions and gallery {items.shape[1]}: "
                "expected the same"
            )
    largest = max(len(queries), 0 if items is None else len(items))
    if block_size is None:
        block_size = _BLOCK_SIZE
    if not isinstance(block_size, numbers.Integral) or not 1 <= block_size <= _MAX_BLOCK_SIZE:
        raise ValueError(
            f"block_size must be an integer from 1 to {_MAX_BLOCK_SIZE}, found {block_size}"
        )
    warn_of_wrong_sums()
    problem = _problem.make_problem(queries, query_labels, items, item_labels)
    rows, scores = _ranks.score(problem, ks, int(min(block_size, largest)))
    if not len(rows):
        reason = "no query's class is in the gallery"
        if gallery is None:
            reason = "no class has two images"
        raise ValueError(f"{reason}: there is nothing to retrieve")
    return rows, scores


def nearest(
    queries: jax.Array | np.ndarray,
    gallery: jax.Array | np.ndarray,
    k: int,
    *,
    leave_out: npt.ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k items of a gallery that are most similar to each query by cosine.

    Args:
      queries: (Q, D) floating, finite, no zero vectors.
      gallery: (N, D) as the queries.
      k: the number of items, from 1 to N, or to N - 1 with `leave_out`.
      leave_out: (Q,) integers: for each query the row of the gallery that is the query itself,
        which is not returned. None leaves no row out.

    Returns:
      (Q, k) int64 rows of the gallery, the most similar first, and their (Q, k) float32
      similarities. Of items with equal float32 similarity the lower row comes first.

    Raises:
      ValueError: as `retrieval_metrics`; k is out of range; `leave_out` has another shape or type,
        or rows that the gallery does not have.
      TypeError: as `retrieval_metrics`.
    """
    queries = _checks.embedding_rows("queries", queries)
    gallery = _checks.embedding_rows("gallery", gallery)
    most = len(gallery) - (leave_out is not None)
    if queries.shape[1] != gallery.shape[1] or not 1 <= k <= most:
        raise ValueError(
            f"queries {queries.shape}, gallery {gallery.shape}, k = {k}: expected (Q, D), (N, D) "
            f"and k from 1 to {most}"
        )
    left_out = None
    if leave_out is not None:
        left_out = _checked_leave_out(np.asarray(leave_out), len(queries), len(gallery))
    queries, gallery = _vectors.unit_rows(queries), _vectors.unit_rows(gallery)
    rows = np.empty((len(queries), k), np.int64)
    similarities = np.empty((len(queries), k), np.float32)
    for first in range(0, len(queries), _NEAREST_QUERIES):
        part = slice(first, first + _NEAREST_QUERIES)
        similarity = queries[part] @ gallery.T
        if left_out is not None:
            similarity[np.arange(len(similarity)), left_out[part]] = -np.inf
        rows[part] = _largest_columns(similarity, k)
        similarities[part] = np.take_along_axis(similarity, rows[part], axis=1)
    return rows, similarities


def _checked_leave_out(leave_out: np.ndarray, num_queries: int, num_items: int) -> np.ndarray:
    """Returns `leave_out`, or raises ValueError unless it has a row of the gallery per query."""
    if (
        leave_out.shape != (num_queries,)
        or not np.issubdtype(leave_out.dtype, np.integer)
        or not np.isin(leave_out, np.arange(num_items)).all()
    ):
        raise ValueError(
            f"leave_out must be ({num_queries},) integers from 0 to {num_items - 1}, "
            f"found {leave_out.dtype} {leave_out.shape}"
        )
    return leave_out


def _largest_columns(values: np.ndarray, k: int) -> np.ndarray:
    """Returns the (Q, k) columns of the k largest of (Q, N) values, the largest first.

    Of equal values the lower column comes first.
    """
    columns = np.empty((len(values), k), np.int64)
    kth_largest = np.partition(values, -k, axis=1)[:, -k]
    for number, row in enumerate(values):
        candidates = np.flatnonzero(row >= kth_largest[number])
        columns[number] = candidates[np.argsort(-row[candidates], kind="stable")][:k]
    return columns
