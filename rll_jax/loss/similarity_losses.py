"""Baselines on cosine similarities.

Their shared behaviour, `where`, `gallery` and `axis_name` are described in
`rll_jax.loss.baselines`. This module imports jax and numpy alone.
"""

from collections.abc import Hashable
from typing import Any, cast

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from rll_jax.loss._batches import (
    check_positive,
    log_one_plus_sum_exp,
    log_sum_exp,
    make_batch,
    mean,
    mean_above_zero,
    similarities,
)
from rll_jax.loss._mesh import on_meshes
from rll_jax.loss._problem import GalleryArguments

__all__ = ["circle_loss", "multi_similarity_loss", "nt_xent_loss", "sup_con_loss"]


@on_meshes
def multi_similarity_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    alpha: ArrayLike = 2.0,
    beta: ArrayLike = 50.0,
    base: ArrayLike = 0.5,
    epsilon: ArrayLike | None = 0.1,
    where: jax.Array | np.ndarray | None = None,
    gallery: jax.Array | np.ndarray | None = None,
    gallery_labels: jax.Array | np.ndarray | None = None,
    gallery_where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes the multi-similarity loss with its mining (Wang et al., CVPR 2019, eq. 11 to 13).

    It works on cosine similarities. The mean is over all rows. PML: MultiSimilarityLoss, with
    MultiSimilarityMiner(epsilon) or, for epsilon=None, without.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      alpha: the scale of the positives, above 0.
      beta: the scale of the negatives, above 0.
      base: the similarity threshold, lambda in the paper.
      epsilon: the mining margin. A positive counts if it is less similar than the most similar
        negative plus epsilon. A negative counts if it is more similar than the least similar
        positive less epsilon. None: all pairs count.
      where: (N,) bool mask, see `rll_jax.loss.baselines`.
      gallery: (M, D): compare the batch with these rows, see `rll_jax.loss.baselines`.
      gallery_labels: (M,), integer; needed with a gallery.
      gallery_where: (M,) bool: False rows are padding.
      axis_name: see `rll_jax.loss.baselines`.

    Raises:
      ValueError: alpha or beta is not above 0.
    """
    check_positive(alpha=alpha, beta=beta)
    given = GalleryArguments(gallery, gallery_labels, gallery_where)
    batch = make_batch(embeddings, labels, where, axis_name, gallery=given)
    positive, negative = batch.positive, batch.negative
    similarity = similarities(batch)
    if epsilon is not None:
        fixed = lax.stop_gradient(similarity)
        nearest = jnp.max(fixed, axis=1, keepdims=True, initial=-jnp.inf, where=negative)
        farthest = jnp.min(fixed, axis=1, keepdims=True, initial=jnp.inf, where=positive)
        positive = positive & (fixed - epsilon < nearest)
        negative = negative & (fixed + epsilon > farthest)
    pulled = log_one_plus_sum_exp(alpha * (base - similarity), positive) / alpha
    pushed = log_one_plus_sum_exp(beta * (similarity - base), negative) / beta
    return batch.one * mean(pulled + pushed, batch.valid)


@on_meshes
def nt_xent_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    temperature: ArrayLike = 0.07,
    where: jax.Array | np.ndarray | None = None,
    gallery: jax.Array | np.ndarray | None = None,
    gallery_labels: jax.Array | np.ndarray | None = None,
    gallery_where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes NT-Xent (Sohn 2016; SimCLR, Chen et al., ICML 2020, equation 1), many positives.

    The loss is the mean over the ordered positive pairs of a cross entropy: that of the positive
    among itself and the query's negatives. PML: NTXentLoss.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      temperature: divides the cosine similarities, above 0.
      where: (N,) bool mask, see `rll_jax.loss.baselines`.
      gallery: (M, D): compare the batch with these rows, see `rll_jax.loss.baselines`.
      gallery_labels: (M,), integer; needed with a gallery.
      gallery_where: (M,) bool: False rows are padding.
      axis_name: see `rll_jax.loss.baselines`.

    Raises:
      ValueError: temperature is not above 0.
    """
    check_positive(temperature=temperature)
    given = GalleryArguments(gallery, gallery_labels, gallery_where)
    batch = make_batch(embeddings, labels, where, axis_name, gallery=given)
    similarity = similarities(batch) / temperature
    usable = batch.positive & batch.negative.any(axis=1)[:, None]
    log_negatives = log_sum_exp(similarity, batch.negative)[:, None]
    return batch.one * mean(jax.nn.softplus(log_negatives - similarity), usable)


@on_meshes
def sup_con_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    temperature: ArrayLike = 0.1,
    where: jax.Array | np.ndarray | None = None,
    gallery: jax.Array | np.ndarray | None = None,
    gallery_labels: jax.Array | np.ndarray | None = None,
    gallery_where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes the supervised contrastive loss (Khosla et al., NeurIPS 2020, equation 2, L_out).

    The loss of a query is the mean over its positives of -log softmax over all other rows. The
    result is the mean over the queries whose loss is above 0. A batch of one class gives 0.
    PML: SupConLoss.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      temperature: divides the cosine similarities, above 0.
      where: (N,) bool mask, see `rll_jax.loss.baselines`.
      gallery: (M, D): compare the batch with these rows, see `rll_jax.loss.baselines`.
      gallery_labels: (M,), integer; needed with a gallery.
      gallery_where: (M,) bool: False rows are padding.
      axis_name: see `rll_jax.loss.baselines`.

    Raises:
      ValueError: temperature is not above 0.
    """
    check_positive(temperature=temperature)
    given = GalleryArguments(gallery, gallery_labels, gallery_where)
    batch = make_batch(embeddings, labels, where, axis_name, gallery=given)
    positive, negative = batch.positive, batch.negative
    similarity = similarities(batch) / temperature
    log_total = log_sum_exp(similarity, positive | negative)[:, None]
    count = jnp.sum(positive, axis=1).astype(similarity.dtype)
    total = jnp.sum(jnp.where(positive, log_total - similarity, 0), axis=1)
    usable = positive.any(axis=1) & negative.any()
    return batch.one * mean_above_zero(total / jnp.maximum(count, 1), usable)


@on_meshes
def circle_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    margin: ArrayLike = 0.4,
    gamma: ArrayLike = 80.0,
    where: jax.Array | np.ndarray | None = None,
    gallery: jax.Array | np.ndarray | None = None,
    gallery_labels: jax.Array | np.ndarray | None = None,
    gallery_where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes the circle loss (Sun et al., CVPR 2020, equation 6) with each row as a query.

    The loss of a query with positives p and negatives n is

        log(1 + sum_n exp(gamma a_n (s_n - m)) sum_p exp(-gamma a_p (s_p - 1 + m)))

    with the constants a_p = [1 + m - s_p]_+ and a_n = [s_n + m]_+. The result is the mean over the
    queries whose loss is above 0. Queries without positives or without negatives have none.
    PML: CircleLoss, whose m is `margin`.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      margin: m in the paper, the relaxation of the boundary.
      gamma: the scale, above 0. The paper has 80 for retrieval of cars, birds and products.
      where: (N,) bool mask, see `rll_jax.loss.baselines`.
      gallery: (M, D): compare the batch with these rows, see `rll_jax.loss.baselines`.
      gallery_labels: (M,), integer; needed with a gallery.
      gallery_where: (M,) bool: False rows are padding.
      axis_name: see `rll_jax.loss.baselines`.

    Raises:
      ValueError: gamma is not above 0.
    """
    check_positive(gamma=gamma)
    given = GalleryArguments(gallery, gallery_labels, gallery_where)
    batch = make_batch(embeddings, labels, where, axis_name, gallery=given)
    m, scale = cast("Any", margin), cast("Any", gamma)
    similarity = similarities(batch)
    fixed = lax.stop_gradient(similarity)
    pulled = -scale * jnp.maximum(1 + m - fixed, 0) * (similarity - (1 - m))
    pushed = scale * jnp.maximum(fixed + m, 0) * (similarity - m)
    usable = batch.positive.any(axis=1) & batch.negative.any(axis=1)
    # Finite in rows that are not usable, and masked below.
    log_sums = (log_sum_exp(pulled, batch.positive), log_sum_exp(pushed, batch.negative))
    exponent = jnp.where(usable, log_sums[0] + log_sums[1], 0)
    return batch.one * mean_above_zero(jax.nn.softplus(exponent), usable)
