"""Baselines on ranks that sigmoids make smooth: average precision and Recall@K.

Their shared behaviour, `where` and `axis_name` are described in `rll_jax.loss.baselines`. They take
one query at a time, and compute its N x N comparisons again for the gradient: the time is O(N^3),
the memory that of N x N matrices. This module imports jax and numpy alone.
"""

# jax's stubs leave some parameters of asarray without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from rll_jax.loss._batches import check_positive, make_batch, mean, own_pairs, similarities
from rll_jax.loss._mesh import map_rows, on_meshes

__all__ = ["recall_at_k_loss", "smooth_ap_loss"]


@on_meshes
def smooth_ap_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    temperature: ArrayLike = 0.01,
    where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes Smooth-AP (Brown et al., ECCV 2020, equation 8): 1 - the mean average precision.

    Every row is a query. A rank is 1 plus the sum of sigmoid((s_j - s_i) / temperature) over the
    other rows j. The average precision of a query is the mean over its class of the rank within the
    class divided by the rank in the batch. As in the authors' code, the query itself is one of its
    class, at similarity 1. That code needs classes of equal sizes, this one takes any. The mean is
    over all rows.

    PML 2.9's SmoothAPLoss takes C classes of k rows for k classes of C rows. It equals this where
    there are as many classes as rows in each.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      temperature: of the sigmoid, above 0. The smaller, the nearer to a step.
      where: (N,) bool mask, see `rll_jax.loss.baselines`.
      axis_name: see `rll_jax.loss.baselines`.

    Raises:
      ValueError: temperature is not above 0.
    """
    check_positive(temperature=temperature)
    batch = make_batch(embeddings, labels, where, axis_name)
    relevant = batch.positive | (own_pairs(batch.embeddings) & batch.valid[:, None])
    found = map_rows(
        lambda query, whole: _average_precision(*whole, *query),
        (similarities(batch), relevant),
        (jnp.asarray(temperature, batch.embeddings.dtype), batch.valid),
    )
    return batch.one * mean(1 - found, batch.valid)


@on_meshes
def recall_at_k_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    k_temperatures: Sequence[float] | None = None,
    temperature: ArrayLike = 0.01,
    rank_query: bool = True,
    where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes the Recall@K surrogate (Patel et al., CVPR 2022): 1 - the mean smooth Recall@K.

    Every row with a positive is a query, the others are left out. The rank of a positive is 1 plus
    the sum of sigmoid((s_j - s_i) / temperature) over the other rows j. It is found among the first
    k as far as sigmoid((k - rank) / k_temperature). The recall of a query at k is the sum of that
    over its positives, at most k, divided by the number of positives, at most k. The loss takes the
    mean over `ks`, and over the queries.

    The values are those of the authors' code (github.com/yash0307/RecallatK_surrogate) without its
    mixing of embeddings, for classes of any sizes.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      ks: the list lengths, each 1 or more. One above the number of rows is that number.
      k_temperatures: of the sigmoid of each k, above 0. None: k itself, as in the authors' code.
      temperature: of the sigmoid of the ranks, above 0.
      rank_query: True, as in the authors' code: the query is a row like the others, at similarity
        1, so that its nearest positive has rank 2. False: it is left out, as in retrieval.
      where: (N,) bool mask, see `rll_jax.loss.baselines`.
      axis_name: see `rll_jax.loss.baselines`.

    Raises:
      ValueError: no k, a k below 1, a temperature that is not above 0, or another number of
        k_temperatures than of ks.
    """
    widths = ks if k_temperatures is None else k_temperatures
    _check_lists(ks, widths)
    check_positive(temperature=temperature)
    batch = make_batch(embeddings, labels, where, axis_name)
    dtype = batch.embeddings.dtype
    rows = jnp.sum(batch.valid, dtype=jnp.int32).astype(dtype)
    lengths = jnp.minimum(jnp.asarray(ks, dtype), rows)
    counted = jnp.broadcast_to(batch.valid[None, :], batch.positive.shape)
    counted = counted if rank_query else counted & ~own_pairs(batch.embeddings)
    found = map_rows(
        lambda query, whole: _mean_recall(*whole, *query),
        (similarities(batch), batch.positive, counted),
        (jnp.asarray(temperature, dtype), lengths, jnp.asarray(widths, dtype)),
    )
    return batch.one * mean(1 - found, batch.positive.any(axis=1))


def _check_lists(ks: Sequence[int], widths: Sequence[float]) -> None:
    """Checks the list lengths and their temperatures."""
    if not len(ks) or min(ks) < 1:
        raise ValueError(f"ks must be one number or more, each at least 1: found {tuple(ks)}")
    if len(widths) != len(ks) or not min(widths) > 0:
        raise ValueError(
            f"k_temperatures must be {len(ks)} numbers above 0, one for each of ks: "
            f"found {tuple(widths)}"
        )


def _average_precision(
    temperature: ArrayLike, valid: jax.Array, similarity: jax.Array, relevant: jax.Array
) -> jax.Array:
    """Returns the smooth average precision of one query from its rows (N,), 0 without any."""
    above = _above(similarity, temperature)
    among_relevant = 1 + jnp.sum(jnp.where(relevant[None, :], above, 0), axis=1)
    among_all = 1 + jnp.sum(jnp.where(valid[None, :], above, 0), axis=1)
    return mean(among_relevant / among_all, relevant)


def _mean_recall(
    temperature: ArrayLike,
    ks: jax.Array,
    widths: jax.Array,
    similarity: jax.Array,
    positive: jax.Array,
    counted: jax.Array,
) -> jax.Array:
    """Returns the mean over ks (K,) of the smooth recall of one query from its rows (N,)."""
    rank = 1 + jnp.sum(jnp.where(counted[None, :], _above(similarity, temperature), 0), axis=1)
    hits = jax.nn.sigmoid((ks[:, None] - rank[None, :]) / widths[:, None])
    found = jnp.sum(jnp.where(positive[None, :], hits, 0), axis=1)
    count = jnp.sum(positive, dtype=jnp.int32).astype(rank.dtype)
    return jnp.mean(jnp.minimum(found, ks) / jnp.maximum(jnp.minimum(ks, count), 1))


def _above(similarity: jax.Array, temperature: ArrayLike) -> jax.Array:
    """Returns (N, N): how far the second row is before the first, 0 to 1, and 0 for itself."""
    difference = similarity[None, :] - similarity[:, None]
    above = jax.nn.sigmoid(difference / temperature)
    return jnp.where(own_pairs(similarity), 0, above)
