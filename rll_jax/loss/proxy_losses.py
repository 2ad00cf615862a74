"""Baselines that learn proxies: vectors that stand for the classes of the training set.

The proxies are the third argument, (C, D), and train with the network. They are L2-normalised
inside. Labels are 0 to C - 1. The shared behaviour, `where` and `axis_name` are described in
`rll_jax.loss.baselines`. This module imports jax and numpy alone.
"""

# jax's stubs leave some parameters of asarray without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Hashable
import math
from typing import Any, cast

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from rll_jax.loss._batches import Batch, check_positive, log_one_plus_sum_exp, make_batch, mean
from rll_jax.loss._mesh import on_meshes
from rll_jax.loss._pairs import dot
from rll_jax.loss.rows import normalize_rows

__all__ = ["arcface_loss", "proxy_anchor_loss", "soft_triple_loss"]


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
      where: (N,) bool mask, see `rll_jax.loss.baselines`.
      axis_name: see `rll_jax.loss.baselines`.

    Raises:
      TypeError: proxies that are not a floating array.
      ValueError: proxies of a wrong shape.
    """
    batch = make_batch(embeddings, labels, where, axis_name)
    similarity = dot(batch.embeddings, _unit_proxies(proxies, batch), ((1,), (1,)))
    own = _own_classes(batch.labels, proxies.shape[0])
    positive, negative = own & batch.valid[:, None], ~own & batch.valid[:, None]
    pulled = log_one_plus_sum_exp(alpha * (margin - similarity), positive, axis=0)
    pushed = log_one_plus_sum_exp(alpha * (similarity + margin), negative, axis=0)
    return batch.one * (mean(pulled, positive.any(axis=0)) + jnp.mean(pushed))


@on_meshes
def arcface_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    proxies: jax.Array | np.ndarray,
    *,
    margin: ArrayLike = 0.5,
    scale: ArrayLike = 64.0,
    where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes ArcFace (Deng et al., CVPR 2019, equation 3): a softmax with an angular margin.

    The loss is the mean over the rows of the cross entropy of scale * cos(theta_c) over the classes
    c, with theta_c the angle between a row and a proxy. For the row's own class it is
    cos(theta + margin), and cos(theta) - margin * sin(margin) where theta + margin is above pi, so
    that it always falls. PML: ArcFaceLoss, whose margin is in degrees.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer, 0 to C - 1. A row with another label is left out.
      proxies: (C, D), floating, to be trained; the same on all devices. The paper's weights W.
      margin: m in the paper, an angle in radians, 0 to pi.
      scale: s in the paper, above 0.
      where: (N,) bool mask, see `rll_jax.loss.baselines`.
      axis_name: see `rll_jax.loss.baselines`.

    Raises:
      TypeError: proxies that are not a floating array.
      ValueError: proxies of a wrong shape, margin or scale out of range.
    """
    check_positive(scale=scale)
    m = cast("Any", margin)
    if not isinstance(margin, Tracer) and not 0 <= float(m) <= math.pi:
        raise ValueError(f"margin out of range: found {m}, expected 0 to pi, in radians")
    batch = make_batch(embeddings, labels, where, axis_name)
    x, unit = batch.embeddings, _unit_proxies(proxies, batch)
    own = _own_classes(batch.labels, proxies.shape[0])
    # The angle to the own proxy comes from the chord between both: it keeps its digits near 0.
    chord = x - jnp.take(unit, jnp.argmax(own, axis=1), axis=0)
    squared = jnp.sum(chord * chord, axis=1)
    cosine, sine = 1 - squared / 2, _root(squared * (1 - squared / 4))
    falls = jnp.where(
        cosine >= -jnp.cos(m), cosine * jnp.cos(m) - sine * jnp.sin(m), cosine - m * jnp.sin(m)
    )
    logits = scale * jnp.where(own, falls[:, None], dot(x, unit, ((1,), (1,))))
    return batch.one * _cross_entropy(logits, own, batch.valid)


@on_meshes
def soft_triple_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    proxies: jax.Array | np.ndarray,
    *,
    centers_per_class: int = 10,
    scale: ArrayLike = 20.0,
    gamma: ArrayLike = 0.1,
    margin: ArrayLike = 0.01,
    where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Computes SoftTriple (Qian et al., ICCV 2019, equations 7 and 8): several proxies per class.

    A row's similarity to a class is the mean of its cosine similarities to the class's K proxies,
    weighted by their softmax(cosine / gamma). The loss is the mean over the rows of the cross
    entropy of scale * similarity, with the margin subtracted from the own class's. The paper's
    regulariser, which merges proxies of a class, is left out, as in PML: SoftTripleLoss.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer, 0 to C - 1. A row with another label is left out.
      proxies: (C * K, D), floating, to be trained; the same on all devices. The K proxies of class
        0 come first.
      centers_per_class: K.
      scale: lambda in the paper, PML's la; above 0.
      gamma: the temperature of the softmax over a class's proxies, above 0.
      margin: delta in the paper.
      where: (N,) bool mask, see `rll_jax.loss.baselines`.
      axis_name: see `rll_jax.loss.baselines`.

    Raises:
      TypeError: proxies that are not a floating array.
      ValueError: proxies of a wrong shape or whose number is no multiple of centers_per_class;
        scale, gamma or centers_per_class is not above 0.
    """
    check_positive(scale=scale, gamma=gamma, centers_per_class=centers_per_class)
    batch = make_batch(embeddings, labels, where, axis_name)
    unit = _unit_proxies(proxies, batch)
    classes, left = divmod(unit.shape[0], centers_per_class)
    if left:
        raise ValueError(
            f"proxies must be a multiple of centers_per_class={centers_per_class}: "
            f"found {unit.shape[0]}"
        )
    cosine = dot(batch.embeddings, unit, ((1,), (1,))).reshape(-1, classes, centers_per_class)
    similarity = jnp.sum(jax.nn.softmax(cosine / gamma, axis=2) * cosine, axis=2)
    own = _own_classes(batch.labels, classes)
    logits = scale * jnp.where(own, similarity - margin, similarity)
    return batch.one * _cross_entropy(logits, own, batch.valid)


def _unit_proxies(proxies: jax.Array | np.ndarray, batch: Batch) -> jax.Array:
    """Returns the proxies, of unit length and in the computing dtype, after their checks."""
    x = batch.embeddings
    _check_proxies(proxies, x.shape[1])
    return normalize_rows(jnp.asarray(proxies).astype(x.dtype))


def _check_proxies(proxies: jax.Array | np.ndarray, dim: int) -> None:
    """Checks that proxies are a floating matrix (C, dim) with C >= 1."""
    if not hasattr(proxies, "dtype") or not jnp.issubdtype(proxies.dtype, jnp.floating):
        kind = getattr(proxies, "dtype", type(proxies).__name__)
        raise TypeError(f"proxies must be a floating array: found {kind}")
    if proxies.ndim != 2 or proxies.shape[1] != dim or not proxies.shape[0]:
        raise ValueError(
            f"proxies must go with embeddings: found shape {proxies.shape}, expected (C, {dim})"
        )


def _own_classes(labels: jax.Array, classes: int) -> jax.Array:
    """Returns (N, C) bool: the class of each row."""
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)  # which holds the numbers of all classes
    return labels[:, None] == jnp.arange(classes, dtype=labels.dtype)[None, :]


def _cross_entropy(logits: jax.Array | np.ndarray, own: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the mean over the valid rows that have a class, 0 without any."""
    target = jnp.sum(jnp.where(own, logits, 0), axis=1)
    return mean(jax.nn.logsumexp(logits, axis=1) - target, valid & own.any(axis=1))


def _root(x: jax.Array) -> jax.Array:
    """Returns the square root; 0 with gradient 0 where x is within rounding of 0."""
    large = x > np.finfo(x.dtype).eps ** 2
    return jnp.where(large, jnp.sqrt(jnp.where(large, x, 1)), 0)
