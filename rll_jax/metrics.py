"""Retrieval scores from embeddings: pure functions of arrays.

All follow from the ranks of the positives, and a positive's rank is one more than the number of gallery items that are at
least as similar and of another class, or more similar and of its own. Nothing is sorted but each query's few positives.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
import numpy as np

_BLOCK = 512


def retrieval_metrics(embeddings, labels, *, ks=(1, 2, 4, 8)) -> dict[str, float]:
    """Scores of the embeddings as queries that rank each other by cosine, itself left out (Song et al. 2016).

    Args:
      embeddings: (N, D) floating, finite; they are L2-normalised here.
      labels: (N,) integers.
      ks: the K of Recall@K.

    Returns:
      "recall@K" for each K: the share of queries whose K nearest hold one of its class, at least one. "r_precision" and
      "map@r" (Musgrave et al. 2020): with R the number of the query's positives, the share of positives in the R nearest,
      and the mean over the places 1 to R of the precision there where a positive stands, else 0. Each in [0, 1].
      "queries_without_match": queries alone in their class; they are left out of the means.

    Ties count against the query: an item of another class that is as similar as a positive stands before it.

    Raises:
      ValueError: lengths that differ, rows that are not finite or zero, no class with two images, a K below 1.
    """
    embeddings, labels = np.asarray(embeddings, np.float32), np.asarray(labels)
    _check(embeddings, labels, ks)
    embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    order = np.argsort(labels, kind="stable")  # classes side by side: a query's positives are one short run
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    embeddings, n = embeddings[order], len(labels)
    start, size = np.repeat(starts, counts), np.repeat(counts, counts)
    ranks = []  # (queries, largest class): each positive's rank, largest int for the missing ones
    for first in range(0, n, _BLOCK):
        rows = np.arange(first, first + _BLOCK).clip(max=n - 1)  # one shape, so that XLA compiles once
        block = _ranks(embeddings[rows], embeddings, rows, start[rows], size[rows], largest=int(counts.max()))
        ranks.append(np.sort(block, axis=1)[: n - first])
    ranks, positives = np.concatenate(ranks), size - 1
    queries = positives > 0
    ranks, positives = ranks[queries], positives[queries]
    scores = {f"recall@{k}": float(np.mean(ranks[:, 0] <= k)) for k in ks}
    within = ranks <= positives[:, None]
    precision = np.arange(1, ranks.shape[1] + 1) / ranks
    scores["r_precision"] = float(np.mean(within.sum(1) / positives))
    scores["map@r"] = float(np.mean(np.where(within, precision, 0).sum(1) / positives))
    return scores | {"queries_without_match": int(n - queries.sum())}


@functools.partial(jax.jit, static_argnames="largest")
def _ranks(queries, gallery, row, start, size, *, largest):
    similarity = jnp.matmul(queries, gallery.T, precision=lax.Precision.HIGHEST)
    places = start[:, None] + jnp.arange(largest)
    there = (jnp.arange(largest) < size[:, None]) & (places != row[:, None])
    # taken out of the same product, so that no positive is compared with another rounding of itself
    of_positives = jnp.take_along_axis(similarity, jnp.minimum(places, gallery.shape[0] - 1), axis=1)
    column = jnp.arange(gallery.shape[0])
    other = (column < start[:, None]) | (column >= (start + size)[:, None])
    against = jnp.where(other, similarity, -jnp.inf)
    before = lax.map(lambda s: jnp.sum(against >= s[:, None], axis=1, dtype=jnp.int32), of_positives.T).T
    own = jnp.where(there, of_positives, -jnp.inf)
    # among its own class, the order of the places decides ties: it changes no score
    place = jnp.arange(largest)
    earlier = (own[:, None, :] > own[:, :, None]) | (
        (own[:, None, :] == own[:, :, None]) & (place[None, None, :] < place[None, :, None])
    )
    before += jnp.sum(earlier & there[:, None, :], axis=2, dtype=jnp.int32)
    return jnp.where(there, before + 1, jnp.iinfo(jnp.int32).max)


def _check(embeddings, labels, ks):
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(f"need (N, D) embeddings and (N,) labels, got {embeddings.shape} and {labels.shape}")
    if not np.isfinite(embeddings).all():
        bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        raise ValueError(f"{len(bad)} embeddings are not finite, the first in rows {bad[:10].tolist()}")
    zero = np.flatnonzero(~embeddings.any(axis=1))
    if len(zero):
        raise ValueError(f"{len(zero)} embeddings are zero vectors, the first in rows {zero[:10].tolist()}")
    if min(ks) < 1:
        raise ValueError(f"every K of Recall@K must be at least 1, got {tuple(ks)}")
    if len(np.unique(labels)) == len(labels):
        raise ValueError("no class has two images: there is nothing to retrieve")


def nearest(embeddings, k: int, queries) -> np.ndarray:
    """(Q, k) rows nearest by cosine to the rows `queries` (Q,), nearest first, itself left out."""
    embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    similarity = embeddings[queries] @ embeddings.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]
