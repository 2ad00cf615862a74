"""The baselines of Ranked List Loss, equal to pytorch-metric-learning (PML) 2.9 to 1e-6 in float64.

Each loss takes embeddings (N, D) and labels (N,) first, its own options by keyword, and returns a
scalar. All of them share this behaviour:

- Embeddings are L2-normalised inside. float16 and bfloat16 are computed in float32, float64 in
  float64. Products have Precision.HIGHEST.
- The gradient is autodiff's and flows to all rows. It is finite, also at copies and in batches of
  one class. A loss with nothing to sum is 0. NaN in a valid row gives NaN.
- `where`: (N,) bool or None. Rows with False are padding, whatever their values.
- `axis_name`: of `pmap`, `shard_map` or `vmap`, or None. The batch is that of all devices together,
  and each device passes its own rows. Each device returns the loss of the whole batch. `lax.pmean`
  of values and gradients gives those of one device, as in the recipe of this folder's README. Every
  device computes all pairs, so the largest batches do not fit.
- TypeError and ValueError for arrays of a wrong dtype or shape, as `ranked_list_loss` raises them.

This module imports jax and numpy alone.
"""

# jax's stubs leave some parameters of asarray and checkpoint without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Hashable
import functools
from typing import Any, Literal, NamedTuple, cast

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from rll_jax.loss._mesh import on_meshes
from rll_jax.loss._options import (
    ALPHA,
    BALANCE,
    MARGIN,
    TEMPERATURE_NEG,
    TEMPERATURE_POS,
    positive_boundary,
)
from rll_jax.loss._pairs import dot
from rll_jax.loss.rows import checked_rows, computing_dtype, gather, normalize_rows

__all__ = [
    "contrastive_loss",
    "lifted_structure_loss",
    "multi_similarity_loss",
    "n_pair_loss",
    "nt_xent_loss",
    "pml_ranked_list_loss",
    "proxy_anchor_loss",
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
      axis_name: see the top of this file.
    """
    batch = _make_batch(embeddings, labels, where, axis_name)
    distance = _distances(batch.embeddings)
    pulled = _mean_above_zero(distance - pos_margin, batch.positive)
    return batch.one * (pulled + _mean_above_zero(neg_margin - distance, batch.negative))


@on_meshes
def triplet_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    margin: ArrayLike = 0.2,
    mining: Mining = "semihard",
    where: jax.Array | np.ndarray | None = None,
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
      axis_name: see the top of this file.

    Raises:
      ValueError: an unknown `mining`.
    """
    if mining not in ("semihard", "hard", "all"):
        raise ValueError(f"mining: found {mining!r}, expected 'semihard', 'hard' or 'all'")
    batch = _make_batch(embeddings, labels, where, axis_name)
    distance = _distances(batch.embeddings)
    if mining == "hard":
        farthest = jnp.max(distance, axis=1, initial=0, where=batch.positive)
        nearest = jnp.min(distance, axis=1, initial=4, where=batch.negative)
        hinge = farthest - nearest + margin
        usable = batch.positive.any(axis=1) & batch.negative.any(axis=1)
        return batch.one * _mean_above_zero(hinge, usable)
    # One (N, N) matrix at a time, computed again for the gradient.
    sum_triplets = functools.partial(_sum_triplets, margin, mining)
    sum_triplets = cast("Any", jax.checkpoint(sum_triplets))
    anchors = (distance, batch.positive, batch.negative)
    total, count = cast("tuple[jax.Array, jax.Array]", lax.map(sum_triplets, anchors))
    return batch.one * jnp.sum(total) / jnp.maximum(jnp.sum(count.astype(distance.dtype)), 1)


def _sum_triplets(
    margin: ArrayLike, mining: Mining, anchor: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum and the number of one anchor's mined triplets that are above 0.

    Args:
      margin: as in `triplet_loss`.
      mining: "semihard" or "all".
      anchor: (N,) distances to all rows, which are positives, and which are negatives.
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
    batch = _make_batch(embeddings, labels, where, axis_name)
    distance = _distances(batch.embeddings)
    log_sums = _log_sum_exp(neg_margin - distance, batch.negative)
    has_negative = batch.negative.any(axis=1)
    usable = batch.positive & has_negative[:, None]
    # Finite in rows that have no negative, and masked below.
    log_sums = jnp.where(has_negative, log_sums, 0)
    pushed = jnp.logaddexp(log_sums[:, None], log_sums[None, :])
    hinge = jnp.maximum(pushed + distance - pos_margin, 0)
    return batch.one * _mean(hinge**2 / 2, usable)


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
    batch = _make_batch(embeddings, labels, where, axis_name, normalize)
    x, same = batch.embeddings, batch.positive
    number = jnp.arange(same.shape[0])
    has_earlier = (same & (number[:, None] > number[None, :])).any(axis=1)
    anchor = batch.valid & ~has_earlier & same.any(axis=1)
    positives = x[jnp.argmax(same, axis=1)]
    logits = jnp.where(anchor[None, :], scale * dot(x, positives, ((1,), (1,))), -jnp.inf)
    # Rows that are no anchors: finite here, and masked below.
    logits = jnp.where(anchor[:, None], logits, 0)
    own = jnp.sum(jnp.where(batch.own, logits, 0), axis=1)
    return batch.one * _mean(jax.nn.logsumexp(logits, axis=1) - own, anchor)


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
      where: (N,) bool mask, see the top of this file.
      axis_name: see the top of this file.

    Raises:
      ValueError: alpha or beta is not above 0.
    """
    _check_positive(alpha=alpha, beta=beta)
    batch = _make_batch(embeddings, labels, where, axis_name)
    positive, negative = batch.positive, batch.negative
    similarity = dot(batch.embeddings, batch.embeddings, ((1,), (1,)))
    if epsilon is not None:
        fixed = lax.stop_gradient(similarity)
        nearest = jnp.max(fixed, axis=1, keepdims=True, initial=-jnp.inf, where=negative)
        farthest = jnp.min(fixed, axis=1, keepdims=True, initial=jnp.inf, where=positive)
        positive = positive & (fixed - epsilon < nearest)
        negative = negative & (fixed + epsilon > farthest)
    pulled = _log_one_plus_sum_exp(alpha * (base - similarity), positive) / alpha
    pushed = _log_one_plus_sum_exp(beta * (similarity - base), negative) / beta
    return batch.one * _mean(pulled + pushed, batch.valid)


@on_meshes
def proxy_anchor_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    proxies: jax.Array | np.ndarray,
    *,
    margin: ArrayLike = 0.1,
    alpha: ArrayLike = 32.0,
    where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes the proxy anchor loss (Kim et al., CVPR 2020, equation 4) on cosine similarities.

    PML: ProxyAnchorLoss.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer, 0 to C - 1. A row with another label is a negative of all proxies.
      proxies: (C, D), floating, to be trained; the same on all devices. PML's and the authors'
        start as normal numbers with variance 2 / C.
      margin: delta in the paper.
      alpha: the scale, alpha in the paper.
      where: (N,) bool mask, see the top of this file.
      axis_name: see the top of this file.

    Raises:
      TypeError: proxies that are not a floating array.
      ValueError: proxies of a wrong shape.
    """
    batch = _make_batch(embeddings, labels, where, axis_name)
    x = batch.embeddings
    _check_proxies(proxies, x.shape[1])
    similarity = dot(x, normalize_rows(jnp.asarray(proxies).astype(x.dtype)), ((1,), (1,)))
    own = batch.labels[:, None] == jnp.arange(proxies.shape[0])[None, :]
    positive, negative = own & batch.valid[:, None], ~own & batch.valid[:, None]
    pulled = _log_one_plus_sum_exp(alpha * (margin - similarity), positive, axis=0)
    pushed = _log_one_plus_sum_exp(alpha * (similarity + margin), negative, axis=0)
    return batch.one * (_mean(pulled, positive.any(axis=0)) + jnp.mean(pushed))


@on_meshes
def nt_xent_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    temperature: ArrayLike = 0.07,
    where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes NT-Xent (Sohn 2016; SimCLR, Chen et al., ICML 2020, equation 1), many positives.

    The loss is the mean over the ordered positive pairs of a cross entropy: that of the positive
    among itself and the query's negatives. PML: NTXentLoss.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      temperature: divides the cosine similarities, above 0.
      where: (N,) bool mask, see the top of this file.
      axis_name: see the top of this file.

    Raises:
      ValueError: temperature is not above 0.
    """
    _check_positive(temperature=temperature)
    batch = _make_batch(embeddings, labels, where, axis_name)
    similarity = dot(batch.embeddings, batch.embeddings, ((1,), (1,))) / temperature
    usable = batch.positive & batch.negative.any(axis=1)[:, None]
    log_negatives = _log_sum_exp(similarity, batch.negative)[:, None]
    return batch.one * _mean(jax.nn.softplus(log_negatives - similarity), usable)


@on_meshes
def sup_con_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    temperature: ArrayLike = 0.1,
    where: jax.Array | np.ndarray | None = None,
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
      where: (N,) bool mask, see the top of this file.
      axis_name: see the top of this file.

    Raises:
      ValueError: temperature is not above 0.
    """
    _check_positive(temperature=temperature)
    batch = _make_batch(embeddings, labels, where, axis_name)
    positive, negative = batch.positive, batch.negative
    similarity = dot(batch.embeddings, batch.embeddings, ((1,), (1,))) / temperature
    log_total = _log_sum_exp(similarity, positive | negative)[:, None]
    count = jnp.sum(positive, axis=1).astype(similarity.dtype)
    total = jnp.sum(jnp.where(positive, log_total - similarity, 0), axis=1)
    usable = positive.any(axis=1) & negative.any()
    return batch.one * _mean_above_zero(total / jnp.maximum(count, 1), usable)


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
    batch = _make_batch(embeddings, labels, where, axis_name)
    distance = _distances(batch.embeddings)
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
    return batch.one * _mean((1 - share) * positive + share * negative, batch.valid)


def _pml_term(
    listed: jax.Array, hinge: jax.Array, exponent: jax.Array, valid: jax.Array
) -> jax.Array:
    """Returns PML's weighted mean of the listed hinges (N, N) of each query, (N,)."""
    weight = jnp.where(listed, jnp.exp(jnp.where(listed, exponent, 0)), 0)
    epsilon = 1e-5 * jnp.sum(valid, dtype=hinge.dtype)
    total = jnp.sum(weight * jnp.where(listed, hinge, 0), axis=1)
    return total / (jnp.sum(weight, axis=1) + epsilon)


def _check_positive(**values: Any) -> None:
    """Checks that options are above 0. Traced ones are not checked."""
    for name, value in values.items():
        if not isinstance(value, Tracer) and not value > 0:
            raise ValueError(f"{name} out of range: found {value}, expected {name} > 0")


def _check_proxies(proxies: jax.Array | np.ndarray, dim: int) -> None:
    """Checks that proxies are a floating matrix (C, dim) with C >= 1."""
    if not hasattr(proxies, "dtype") or not jnp.issubdtype(proxies.dtype, jnp.floating):
        kind = getattr(proxies, "dtype", type(proxies).__name__)
        raise TypeError(f"proxies must be a floating array: found {kind}")
    if proxies.ndim != 2 or proxies.shape[1] != dim or not proxies.shape[0]:
        raise ValueError(
            f"proxies must go with embeddings: found shape {proxies.shape}, expected (C, {dim})"
        )


class _Batch(NamedTuple):
    """The rows of all devices, and which pairs of them count."""

    embeddings: jax.Array  # (N, D), of the computing dtype, padding as 0
    labels: jax.Array  # (N,)
    positive: jax.Array  # (N, N) bool: two valid rows of one class, never a row with itself
    negative: jax.Array  # (N, N) bool: two valid rows of different classes
    valid: jax.Array  # (N,) bool
    own: jax.Array  # (N, N) bool: a row with itself
    one: jax.Array  # scalar: 1, or NaN where an embedding of a valid row is NaN


def _make_batch(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    where: jax.Array | np.ndarray | None,
    axis_name: Hashable | None,
    normalize: bool = True,
) -> _Batch:
    """Checks, masks, normalises and gathers the rows, and finds their pairs."""
    rows = checked_rows(embeddings, labels, where)
    x = rows.embeddings.astype(computing_dtype(rows.embeddings.dtype))
    valid = jnp.ones(rows.labels.shape, bool) if rows.where is None else rows.where
    x = jnp.where(valid[:, None], x, 0)
    x = normalize_rows(x) if normalize else x
    x, gathered_labels = gather(x, axis_name), gather(rows.labels, axis_name)
    valid = gather(valid, axis_name)
    both = valid[:, None] & valid[None, :]
    match = gathered_labels[:, None] == gathered_labels[None, :]
    number = jnp.arange(gathered_labels.shape[0])
    own = number[:, None] == number[None, :]
    # Comparisons drop NaN, and this does not.
    one = jnp.where(jnp.isnan(x).any(), jnp.nan, 1).astype(x.dtype)
    return _Batch(x, gathered_labels, both & match & ~own, both & ~match, valid, own, one)


def _distances(x: jax.Array) -> jax.Array:
    """Returns the distances (N, N) of all pairs. One that is within rounding of 0 is 0."""
    # Without their mean, rows that are near each other keep their digits.
    x = x - lax.stop_gradient(jnp.mean(x, axis=0, keepdims=True))
    size = jnp.sum(x * x, axis=1)
    both = size[:, None] + size[None, :]
    squared = jnp.maximum(both - 2 * dot(x, x, ((1,), (1,))), 0)
    # A nearer pair is rounding, without a direction.
    apart = squared > 4 * np.finfo(x.dtype).eps * both
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)


def _mean(values: jax.Array | np.ndarray, chosen: jax.Array) -> jax.Array:
    """Returns the mean of the chosen values, 0 without any."""
    count = jnp.sum(chosen, dtype=jnp.int32).astype(values.dtype)
    return jnp.sum(jnp.where(chosen, values, 0)) / jnp.maximum(count, 1)


def _mean_above_zero(values: jax.Array | np.ndarray, chosen: jax.Array) -> jax.Array:
    """Returns the mean of the chosen values that are above 0, 0 without any."""
    return _mean(values, chosen & (values > 0))


def _log_sum_exp(x: jax.Array | np.ndarray, chosen: jax.Array, axis: int = 1) -> jax.Array:
    """Returns log sum exp over the chosen; without any -inf, with gradient 0."""
    any_chosen = chosen.any(axis=axis)
    x = jnp.where(jnp.expand_dims(any_chosen, axis), jnp.where(chosen, x, -jnp.inf), 0)
    return jnp.where(any_chosen, jax.nn.logsumexp(x, axis=axis), -jnp.inf)


def _log_one_plus_sum_exp(x: jax.Array | np.ndarray, chosen: jax.Array, axis: int = 1) -> jax.Array:
    """Returns log(1 + sum exp) over the chosen, 0 without any."""
    return jax.nn.softplus(_log_sum_exp(x, chosen, axis))
