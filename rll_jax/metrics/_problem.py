"""Queries, the gallery that they rank, and which of its items each query leaves out."""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from rll_jax.metrics import _vectors


class Side(NamedTuple):
    """The queries, or the gallery, as they were given and checked.

    Attributes:
      levels: one or more (N, D) float32 or float64 embeddings of the same N items.
      labels: (N,) integers.
      ids: (N,) integers or text, or None.
      groups: (N,) integers or text, or None.
    """

    levels: tuple[np.ndarray, ...]
    labels: np.ndarray
    ids: np.ndarray | None = None
    groups: np.ndarray | None = None


class Level(NamedTuple):
    """One embedding of the queries and of the gallery, of D dimensions."""

    queries: np.ndarray  # (Q, D) float32 or float64, of any length
    query_norms: np.ndarray  # (Q, 1) float64
    gallery: np.ndarray  # (N, D) float32 or float64, of any length
    gallery_norms: np.ndarray  # (N, 1) float64

    def unit_queries(self, rows: np.ndarray) -> np.ndarray:
        """Returns the float64 queries of some rows, of length 1."""
        return self.queries[rows] / self.query_norms[rows]

    def unit_items(self, rows: np.ndarray | slice) -> np.ndarray:
        """Returns the float64 items of some rows of the gallery, of length 1."""
        return self.gallery[rows] / self.gallery_norms[rows]


class Problem(NamedTuple):
    """Q queries and a gallery of N items.

    Labels and codes are dense: the classes of queries and gallery are numbered 0, 1, ... A query
    leaves out the items that share one of its K codes: those of its id, those of its group.
    """

    levels: tuple[Level, ...]
    query_labels: np.ndarray  # (Q,) int32
    gallery_labels: np.ndarray  # (N,) int32
    symmetric: bool  # the gallery is the queries
    query_codes: np.ndarray  # (K, Q) int32
    gallery_codes: np.ndarray  # (K, N) int32
    mixed_codes: tuple[int, ...]  # of the K: those of which a value occurs in several classes
    rows_by_class: np.ndarray  # (N,) the rows of the gallery, class by class
    class_start: np.ndarray  # (Q,) where the query's class begins in `rows_by_class`
    class_size: np.ndarray  # (Q,) items of the query's class, those left out among them
    num_positives: np.ndarray  # (Q,) items of the query's class that are not left out

    def left_out(self, queries: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Returns whether queries leave items out; both are rows, of shapes that broadcast."""
        shape = np.broadcast_shapes(queries.shape, items.shape)
        out = np.zeros(shape, bool)
        for query_code, gallery_code in zip(self.query_codes, self.gallery_codes, strict=True):
            out |= query_code[queries] == gallery_code[items]
        return out


def make_problem(queries: Side, gallery: Side | None) -> Problem:
    """Returns the problem of queries that rank a gallery, or each other where it is None.

    Raises:
      TypeError: no type holds the labels, ids or groups of both.
    """
    symmetric = gallery is None
    items = queries if gallery is None else gallery
    labels = dense("labels", queries.labels, items.labels)
    codes = _codes(queries, items)
    sizes = np.bincount(labels.items, minlength=labels.number)
    starts = np.cumsum(sizes) - sizes
    class_size = sizes[labels.queries]
    return Problem(
        levels=tuple(
            _make_level(*pair, symmetric) for pair in zip(queries.levels, items.levels, strict=True)
        ),
        query_labels=labels.queries,
        gallery_labels=labels.items,
        symmetric=symmetric,
        query_codes=np.array([code.queries for code in codes], np.int32).reshape(
            len(codes), len(labels.queries)
        ),
        gallery_codes=np.array([code.items for code in codes], np.int32).reshape(
            len(codes), len(labels.items)
        ),
        mixed_codes=tuple(
            number
            for number, code in enumerate(codes)
            if _joined(labels, code).number > code.number
        ),
        rows_by_class=np.argsort(labels.items, kind="stable"),
        class_start=starts[labels.queries],
        class_size=class_size,
        num_positives=class_size - _num_left_out(labels, codes),
    )


def _make_level(queries: np.ndarray, items: np.ndarray, symmetric: bool) -> Level:
    norms = _vectors.row_norms(items)
    return Level(queries, norms if symmetric else _vectors.row_norms(queries), items, norms)


class Values(NamedTuple):
    """A value of each query and item, numbered densely from 0."""

    queries: np.ndarray  # (Q,) int32
    items: np.ndarray  # (N,) int32; the very array `queries` where the queries are the gallery
    number: int  # of distinct values


def dense(name: str, of_queries: np.ndarray, of_items: np.ndarray) -> Values:
    """Numbers the values of queries and items."""
    if of_queries is of_items:
        values, numbers = np.unique(of_items, return_inverse=True)
        numbers = numbers.astype(np.int32)
        return Values(numbers, numbers, len(values))
    kinds = {
        "i" if array.dtype.kind in "iu" else array.dtype.kind for array in (of_queries, of_items)
    }
    if len(kinds) > 1 or np.result_type(of_queries, of_items).kind == "f":
        raise TypeError(
            f"query_{name} and gallery_{name} are {of_queries.dtype} and {of_items.dtype}: no "
            f"{'integer ' if kinds == {'i'} else ''}type holds both"
        )
    values, numbers = np.unique(np.concatenate([of_queries, of_items]), return_inverse=True)
    numbers = numbers.astype(np.int32)
    return Values(numbers[: len(of_queries)], numbers[len(of_queries) :], len(values))


def _codes(queries: Side, items: Side) -> list[Values]:
    """Returns the values whose bearers leave each other out: ids, and groups."""
    codes: list[Values] = []
    if queries.ids is not None and items.ids is not None:
        codes.append(dense("ids", queries.ids, items.ids))
    elif queries is items:
        rows = np.arange(len(queries.labels), dtype=np.int32)
        codes.append(Values(rows, rows, len(rows)))
    if queries.groups is not None and items.groups is not None:
        codes.append(dense("groups", queries.groups, items.groups))
    return codes


def _joined(first: Values, second: Values) -> Values:
    """Numbers the pairs of two values."""
    queries, items = (
        a.astype(np.int64) * second.number + b
        for a, b in ((first.queries, second.queries), (first.items, second.items))
    )
    both_same = first.queries is first.items and second.queries is second.items
    return dense("pairs", items if both_same else queries, items)


def _num_left_out(labels: Values, codes: list[Values]) -> np.ndarray:
    """Counts, for each query, the items of its class that share one of its codes."""
    total = np.zeros(len(labels.queries), np.int64)
    for size in range(1, len(codes) + 1):
        for some in itertools.combinations(codes, size):
            shared = functools.reduce(_joined, some, labels)
            counts = np.bincount(shared.items, minlength=shared.number)
            total += (-1) ** (size + 1) * counts[shared.queries]
    return total
