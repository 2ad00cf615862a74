"""The baselines of Ranked List Loss, equal to their PyTorch originals to 1e-6 in float64.

The originals are pytorch-metric-learning (PML) 2.9's; for Smooth-AP and Recall@K, the authors'.
This file has the losses on distances and N-pair, and all others by name: those on cosine
similarities are in `similarity_losses`, those that learn proxies in `proxy_losses`, those on ranks
in `ranking_losses`.

Each loss takes embeddings (N, D) and labels (N,) first, its own options by keyword, and returns a
scalar. All of them share this behaviour:

- Embeddings are L2-normalised inside. float16 and bfloat16 are computed in float32, float64 in
  float64. Products have Precision.HIGHEST.
- The gradient is autodiff's and flows to all rows. It is finite, also at copies and in batches of
  one class. A loss with nothing to sum is 0. NaN in a valid row gives NaN.
- `where`: (N,) bool or None. Rows with False are padding, whatever their values.
- `gallery`, with `gallery_labels` and `gallery_where`, where a loss takes them: every row of the
  batch is compared with these rows instead of the batch, such as a memory (`rll_jax.loss.memory`).
  They are constants, as PML's `ref_emb` is without a gradient. No pair is left out, so a query's
  own copy is a positive: push a batch into a memory after its loss.
- `axis_name`: of `pmap`, `shard_map` or `vmap`, or None. The batch is that of all devices together,
  and each device passes its own rows (of the gallery too). Each device returns the loss of the
  whole batch. `lax.pmean` of values and gradients gives those of one device, as in the recipe of
  this folder's README. Every device computes all pairs, so the largest batches do not fit. In plain
  `jax.jit` on a mesh the pairs, and the triplets, are divided over the devices.
- TypeError and ValueError for arrays of a wrong dtype or shape, as `ranked_list_loss` raises them.

This module imports jax and numpy alone.
"""

# jax's stubs leave a parameter of arange without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Hashable
import functools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from rll_jax.loss._batches import (
    distances,
    log_sum_exp,
    make_batch,
    mean,
    mean_above_zero,
    own_pairs,
)
from rll_jax.loss._mesh import map_rows, on_meshes
from rll_jax.loss._options import (
    ALPHA,
    BALANCE,
    MARGIN,
    TEMPERATURE_NEG,
    TEMPERATURE_POS,
    positive_boundary,
)
from rll_jax.loss._pairs import dot
from rll_jax.loss._problem import GalleryArguments
from rll_jax.loss.proxy_losses import arcface_loss, proxy_anchor_loss, soft_triple_loss
from rll_jax.loss.ranking_losses import recall_at_k_loss, smooth_ap_loss
from rll_jax.loss.similarity_losses import (
    circle_loss,
    multi_similarity_loss,
    nt_xent_loss,
    sup_con_loss,
)

__all__ = [
    "arcface_loss",
    "circle_loss",
    "contrastive_loss",
    "lifted_structure_loss",
    "multi_similarity_loss",
    "n_pair_loss",
    "nt_xent_loss",
    "pml_ranked_list_loss",
    "proxy_anchor_loss",
    "recall_at_k_loss",
    "smooth_ap_loss",
    "soft_triple_loss",
    "sup_con_loss",
    "triplet_loss",
]

Mining = Literal["semihard", "hard", "all"]


@on_meshes
def contrastive_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    pos_margin: ArrayLike = 0.0,
    neg_margin: ArrayLike = 1.0,
    where: jax.Array | np.ndarray | None = None,
    gallery: jax.Array | np.ndarray | None = None,
    gallery_labels: jax.Array | np.ndarray | None = None,
    gallery_where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes the contrastive loss (Hadsell, Chopra, LeCun, CVPR 2006) on distances, not squares.

    The loss is a sum of two means: of [d - pos_margin]_+ over the positive pairs, and of
    [neg_margin - d]_+ over the negative pairs. Each mean is over the terms above 0.
    PML: ContrastiveLoss.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      pos_margin: the distance up to which a positive pair costs nothing.
      neg_margin: the distance from which a negative pair costs nothing.
      where: (N,) bool mask, see the top of this file.
      gallery: (M, D): compare the batch with these rows, see the top of this file.
      gallery_labels: (M,), integer; needed with a gallery.
      gallery_where: (M,) bool: False rows are padding.
      axis_name: see the top of this file.
    """
    given = GalleryArguments(gallery, gallery_labels, gallery_where)
    batch = make_batch(embeddings, labels, where, axis_name, gallery=given)
    distance = distances(batch)
    pulled = mean_above_zero(distance - pos_margin, batch.positive)
    return batch.one * (pulled + mean_above_zero(neg_margin - distance, batch.negative))


@on_meshes
def triplet_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    margin: ArrayLike = 0.2,
    mining: Mining = "semihard",
    where: jax.Array | np.ndarray | None = None,
    gallery: jax.Array | np.ndarray | None = None,
    gallery_labels: jax.Array | np.ndarray | None = None,
    gallery_where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes the triplet loss: the mean of the mined [d_ap - d_an + margin]_+ that are above 0.

    PML: TripletMarginLoss(margin) after TripletMarginMiner(margin, "semihard"), after
    BatchHardMiner, or alone. Memory is that of N x N matrices. The time of "semihard" and "all" is
    O(N^3).

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      margin: added to d_ap - d_an.
      mining: "semihard": the triplets with d_ap < d_an (Schroff et al., FaceNet, CVPR 2015); all of
        them, not one for each positive. "hard": for each anchor its farthest positive and its
        nearest negative (Hermans et al., arXiv 1703.07737, "batch hard"); ties share the gradient.
        "all": all triplets.
      where: (N,) bool mask, see the top of this file.
      gallery: (M, D): compare the batch with these rows, see the top of this file.
      gallery_labels: (M,), integer; needed with a gallery.
      gallery_where: (M,) bool: False rows are padding.
      axis_name: see the top of this file.

    Raises:
      ValueError: an unknown `mining`.
    """
    if mining not in ("semihard", "hard", "all"):
        raise ValueError(f"mining: found {mining!r}, expected 'semihard', 'hard' or 'all'")
    given = GalleryArguments(gallery, gallery_labels, gallery_where)
    batch = make_batch(embeddings, labels, where, axis_name, gallery=given)
    distance = distances(batch)
    if mining == "hard":
        farthest = jnp.max(distance, axis=1, initial=0, where=batch.positive)
        nearest = jnp.min(distance, axis=1, initial=4, where=batch.negative)
        hinge = farthest - nearest + margin
        usable = batch.positive.any(axis=1) & batch.negative.any(axis=1)
        return batch.one * mean_above_zero(hinge, usable)
    anchors = (distance, batch.positive, batch.negative)
    sum_triplets = functools.partial(_sum_triplets, mining)
    total, count = map_rows(sum_triplets, anchors, jnp.asarray(margin, distance.dtype))
    return batch.one * jnp.sum(total) / jnp.maximum(jnp.sum(count.astype(distance.dtype)), 1)


def _sum_triplets(
    mining: Mining, anchor: tuple[jax.Array, jax.Array, jax.Array], margin: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum and the number of one anchor's mined triplets that are above 0.

    Args:
      mining: "semihard" or "all".
      anchor: (N,) distances to all rows, which are positives, and which are negatives.
      margin: as in `triplet_loss`.
    """
    distance, positive, negative = anchor
    difference = distance[:, None] - distance[None, :]
    chosen = positive[:, None] & negative[None, :] & (difference + margin > 0)
    chosen &= (difference < 0) | (mining == "all")
    total = jnp.sum(jnp.where(chosen, difference + margin, 0))
    return total, jnp.sum(chosen, dtype=jnp.int32)


@on_meshes
def lifted_structure_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    pos_margin: ArrayLike = 0.0,
    neg_margin: ArrayLike = 1.0,
    where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes the lifted structured embedding loss (Song et al., CVPR 2016, equation 4).

    The loss is the mean over the ordered positive pairs (i, j) of

        [log(sum_k exp(neg_margin - d_ik) + sum_k exp(neg_margin - d_jk)) + d_ij - pos_margin]_+^2

    over 2, with k over the negatives of i and of j. PML: LiftedStructureLoss.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      pos_margin: subtracted from the distance of a positive pair.
      neg_margin: the distance from which a negative is subtracted.
      where: (N,) bool mask, see the top of this file.
      axis_name: see the top of this file.
    """
    batch = make_batch(embeddings, labels, where, axis_name)
    distance = distances(batch)
    log_sums = log_sum_exp(neg_margin - distance, batch.negative)
    has_negative = batch.negative.any(axis=1)
    usable = batch.positive & has_negative[:, None]
    # Finite in rows that have no negative, and masked below.
    log_sums = jnp.where(has_negative, log_sums, 0)
    pushed = jnp.logaddexp(log_sums[:, None], log_sums[None, :])
    hinge = jnp.maximum(pushed + distance - pos_margin, 0)
    return batch.one * mean(hinge**2 / 2, usable)


@on_meshes
def n_pair_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    scale: ArrayLike = 1.0,
    normalize: bool = True,
    where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes the multi-class N-pair loss (Sohn, NIPS 2016, equation 7), without its norm penalty.

    The first two rows of each class are its pair, anchor and positive. The loss is the mean over
    the classes of the cross entropy of the anchor's inner products with all positives.
    PML: NPairsLoss, which normalises, at scale 1.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      scale: multiplies the inner products. Unit vectors need one, like an inverse temperature.
      normalize: L2-normalise the embeddings. The paper does not.
      where: (N,) bool mask, see the top of this file.
      axis_name: see the top of this file.
    """
    batch = make_batch(embeddings, labels, where, axis_name, normalize=normalize)
    x, same = batch.embeddings, batch.positive
    number = jnp.arange(same.shape[0])
    has_earlier = (same & (number[:, None] > number[None, :])).any(axis=1)
    anchor = batch.valid & ~has_earlier & same.any(axis=1)
    positives = x[jnp.argmax(same, axis=1)]
    logits = jnp.where(anchor[None, :], scale * dot(x, positives, ((1,), (1,))), -jnp.inf)
    # Rows that are no anchors: finite here, and masked below.
    logits = jnp.where(anchor[:, None], logits, 0)
    own = jnp.sum(jnp.where(own_pairs(x), logits, 0), axis=1)
    return batch.one * mean(jax.nn.logsumexp(logits, axis=1) - own, anchor)


@on_meshes
def pml_ranked_list_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    alpha: ArrayLike = ALPHA,
    margin: ArrayLike = MARGIN,
    temperature_pos: ArrayLike = TEMPERATURE_POS,
    temperature_neg: ArrayLike = TEMPERATURE_NEG,
    balance: ArrayLike = BALANCE,
    where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes what PML 2.9 calls RankedListLoss, to compare with `ranked_list_loss`.

    It keeps PML's differences from the paper: the weights are differentiated, both ends of a pair
    move, 1e-5 is added to each of a query's weights before they are summed, and pairs at distance 0
    are left out.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      alpha: the boundary of negatives.
      margin: between the boundaries. Positives count beyond alpha - margin.
      temperature_pos: of the positives' weights, PML's Tp.
      temperature_neg: of the negatives' weights, PML's Tn.
      balance: the share of the negative term, PML's imbalance.
      where: (N,) bool mask, see the top of this file.
      axis_name: see the top of this file.
    """
    batch = make_batch(embeddings, labels, where, axis_name)
    distance = distances(batch)
    alpha_pos = positive_boundary(alpha, margin)
    alpha_neg, t_pos, t_neg, share = (
        cast("Any", number) for number in (alpha, temperature_pos, temperature_neg, balance)
    )
    positive = _pml_term(
        batch.positive & (distance > alpha_pos) & (distance > 0),
        distance - alpha_pos,
        t_pos * (distance - alpha_pos),
        batch.valid,
    )
    negative = _pml_term(
        batch.negative & (distance < alpha_neg) & (distance > 0),
        alpha_neg - distance,
        t_neg * (alpha_neg - distance),
        batch.valid,
    )
    return batch.one * mean((1 - share) * positive + share * negative, batch.valid)


def _pml_term(
    listed: jax.Array, hinge: jax.Array, exponent: jax.Array, valid: jax.Array
) -> jax.Array:
    """Returns PML's weighted mean of the listed hinges (N, N) of each query, (N,)."""
    weight = jnp.where(listed, jnp.exp(jnp.where(listed, exponent, 0)), 0)
    epsilon = 1e-5 * jnp.sum(valid, dtype=hinge.dtype)
    total = jnp.sum(weight * jnp.where(listed, hinge, 0), axis=1)
    return total / (jnp.sum(weight, axis=1) + epsilon)
