"""Retrieval scores from embeddings: arrays in, a dict of floats out.

The retrieval scores follow from the ranks of the positives alone, and a positive's rank is one more than the number of
gallery items before it: blocks of a matrix product, compares and counts (`rll_jax.metrics._ranks`), no sorting of the gallery.
"""

import numbers

import numpy as np

from rll_jax.metrics import _checks, _ranks

_BLOCK = 1024
_NEAREST_ROWS = 256


def retrieval_metrics(
    queries,
    query_labels,
    gallery=None,
    gallery_labels=None,
    *,
    ks=(1, 10, 100, 1000),
    block_size=None,
) -> dict[str, float]:
    """How well queries rank a gallery by cosine similarity.

    Args:
      queries: (Q, D) floating, finite, no zero vectors; any length, L2-normalised here.
      query_labels: (Q,) integers.
      gallery: (N, D) as the queries, or None: the queries rank each other, itself left out (Song et al. 2016).
      gallery_labels: (N,) integers, given with a gallery.
      ks: the K of Recall@K; a K beyond the gallery asks for all of it.
      block_size: rows and columns of a block of similarities, 1 to 32768; None for 1024. Memory is one block and two copies of
        the embeddings a device, and some 80 bytes for each query and place of the largest class, 64 at most. The scores do
        not depend on it, nor on the devices, which share the work.

    Returns:
      "recall@K" for each K: the share of queries whose K nearest hold one of its class, at least one.
      "r_precision", "map@r" (Musgrave et al. 2020, "A Metric Learning Reality Check"): with R the number of items of the
      query's class in the gallery, the share of the R nearest that are of it, and the mean over the places 1 to R of the
      precision there where the item is of it, else 0. "mrr": the mean of one over the rank of the nearest of its class.
      Each in [0, 1], a mean over the queries that have a match in the gallery.
      "queries_without_match": the number of the others.

    Ties count against the query: an item of another class exactly as similar as one of its own stands before it. Similarities
    are compared as float64 has them, equal where they agree to 1e-14; "mrr" is exact to 1e-6, all others in full.
    Queries with more than 64 positives, or in a set in which most similarities tie (a collapsed network), cost a float64
    product with the gallery on the CPU: minutes for 60,000 of them.

    Raises:
      ValueError: lengths or dimensions that differ, rows that are not finite or zero (which), an empty gallery, no query
        with a match, a K or a block_size out of range.
      TypeError: embeddings that are not floating, labels that are not integers or that no integer type holds together.
    """
    ks = tuple(ks)
    if not ks or not all(isinstance(k, numbers.Integral) and k >= 1 for k in ks):
        raise ValueError(f"ks must be integers of at least 1, found {ks}")
    rows, found = _score(queries, query_labels, gallery, gallery_labels, ks, block_size)
    scores = {f"recall@{k}": float(np.mean(found.first_rank <= k)) for k in ks}
    return scores | {
        "map@r": float(found.average_precision.mean()),
        "r_precision": float(found.r_precision.mean()),
        "mrr": float(np.mean(1 / found.first_rank)),
        "queries_without_match": len(queries) - len(rows),
    }


def scores_by_query(
    queries, query_labels, gallery=None, gallery_labels=None, *, block_size=None
) -> dict[str, np.ndarray]:
    """What `retrieval_metrics` takes the means of, for each query that has a match in the gallery; arguments as there.

    Returns:
      "query": (M,) rows of `queries`; and for each "first_rank", where the nearest of its class stands, from 1
      (exact as far as "mrr" is), "r_precision" and "average_precision".
    """
    rows, found = _score(queries, query_labels, gallery, gallery_labels, (1,), block_size)
    return {"query": rows} | found._asdict()


def _score(queries, query_labels, gallery, gallery_labels, ks, block_size):
    queries, query_labels = _checks.labelled_rows("queries", queries, "query_labels", query_labels)
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels go together: found one without the other")
    if gallery is not None:
        gallery, gallery_labels = _checks.labelled_rows(
            "gallery", gallery, "gallery_labels", gallery_labels
        )
        if gallery.shape[1] != queries.shape[1]:
            raise ValueError(
                f"queries have {queries.shape[1]} dimensions and gallery {gallery.shape[1]}: expected the same"
            )
    largest = max(len(queries), 0 if gallery is None else len(gallery))
    block_size = min(_BLOCK, largest) if block_size is None else block_size
    if not isinstance(block_size, numbers.Integral) or not 1 <= block_size <= 1 << 15:
        raise ValueError(f"block_size must be an integer from 1 to {1 << 15}, found {block_size}")
    problem = _ranks.make_problem(queries, query_labels, gallery, gallery_labels)
    rows, found = _ranks.score(problem, ks, int(min(block_size, largest)))
    if not len(rows):
        where = (
            "no class has two images" if gallery is None else "no query's class is in the gallery"
        )
        raise ValueError(f"{where}: there is nothing to retrieve")
    return rows, found


def nearest(queries, gallery, k: int, *, leave_out=None) -> tuple[np.ndarray, np.ndarray]:
    """The k items of a gallery most similar to each query by cosine, the most similar first; of equals the lower row first.

    Args:
      queries: (Q, D) floating.
      gallery: (N, D) floating.
      leave_out: (Q,) the row of the gallery that is each query itself, which is not returned; or None.

    Returns:
      (Q, k) rows of the gallery and (Q, k) float32 similarities.

    Raises:
      ValueError, TypeError: as `retrieval_metrics`, for a k that is not from 1 to N (N - 1 with `leave_out`), and for a `leave_out` of
        another shape or with rows that the gallery has not.
    """
    queries, gallery = (
        _checks.embedding_rows(name, x) for name, x in (("queries", queries), ("gallery", gallery))
    )
    most = len(gallery) - (leave_out is not None)
    if queries.shape[1] != gallery.shape[1] or not 1 <= k <= most:
        raise ValueError(
            f"queries {queries.shape}, gallery {gallery.shape}, k = {k}: expected (Q, D), (N, D) and k from 1 to {most}"
        )
    if leave_out is not None:
        leave_out = np.asarray(leave_out)
        if (
            leave_out.shape != queries.shape[:1]
            or not np.issubdtype(leave_out.dtype, np.integer)
            or not np.isin(leave_out, np.arange(len(gallery))).all()
        ):
            raise ValueError(
                f"leave_out must be ({len(queries)},) integers from 0 to {len(gallery) - 1}, found {leave_out.dtype} {leave_out.shape}"
            )
    queries, gallery = _ranks.unit_rows(queries), _ranks.unit_rows(gallery)
    rows, similarities = (
        np.empty((len(queries), k), np.int64),
        np.empty((len(queries), k), np.float32),
    )
    for first in range(0, len(queries), _NEAREST_ROWS):
        some = slice(first, first + _NEAREST_ROWS)
        similarity = queries[some] @ gallery.T
        if leave_out is not None:
            similarity[np.arange(len(similarity)), leave_out[some]] = -np.inf
        bound = np.partition(similarity, -k, axis=1)[:, -k]
        for n, (values, least) in enumerate(zip(similarity, bound), start=first):
            candidates = np.flatnonzero(values >= least)
            rows[n] = candidates[np.argsort(-values[candidates], kind="stable")][:k]
            similarities[n] = values[rows[n]]
    return rows, similarities
