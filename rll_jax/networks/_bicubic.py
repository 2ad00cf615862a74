"""PyTorch's bicubic interpolation, by which position embeddings are fitted to other images."""

import numpy as np


def bicubic(before: int, after: int, antialias: bool) -> np.ndarray:
    """Returns the (after, before) float32 matrix of PyTorch's bicubic interpolation of a side.

    Args:
      before: the number of values on the side.
      after: the number of values wanted, with corners that are not aligned.
      antialias: whether the kernel is widened where the side gets smaller. Keys' kernel has its
        parameter at -0.5 then, as in Pillow, and at -0.75 otherwise.
    """
    scale = before / after
    places = (np.arange(after)[:, None] + 0.5) * scale - 0.5
    if antialias:
        shares = _keys((np.arange(before) - places) / max(scale, 1.0), -0.5)
        return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
    matrix = np.zeros((after, before))
    for tap in range(-1, 3):
        source = np.floor(places).astype(int) + tap
        inside = np.clip(source, 0, before - 1)  # values beyond an edge are those at the edge
        np.add.at(matrix, (np.arange(after)[:, None], inside), _keys(source - places, -0.75))
    return matrix.astype(np.float32)


def _keys(distance: np.ndarray, a: float) -> np.ndarray:
    """Returns the cubic convolution kernel of Keys (1981) with the parameter `a`."""
    x = np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
