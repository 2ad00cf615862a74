"""Rows of embeddings with their labels: checks, unit length, and the rows of other devices.

The losses, the networks and the train step use these. Imports jax and numpy alone.
"""

# jax's stubs leave some parameters of asarray, cond and all_gather without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Hashable
from typing import NamedTuple, cast

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from rll_jax._jaxlib_fault import warn_of_wrong_sums
from rll_jax.loss._mesh import has_explicit_axes_beside, on_own_device


class LabelledRows(NamedTuple):
    """Rows that passed `check_rows`, as jax arrays."""

    embeddings: jax.Array  # (N, D) floating
    labels: jax.Array  # (N,) integer
    where: jax.Array | None  # (N,) bool: False for padding; None where every row is valid


class ArgumentNames(NamedTuple):
    """What the messages of `check_rows` call the three arrays."""

    embeddings: str
    labels: str
    where: str


QUERY_NAMES = ArgumentNames("embeddings", "labels", "where")
GALLERY_NAMES = ArgumentNames("gallery", "gallery_labels", "gallery_where")


def checked_rows(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    where: jax.Array | np.ndarray | None,
    names: ArgumentNames = QUERY_NAMES,
) -> LabelledRows:
    """Returns the rows as jax arrays, in their dtypes, after `check_rows`.

    Every loss takes its rows here, so the warning of a faulty jaxlib is here too.
    """
    check_rows(embeddings, labels, where, names)
    warn_of_wrong_sums()
    mask = None if where is None else on_own_device(jnp.asarray(where))
    return LabelledRows(
        on_own_device(jnp.asarray(embeddings)), on_own_device(jnp.asarray(labels)), mask
    )


def check_rows(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    where: jax.Array | np.ndarray | None,
    names: ArgumentNames = QUERY_NAMES,
) -> None:
    """Checks the shapes and dtypes of embeddings (N, D), labels (N,) and a mask (N,) or None.

    Raises:
      TypeError: not an array, embeddings not floating, labels not integer, or a mask not bool.
      ValueError: a wrong rank or length, no rows or columns, or labels that do not fit the integer
        dtype in use.
    """
    for name, value in ((names.embeddings, embeddings), (names.labels, labels)):
        if not hasattr(value, "shape"):
            raise TypeError(
                f"{name} must be an array: found {type(value).__name__}; use numpy.asarray({name})"
            )
    _check_embeddings(embeddings, names.embeddings)
    expected = embeddings.shape[:1]
    _check_label_dtype(labels, names.labels)
    if labels.shape != expected:
        raise ValueError(
            f"{names.labels} must go with {names.embeddings}: found shape {labels.shape}, "
            f"expected {expected}"
        )
    if where is None:
        return
    mask_type = getattr(where, "dtype", type(where).__name__)
    if mask_type != jnp.bool_:
        raise TypeError(f"{names.where} must be bool: found {mask_type}, expected bool")
    if where.shape != expected:
        raise ValueError(
            f"{names.where} must go with {names.embeddings}: found shape {where.shape}, "
            f"expected {expected}"
        )


def _check_embeddings(embeddings: jax.Array | np.ndarray, name: str) -> None:
    """Checks that embeddings are a floating matrix that is not empty."""
    if not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating: found {embeddings.dtype}, "
            "expected float16, bfloat16, float32 or float64"
        )
    if embeddings.ndim != 2:
        raise ValueError(
            f"{name} must be 2-dimensional: found shape {embeddings.shape}, expected (N, D)"
        )
    if 0 in embeddings.shape:
        raise ValueError(
            f"{name} must not be empty: found shape {embeddings.shape}, expected N >= 1 and D >= 1"
        )


def _check_label_dtype(labels: jax.Array | np.ndarray, name: str) -> None:
    """Checks that labels are integers, and that jax keeps their values."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        use = "numpy.unique(..., return_inverse=True), once for all labels"
        if jnp.issubdtype(labels.dtype, jnp.floating):  # as Keras passes them, (N, 1)
            use += f', or {name}.reshape(-1).astype("int32")'
        raise TypeError(f"{name} must be integers: use {use}; found {labels.dtype}")
    dtype = jax.dtypes.canonicalize_dtype(labels.dtype)
    if not isinstance(labels, np.ndarray) or dtype == labels.dtype:
        return
    # Labels of int64 that are cut to int32 could make one class of two.
    if np.any(labels.astype(dtype) != labels):
        raise ValueError(
            f"{name} must fit {dtype} (jax_enable_x64 is off): "
            f"found {labels.min()} to {labels.max()}"
        )


def computing_dtype(dtype: np.dtype) -> DTypeLike:
    """Returns the dtype in which embeddings of `dtype` are computed: float64, or else float32."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def clean_embeddings(rows: LabelledRows, normalize: bool, dtype: DTypeLike) -> jax.Array:
    """Returns the embeddings in `dtype`, padding as 0, of unit length where `normalize`."""
    x = rows.embeddings.astype(dtype)
    x = x if rows.where is None else jnp.where(rows.where[:, None], x, 0)
    return normalize_rows(x) if normalize else x


def check_varying(embeddings: jax.Array, axis_name: Hashable) -> None:
    """Checks that a device passes its own rows, where JAX tells: under shard_map's check_vma.

    Raises:
      ValueError: the embeddings are the same on all devices of the axis.
    """
    axes = _varying_axes(lax.axis_index(axis_name))
    missing = sorted(str(axis) for axis in axes - _varying_axes(embeddings))
    if missing:
        raise ValueError(
            f"embeddings must be each device's own rows: found the same on all devices of axis "
            f"{', '.join(missing)}, whose gradient would be multiplied by their number"
        )


def _varying_axes(x: jax.Array) -> frozenset[Hashable]:
    """Returns the mesh axes of `shard_map` over which an array's type varies."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset(getattr(kind, "varying", ()))


def gather(x: jax.Array, axis_name: Hashable | None, constant: bool = False) -> jax.Array:
    """Returns the rows of all devices of the axis, or `x` itself without an axis.

    A `constant` is not differentiated.
    """
    if axis_name is None:
        return x
    constant = constant or not jnp.issubdtype(x.dtype, jnp.floating)
    if constant or not has_explicit_axes_beside(x):
        return cast("jax.Array", lax.all_gather(x, axis_name, tiled=True))
    # jax 0.12 cannot compile the transpose of all_gather there.
    return gather_by_sum(x, axis_name)


def gather_by_sum(x: jax.Array, axis_name: Hashable) -> jax.Array:
    """Returns the rows of all devices as a sum of arrays that are zero outside of each one's.

    The sum is exact, and shard_map knows it as equal on all devices, as it demands of a state that
    is returned as replicated. It moves about twice the bytes of `gather`, whose result counts as
    different on each device.
    """
    count, first = x.shape[0], lax.axis_index(axis_name) * x.shape[0]
    every = jnp.zeros((lax.axis_size(axis_name) * count, *x.shape[1:]), x.dtype)
    own = lax.dynamic_update_slice_in_dim(every, x, first, axis=0)
    return sum_over_devices(own, axis_name)


def sum_over_devices(x: jax.Array, axis_name: Hashable | None) -> jax.Array:
    """Returns the sum over the devices of the axis, or `x` itself without an axis."""
    return x if axis_name is None else cast("jax.Array", lax.psum(x, axis_name))


@jax.custom_jvp
def normalize_rows(x: jax.Array) -> jax.Array:
    """Returns rows (N, D) of unit length.

    Rows no longer than 1e-12 become 0, with gradient 0.
    """
    return _compiled_unit_rows(x)[0]


def _normalize_tangent(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the unit rows and their tangents: what is tangent to the unit sphere, over length."""
    (x,), (tangent,) = primals, tangents
    # The unit rows are this function again, so that second derivatives are right too.
    y, (_, inverse) = normalize_rows(x), _compiled_unit_rows(x)
    return y, (tangent - y * jnp.sum(tangent * y, axis=1, keepdims=True)) * inverse


normalize_rows.defjvp(_normalize_tangent)


def _unit_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the unit rows (N, D), and 1 / length (N, 1), 0 for a row no longer than 1e-12."""
    square, inverse = _inverse_lengths(x)

    def keep() -> tuple[jax.Array, jax.Array]:
        return jnp.ones_like(inverse), inverse

    def rescale_long_rows() -> tuple[jax.Array, jax.Array]:
        # The square of the largest component overflows, and 1 / the largest number would underflow:
        # rows are divided by a quarter of their largest component.
        largest = jnp.max(jnp.abs(lax.stop_gradient(x)), axis=1, keepdims=True) / 4
        scale = jnp.where(square < 1e30, 1, 1 / largest)
        _, inverse = _inverse_lengths(x * scale)
        return scale, inverse

    scale, inverse = cast(
        "tuple[jax.Array, jax.Array]",
        lax.cond(jnp.all(square < 1e30), keep, rescale_long_rows),
    )
    # The product is within [-1, 1] already. The clip keeps the compiler from contracting it with a
    # later difference (FMA), which would make equal rows differ.
    return jnp.clip(x * scale * inverse, -1, 1), scale * inverse


# Outside jit the branches would be compiled again at every call.
_compiled_unit_rows = cast(
    "Callable[[jax.Array], tuple[jax.Array, jax.Array]]", jax.jit(_unit_rows)
)


def _inverse_lengths(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the squared lengths (N, 1), and 1 / length, 0 for a row no longer than 1e-12."""
    square = jnp.sum(x * x, axis=1, keepdims=True)
    short = square <= 1e-24
    return square, jnp.where(short, 0, 1 / jnp.sqrt(jnp.where(short, 1, square)))
