"""Vectors scaled to length 1, and how far a float32 product of two of them may be off."""

import functools

import numpy as np

FLOAT64_ROWS = 8192  # rows that are converted to float64 at once


def row_norms(vectors: np.ndarray) -> np.ndarray:
    """Returns the (N, 1) float64 lengths of (N, D) vectors.

    The squares neither overflow nor vanish: each row is first divided by its largest component.
    """
    norms = np.empty((len(vectors), 1))
    for first in range(0, len(vectors), FLOAT64_ROWS):
        rows = vectors[first : first + FLOAT64_ROWS].astype(np.float64)
        largest = np.abs(rows).max(axis=1, keepdims=True)
        rows /= largest
        scaled_norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
        norms[first : first + len(rows)] = largest * scaled_norms
    return norms


def unit_rows(
    vectors: np.ndarray,
    norms: np.ndarray | None = None,
    rotation: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    padding: int = 0,
) -> np.ndarray:
    """Returns vectors as float32 rows of length 1.

    Args:
      vectors: (N, D) floating, no zero vectors. They are read in parts, and may be a file's.
      norms: (N, 1) the lengths of the vectors, computed if None.
      rotation: (D, D) float64, by which the rows are multiplied, or None.
      rows: the rows to return, in their order, or None for all.
      padding: the number of zero rows to return behind them.
    """
    norms = row_norms(vectors) if norms is None else norms
    number = len(vectors) if rows is None else len(rows)
    units = np.zeros((number + padding, vectors.shape[1]), np.float32)
    for first in range(0, number, FLOAT64_ROWS):
        part = slice(first, min(first + FLOAT64_ROWS, number))
        taken = part if rows is None else rows[part]
        unit = vectors[taken] / norms[taken]
        units[part] = unit if rotation is None else unit @ rotation
    return units


@functools.lru_cache(maxsize=4)  # a second for D = 2,048
def rotation_and_band(dim: int) -> tuple[np.ndarray, float]:
    """Returns a random rotation, and the error that a float32 product of rotated vectors may have.

    A rotation changes no cosine. It makes the rounding errors in a sum of D products independent,
    so that the error of the sum is about sqrt(D) of them. Without a rotation it may be D of them:
    in vectors of equal components, or of 0 and 1, all products are rounded in one direction.

    Args:
      dim: D, the dimension of the vectors.

    Returns:
      A (D, D) float64 rotation, always the same for a D, and the band: a float32 product of two
      rotated unit vectors differs from the true product by less. It is about 15 standard
      deviations of the error.
    """
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))
    rotation.setflags(write=False)
    return rotation, 2.0**-22 * np.sqrt(dim)
