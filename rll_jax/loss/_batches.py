"""What the baselines share: the pairs of a batch, their distances, and masked sums.

Private to `rll_jax.loss`. Imports jax and numpy alone.
"""

# jax's stubs leave some parameters of asarray without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from rll_jax.loss._pairs import dot
from rll_jax.loss._problem import GalleryArguments, checked_gallery, common_label_dtype
from rll_jax.loss.rows import LabelledRows, checked_rows, clean_embeddings, computing_dtype, gather

_NO_GALLERY = GalleryArguments(None, None, None)


class Batch(NamedTuple):
    """The rows of all devices, and which pairs of them count."""

    embeddings: jax.Array  # (N, D), of the computing dtype, padding as 0
    gallery: jax.Array | None  # (M, D), a constant; None where the batch is its own, and M is N
    labels: jax.Array  # (N,)
    positive: jax.Array  # (N, M) bool: two valid rows of one class, never a row with itself
    negative: jax.Array  # (N, M) bool: two valid rows of different classes
    valid: jax.Array  # (N,) bool
    one: jax.Array  # scalar: 1, or NaN where an embedding of a valid row is NaN


class _Side(NamedTuple):
    """The queries or the gallery of all devices."""

    embeddings: jax.Array  # (n, D), of the computing dtype, padding as 0
    labels: jax.Array  # (n,)
    valid: jax.Array  # (n,) bool


def make_batch(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    where: jax.Array | np.ndarray | None,
    axis_name: Hashable | None,
    *,
    normalize: bool = True,
    gallery: GalleryArguments = _NO_GALLERY,
) -> Batch:
    """Checks, masks, normalises and gathers the rows, and finds their pairs."""
    rows = checked_rows(embeddings, labels, where)
    bank = checked_gallery(gallery, rows.embeddings.shape[1])
    dtype = computing_dtype(rows.embeddings.dtype)
    x, row_labels, valid = _gathered(rows, normalize, dtype, axis_name)
    if bank is None:
        g, gallery_labels, gallery_valid = x, row_labels, valid
    else:
        g, gallery_labels, gallery_valid = _gathered(bank, normalize, dtype, axis_name)
        g = lax.stop_gradient(g)
    label_dtype = common_label_dtype(row_labels.dtype, gallery_labels.dtype)
    match = row_labels.astype(label_dtype)[:, None] == gallery_labels.astype(label_dtype)[None, :]
    both = valid[:, None] & gallery_valid[None, :]
    positive = both & match if bank is not None else both & match & ~own_pairs(x)
    # Comparisons drop NaN, and this does not.
    has_nan = jnp.isnan(x).any()
    has_nan = has_nan if bank is None else has_nan | jnp.isnan(g).any()
    one = jnp.where(has_nan, jnp.nan, 1).astype(x.dtype)
    return Batch(x, None if bank is None else g, row_labels, positive, both & ~match, valid, one)


def _gathered(rows: LabelledRows, normalize: bool, dtype: Any, axis_name: Hashable | None) -> _Side:
    """Returns the rows of all devices."""
    valid = jnp.ones(rows.labels.shape, bool) if rows.where is None else rows.where
    x = gather(clean_embeddings(rows, normalize, dtype), axis_name)
    return _Side(x, gather(rows.labels, axis_name), gather(valid, axis_name))


def own_pairs(x: jax.Array) -> jax.Array:
    """Returns (N, N) bool: a row of x (N, ...) with itself."""
    number = jnp.arange(x.shape[0])
    return number[:, None] == number[None, :]


def similarities(batch: Batch) -> jax.Array:
    """Returns the products (N, M) of all pairs."""
    gallery = batch.embeddings if batch.gallery is None else batch.gallery
    return dot(batch.embeddings, gallery, ((1,), (1,)))


def distances(batch: Batch) -> jax.Array:
    """Returns the distances (N, M) of all pairs. One that is within rounding of 0 is 0."""
    # Without their mean, rows that are near each other keep their digits.
    gallery = batch.embeddings if batch.gallery is None else batch.gallery
    centre = lax.stop_gradient(jnp.mean(gallery, axis=0, keepdims=True))
    x = batch.embeddings - centre
    size = jnp.sum(x * x, axis=1)
    y, y_size = x, size
    if batch.gallery is not None:
        y = batch.gallery - centre
        y_size = jnp.sum(y * y, axis=1)
    both = size[:, None] + y_size[None, :]
    squared = jnp.maximum(both - 2 * dot(x, y, ((1,), (1,))), 0)
    # A nearer pair is rounding, without a direction.
    apart = squared > 4 * np.finfo(x.dtype).eps * both
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)


def mean(values: jax.Array | np.ndarray, chosen: jax.Array) -> jax.Array:
    """Returns the mean of the chosen values, 0 without any."""
    count = jnp.sum(chosen, dtype=jnp.int32).astype(values.dtype)
    return jnp.sum(jnp.where(chosen, values, 0)) / jnp.maximum(count, 1)


def mean_above_zero(values: jax.Array | np.ndarray, chosen: jax.Array) -> jax.Array:
    """Returns the mean of the chosen values that are above 0, 0 without any."""
    return mean(values, chosen & (values > 0))


def log_sum_exp(x: jax.Array | np.ndarray, chosen: jax.Array, axis: int = 1) -> jax.Array:
    """Returns log sum exp over the chosen; without any -inf, with gradient 0."""
    any_chosen = chosen.any(axis=axis)
    x = jnp.where(jnp.expand_dims(any_chosen, axis), jnp.where(chosen, x, -jnp.inf), 0)
    return jnp.where(any_chosen, jax.nn.logsumexp(x, axis=axis), -jnp.inf)


def log_one_plus_sum_exp(x: jax.Array | np.ndarray, chosen: jax.Array, axis: int = 1) -> jax.Array:
    """Returns log(1 + sum exp) over the chosen, 0 without any."""
    return jax.nn.softplus(log_sum_exp(x, chosen, axis))


def check_positive(**values: Any) -> None:
    """Checks that options are above 0. Traced ones are not checked."""
    for name, value in values.items():
        if not isinstance(value, Tracer) and not float(value) > 0:
            raise ValueError(f"{name} out of range: found {value}, expected {name} > 0")
