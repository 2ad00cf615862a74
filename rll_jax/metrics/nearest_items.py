"""The items of a gallery that are nearest to queries."""

import jax
import numpy as np
import numpy.typing as npt

from rll_jax.metrics import _checks, _problem, _vectors

_NEAREST_QUERIES = 256  # queries whose similarities `nearest` holds at once


def nearest(
    queries: jax.Array | np.ndarray,
    gallery: jax.Array | np.ndarray,
    k: int,
    *,
    leave_out: npt.ArrayLike | None = None,
    query_ids: npt.ArrayLike | None = None,
    gallery_ids: npt.ArrayLike | None = None,
    query_groups: npt.ArrayLike | None = None,
    gallery_groups: npt.ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k items of a gallery that are most similar to each query by cosine.

    Args:
      queries: (Q, D) floating, finite, no zero vectors.
      gallery: (N, D) as the queries.
      k: the number of items, from 1 to N, or to N - 1 with `leave_out`.
      leave_out: (Q,) integers: for each query the row of the gallery that is the query itself. It
        comes behind all others, as those of `query_ids`. None leaves no row out.
      query_ids: (Q,) integers or text; items of the query's own id are left out too, as by
        `retrieval_metrics`. They come behind all others, with a similarity of -inf, where fewer
        than k others are there.
      gallery_ids: (N,) as `query_ids`.
      query_groups: (Q,) integers or text; items of the query's own group are left out in the same
        way.
      gallery_groups: (N,) as `query_groups`.

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
    codes = [
        _checked_codes(name, of_queries, of_gallery, len(queries), len(gallery))
        for name, of_queries, of_gallery in (
            ("ids", query_ids, gallery_ids),
            ("groups", query_groups, gallery_groups),
        )
    ]
    queries, gallery = _vectors.unit_rows(queries), _vectors.unit_rows(gallery)
    rows = np.empty((len(queries), k), np.int64)
    similarities = np.empty((len(queries), k), np.float32)
    for first in range(0, len(queries), _NEAREST_QUERIES):
        part = slice(first, first + _NEAREST_QUERIES)
        similarity = queries[part] @ gallery.T
        if left_out is not None:
            similarity[np.arange(len(similarity)), left_out[part]] = -np.inf
        for of_queries, of_gallery in filter(None, codes):
            similarity[of_queries[part, None] == of_gallery] = -np.inf
        rows[part] = _largest_columns(similarity, k)
        similarities[part] = np.take_along_axis(similarity, rows[part], axis=1)
    return rows, similarities


def _checked_codes(
    name: str,
    of_queries: npt.ArrayLike | None,
    of_gallery: npt.ArrayLike | None,
    num_queries: int,
    num_items: int,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the ids or groups of queries and gallery as numbers, or None where there are none."""
    queries = _checks.codes(f"query_{name}", of_queries, num_queries)
    gallery = _checks.codes(f"gallery_{name}", of_gallery, num_items)
    _checks.check_both_or_none(name, queries, gallery)
    if queries is None or gallery is None:
        return None
    numbers = _problem.dense(name, queries, gallery)
    return numbers.queries, numbers.items


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
