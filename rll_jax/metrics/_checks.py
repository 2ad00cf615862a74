"""Checks of the embeddings and labels that scores are computed from."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

_ROWS = 65536  # rows that are checked at once


def labelled_rows(
    name: str,
    embeddings: jax.Array | np.ndarray,
    labels_name: str,
    labels: jax.Array | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns embeddings, as `embedding_rows` does, and their labels as a NumPy array.

    Args:
      name: what error messages call the embeddings.
      embeddings: (N, D) floating.
      labels_name: what error messages call the labels.
      labels: (N,) integers.

    Raises:
      TypeError: the labels are not integers, or the embeddings are not floating.
      ValueError: the shapes do not fit together, or as `embedding_rows`.
    """
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(
            f"{labels_name} must be integers: use numpy.unique(..., return_inverse=True), once for "
            f"all labels; found {labels.dtype}"
        )
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{name} must be (N, D) and {labels_name} (N,), found {embeddings.shape} and "
            f"{labels.shape}"
        )
    return embedding_rows(name, embeddings), labels


def embedding_rows(name: str, embeddings: jax.Array | np.ndarray) -> np.ndarray:
    """Returns embeddings as a NumPy array of float32 or float64.

    Narrower types become float32, wider types float64.

    Args:
      name: what error messages call the embeddings.
      embeddings: (N, D) floating.

    Raises:
      TypeError: the embeddings are not floating.
      ValueError: the embeddings are not (N, D), are empty, or have rows that are not finite or
        zero; the message has the numbers of the first ten of these rows.
    """
    rows = np.asarray(embeddings)
    if not jnp.issubdtype(rows.dtype, np.floating):  # NumPy's issubdtype does not know bfloat16
        raise TypeError(f"{name} must be floating, found {rows.dtype}")
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"{name} must be (N, D) and not empty, found shape {rows.shape}")
    if rows.dtype.itemsize not in (4, 8):
        rows = rows.astype(np.float32 if rows.dtype.itemsize < 4 else np.float64)
    not_finite, zero = np.empty((2, len(rows)), bool)
    for first in range(0, len(rows), _ROWS):  # the rows may be a file's, larger than the memory
        part = slice(first, first + _ROWS)
        not_finite[part] = ~np.isfinite(rows[part]).all(axis=1)
        zero[part] = ~rows[part].any(axis=1)
    _check_none(name, "not finite", not_finite)
    _check_none(name, "zero vectors", zero)
    return rows


def codes(name: str, values: npt.ArrayLike | None, number: int) -> np.ndarray | None:
    """Returns ids or groups as a NumPy array, or None for None.

    Args:
      name: what error messages call them.
      values: (N,) integers or text.
      number: N.

    Raises:
      TypeError: they are neither integers nor text.
      ValueError: there are not N of them.
    """
    if values is None:
        return None
    array = np.asarray(values)
    if array.dtype == object and all(isinstance(value, str) for value in array.flat):
        array = array.astype(np.str_)  # as pandas keeps text
    if array.dtype.kind not in "iuUS":
        raise TypeError(f"{name} must be integers or text, found {array.dtype}")
    if array.shape != (number,):
        raise ValueError(f"{name} must be ({number},), one for each row, found {array.shape}")
    return array


def check_both_or_none(name: str, of_queries: object, of_gallery: object) -> None:
    """Raises ValueError where queries or gallery alone have ids or groups (`name`)."""
    if (of_queries is None) != (of_gallery is None):
        raise ValueError(
            f"query_{name} and gallery_{name} go together: found one without the other"
        )


def _check_none(name: str, fault: str, faulty: np.ndarray) -> None:
    """Raises ValueError if any of the (N,) rows has the fault."""
    if faulty.any():
        numbers = np.flatnonzero(faulty)
        raise ValueError(
            f"{len(numbers)} of {len(faulty)} rows of {name} are {fault}, the first: "
            f"{numbers[:10].tolist()}"
        )
