"""Queries, the gallery that they rank, and where each class is in the gallery."""

from typing import NamedTuple

import numpy as np

from rll_jax.metrics import _vectors


class Problem(NamedTuple):
    """Q queries and a gallery of N items, both of D dimensions.

    Labels are dense: the classes of queries and gallery are numbered 0, 1, ...
    """

    queries: np.ndarray  # (Q, D) float32 or float64, of any length
    query_norms: np.ndarray  # (Q, 1) float64
    query_labels: np.ndarray  # (Q,) int32
    gallery: np.ndarray  # (N, D) float32 or float64, of any length
    gallery_norms: np.ndarray  # (N, 1) float64
    gallery_labels: np.ndarray  # (N,) int32
    leave_one_out: bool  # the gallery is the queries, and a query does not rank itself
    rows_by_class: np.ndarray  # (N,) the rows of the gallery, class by class
    class_start: np.ndarray  # (Q,) where the query's class begins in `rows_by_class`
    class_size: np.ndarray  # (Q,) items of the query's class; the query counts if it is one

    @property
    def num_positives(self) -> np.ndarray:
        """(Q,) the number of items of its class that a query ranks."""
        return self.class_size - self.leave_one_out


def make_problem(
    queries: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray | None,
    gallery_labels: np.ndarray | None,
) -> Problem:
    """Returns the problem of queries that rank a gallery, or each other.

    Args:
      queries: (Q, D) float32 or float64, no zero vectors.
      query_labels: (Q,) integers.
      gallery: (N, D) as the queries, or None: the queries rank each other.
      gallery_labels: (N,) integers, or None with a gallery of None.

    Raises:
      TypeError: no integer type holds the labels of both.
    """
    leave_one_out = gallery is None or gallery_labels is None
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = queries, query_labels
    if not np.issubdtype(np.result_type(query_labels, gallery_labels), np.integer):
        raise TypeError(
            f"query_labels and gallery_labels are {query_labels.dtype} and {gallery_labels.dtype}: "
            "no integer type holds both"
        )
    classes, dense = np.unique(np.concatenate([query_labels, gallery_labels]), return_inverse=True)
    query_labels = dense[: len(queries)].astype(np.int32)
    gallery_labels = dense[len(queries) :].astype(np.int32)
    sizes = np.bincount(gallery_labels, minlength=len(classes))
    starts = np.cumsum(sizes) - sizes
    gallery_norms = _vectors.row_norms(gallery)
    return Problem(
        queries=queries,
        query_norms=gallery_norms if leave_one_out else _vectors.row_norms(queries),
        query_labels=query_labels,
        gallery=gallery,
        gallery_norms=gallery_norms,
        gallery_labels=gallery_labels,
        leave_one_out=leave_one_out,
        rows_by_class=np.argsort(gallery_labels, kind="stable"),
        class_start=starts[query_labels],
        class_size=sizes[query_labels],
    )
