"""From the arguments of `rll_jax.loss` to plain arrays: checks, masks, unit length, other devices' rows, an origin.

Private to the package. Imports jax and numpy alone.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from rll_jax.loss import _pairs

# Pairs in one block: its handful of matrices stay near the processor's caches.
_BLOCK_PAIRS = 1 << 20


class Problem(NamedTuple):
    spec: _pairs.Spec
    args: tuple  # q, rows, g, columns, hyper
    valid: jax.Array  # (N, 1) bool


def make_problem(
    embeddings,
    labels,
    alpha,
    margin,
    temperature_pos,
    temperature_neg,
    balance,
    pair_term,
    query_weighting,
    gallery_gradient,
    weight_gradient,
    normalize,
    where,
    gallery,
    gallery_labels,
    gallery_where,
    axis_name,
    block_size,
):
    """Checks, masks, normalises, gathers and centres; what comes out is arithmetic on plain arrays."""
    check_rows("embeddings", embeddings, "labels", labels, "where", where)
    embeddings, labels = jnp.asarray(embeddings), jnp.asarray(labels)
    where, gallery_where = (x if x is None else jnp.asarray(x) for x in (where, gallery_where))
    own = gallery is None
    _check_options(
        alpha,
        margin,
        temperature_pos,
        temperature_neg,
        balance,
        pair_term,
        query_weighting,
        block_size,
    )
    if own and (gallery_labels is not None or gallery_where is not None):
        raise ValueError("gallery_labels and gallery_where need a gallery: found gallery=None")
    if not own:
        if gallery_labels is None:
            raise ValueError("a gallery needs gallery_labels: found gallery_labels=None")
        check_rows(
            "gallery", gallery, "gallery_labels", gallery_labels, "gallery_where", gallery_where
        )
        if np.shape(gallery)[1] != embeddings.shape[1]:
            raise ValueError(
                f"gallery and embeddings must have the same dimension: found {np.shape(gallery)[1]}, "
                f"expected {embeddings.shape[1]}"
            )

    dtype = embeddings.dtype if jnp.finfo(embeddings.dtype).bits > 32 else jnp.float32
    q = _clean(embeddings, where, normalize, dtype)
    g = q if own else _clean(jnp.asarray(gallery), gallery_where, normalize, dtype)
    g = g if gallery_gradient else lax.stop_gradient(g)
    g_label = labels if own else jnp.asarray(gallery_labels)
    g_valid = where if own else gallery_where
    label_dtype = np.promote_types(labels.dtype, g_label.dtype)
    if (
        not np.issubdtype(label_dtype, np.integer)
        or jax.dtypes.canonicalize_dtype(label_dtype) != label_dtype
    ):
        raise TypeError(
            f"labels and gallery_labels must share a dtype: found {labels.dtype} and {g_label.dtype}, which no integer "
            "dtype in use holds both"
        )
    q_index = g_index = jnp.arange(q.shape[0], dtype=jnp.int32)
    if not own:
        g_index = jnp.arange(g.shape[0], dtype=jnp.int32)
    if axis_name is not None:
        q_index = q_index + lax.axis_index(axis_name) * q.shape[0]
        g, g_label, g_index = (
            lax.all_gather(x, axis_name, tiled=True)
            for x in (g, g_label, q_index if own else g_index)
        )
        g_valid = None if g_valid is None else lax.all_gather(g_valid, axis_name, tiled=True)

    alpha_pos = jnp.maximum(alpha - margin, 0)
    hyper = (alpha, alpha_pos, temperature_pos, temperature_neg, balance)
    hyper = _pairs.Hyper(*(lax.stop_gradient(jnp.asarray(x, dtype)) for x in hyper))
    if block_size is None:
        block_size = max(64, _BLOCK_PAIRS // g.shape[0])
    spec = _pairs.Spec(
        pair_term == "squared",
        bool(weight_gradient),
        bool(gallery_gradient),
        own,
        min(int(block_size), q.shape[0]),
    )
    # Under shard_map's check_vma a derivative varies over the axes of its argument: give all arguments all axes.
    zero = jnp.zeros_like(q[:1, :1]) + jnp.zeros_like(g[:1, :1])
    q, g = q + zero, g + zero
    shift = _centre(g, g_valid)
    centred = tuple(lax.stop_gradient(x) - shift for x in (q, g))
    sizes = tuple(jnp.sum(x * x, axis=1) for x in centred)
    rows = _pairs.Rows(
        centred[0], *(x[:, None] for x in (labels.astype(label_dtype), q_index, sizes[0]))
    )
    row = functools.partial(jax.tree.map, lambda x: x[None, :])  # leaves a None be
    columns = _pairs.Columns(
        centred[1], *row((g_label.astype(label_dtype), g_index, sizes[1], g_valid))
    )
    valid = jnp.ones((q.shape[0], 1), bool) if where is None else where[:, None]
    return Problem(spec, (q, rows, g, columns, hyper), valid)


def _masked(x, where):
    return x if where is None else jnp.where(where[:, None], x, 0)


def _centre(g, valid):
    """(1, D), to take off all rows: no distance changes, but in a batch far from the origin they keep their digits."""
    g = lax.stop_gradient(g)  # masked rows are 0
    first = jnp.take(g, 0 if valid is None else jnp.argmax(valid), axis=0)[None, :]
    count = g.shape[0] if valid is None else jnp.maximum(jnp.sum(valid, dtype=jnp.int32), 1)
    total = _pairs.dot(
        jnp.ones((1, g.shape[0]), g.dtype), g, ((1,), (0,))
    )  # a sum, in less time on a CPU
    mean = total / jnp.asarray(count, g.dtype)
    # The rounded mean of equal rows may miss them: taking off one of them leaves exact zeros.
    return jnp.where(
        jnp.abs(mean - first) <= 32 * jnp.finfo(g.dtype).eps * jnp.abs(first), first, mean
    )


def _clean(x, where, normalize, dtype):
    x = _masked(x.astype(dtype), where)
    return normalize_rows(x) if normalize else x


@jax.custom_vjp
def normalize_rows(x):
    """Rows of unit length; those no longer than 1e-12 become 0, with gradient 0."""
    return _normalize_forward(x)[0]


def _normalize_forward(x):
    def lengths_of(x):
        square = jnp.sum(x * x, axis=1, keepdims=True)
        return square, jnp.where(square <= 1e-24, 0, 1 / jnp.sqrt(square))

    def of_long_rows():
        # The square of the largest component overflows. A quarter of it, as 1 / the largest number would underflow.
        largest = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 4
        scale = jnp.where(square < 1e30, 1, 1 / largest)
        return scale, lengths_of(x * scale)[1]

    square, inverse = lengths_of(x)
    scale, inverse = lax.cond(
        jnp.all(square < 1e30), lambda: (jnp.ones_like(inverse), inverse), of_long_rows
    )
    # It is within [-1, 1]; but contracted with a later difference (FMA) equal rows would come to differ.
    y = jnp.clip(x * scale * inverse, -1, 1)
    return y, (y, scale * inverse)


def _normalize_backward(residuals, ct):
    y, scale = residuals
    return ((ct - y * jnp.sum(ct * y, axis=1, keepdims=True)) * scale,)


normalize_rows.defvjp(_normalize_forward, _normalize_backward)


def check_rows(name, x, labels_name, labels, where_name, where):
    """Shapes and dtypes of one set of rows."""
    for n, value in ((name, x), (labels_name, labels)):
        if not hasattr(value, "shape"):
            raise TypeError(f"{n} must be an array: found {type(value).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating: found {x.dtype}, expected float16, bfloat16, float32 or float64"
        )
    if x.ndim != 2:
        raise ValueError(f"{name} must be 2-dimensional: found shape {x.shape}, expected (N, D)")
    if 0 in x.shape:
        raise ValueError(
            f"{name} must not be empty: found shape {x.shape}, expected N >= 1 and D >= 1"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"{labels_name} must be integers: found {labels.dtype}, expected an integer dtype"
        )
    kept = jax.dtypes.canonicalize_dtype(
        labels.dtype
    )  # int64 cut to int32 could make two classes one
    if (
        isinstance(labels, np.ndarray)
        and kept != labels.dtype
        and np.any(labels.astype(kept) != labels)
    ):
        found = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"{labels_name} must fit {kept} (jax_enable_x64 is off): found {found}")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"{labels_name} must go with {name}: found shape {labels.shape}, expected {x.shape[:1]}"
        )
    if where is None:
        return
    if not hasattr(where, "dtype") or where.dtype != jnp.bool_:
        raise TypeError(
            f"{where_name} must be bool: found {getattr(where, 'dtype', type(where).__name__)}, expected bool"
        )
    if where.shape != x.shape[:1]:
        raise ValueError(
            f"{where_name} must go with {name}: found shape {where.shape}, expected {x.shape[:1]}"
        )


def _check_options(
    alpha, margin, temperature_pos, temperature_neg, balance, pair_term, query_weighting, block_size
):
    """Hyper-parameters: those that are traced have no value yet and are not checked."""

    def check(name, value, low, high, expected, open_low=False):
        real = isinstance(
            value, (int, float, np.number, np.ndarray, jax.Array)
        ) and not np.iscomplexobj(value)
        if not real or jnp.result_type(value) == bool:
            raise TypeError(
                f"{name} must be a real number: found {type(value).__name__}, expected {expected}"
            )
        if np.ndim(value) != 0:
            raise ValueError(f"{name} must be a scalar: found shape {np.shape(value)}, expected ()")
        if isinstance(value, jax.core.Tracer):
            return
        value = float(value)
        if not ((low < value if open_low else low <= value) and value <= high):
            raise ValueError(f"{name} out of range: found {value}, expected {expected}")

    check("alpha", alpha, 0, 2, "0 < alpha <= 2", open_low=True)
    limit = np.inf if isinstance(alpha, jax.core.Tracer) else float(alpha)
    # One of the two may have been rounded to float32.
    check("margin", margin, 0, limit * (1 + 1e-6), f"0 <= margin <= alpha = {limit}")
    check("temperature_pos", temperature_pos, 0, 1e30, "temperature_pos >= 0 and at most 1e30")
    check("temperature_neg", temperature_neg, 0, 1e30, "temperature_neg >= 0 and at most 1e30")
    check("balance", balance, 0, 1, "0 <= balance <= 1")
    if pair_term not in ("distance", "squared"):
        raise ValueError(f"pair_term: found {pair_term!r}, expected 'distance' or 'squared'")
    if query_weighting not in ("uniform", "mass"):
        raise ValueError(
            f"query_weighting: found {query_weighting!r}, expected 'uniform' or 'mass'"
        )
    if block_size is not None and (
        isinstance(block_size, bool) or not isinstance(block_size, (int, np.integer))
    ):
        raise TypeError(f"block_size must be an integer: found {type(block_size).__name__}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size out of range: found {block_size}, expected block_size >= 1")
