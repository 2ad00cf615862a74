"""3x3 convolutions of stride 1 for CPUs, by Winograd's minimal filtering F(2x2, 3x3).

Every 2x2 pixels of the result come from 4x4 pixels of the map. In a transformed basis the 4x4
pixels and the kernel have 16 coefficients each, and their product is one matrix product for each
of the 16. These have 2.25 times fewer multiplications than the convolution (Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1). The kernel's gradient has
the same form. Results differ from a direct convolution's by rounding: in float32 by about 1e-6 of
the largest, in bfloat16 by 0.5 to 0.6 % in the root mean square (a direct one: 0.2 %).

Sums of pixels near float32's largest number overflow earlier, and infinities become NaN.

A batch is taken in chunks, since coefficients that leave the cache take longer than they save.
"""

from collections.abc import Callable, Sequence
import math

import jax
from jax import lax
import jax.numpy as jnp

from rll_jax.networks._layout import in_rows
from rll_jax.networks.depthwise import shifted

_Values = list[jax.Array]
_Grid = list[_Values]  # arrays in rows and columns
_Transform = Callable[[Sequence[jax.Array]], _Values]

_LEAST_CHANNELS = 128  # below, moving the coefficients takes as long as the products save
_LEAST_TILES = 64  # of a batch; below, transforming the kernel does
_CHUNK_COMPONENTS = 1 << 19  # of a chunk of maps: 2 MiB of float32


def suits(x: jax.Array, kernel: jax.Array, pads: Sequence[tuple[int, int]]) -> bool:
    """Whether a convolution of stride 1 takes less time than XLA's on a CPU.

    Args:
      x: (B, H, W, C) maps. Where B is symbolic (`jax.export`) or has no divisor for its chunks,
        the convolution is XLA's.
      kernel: (kernel height, kernel width, C, features).
      pads: the pads before and after each side.
    """
    if kernel.shape[:2] != (3, 3) or min(kernel.shape[2:]) < _LEAST_CHANNELS:
        return False
    if min(x.shape[1:3]) < 3 or min(map(min, pads)) < 0:
        return False
    batch, tiles = x.shape[0], _num_tiles(x, pads)
    if not isinstance(batch, int) or batch * tiles < _LEAST_TILES:
        return False
    chunk = _chunk(x, tiles)
    return chunk == batch or 4 * chunk * tiles >= _wanted_tiles(x)


def convolve(x: jax.Array, kernel: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
    """Returns the (B, H after, W after, features) convolution of (B, H, W, C) maps."""
    height, width = _sides_after(x, pads)
    of_kernel = _flat(_both(_of_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)]))

    def of_chunk(x: jax.Array) -> jax.Array:
        pixels = _both(_of_product, _products(_coefficients(x, pads), of_kernel))
        shape = (len(x), -(-height // 2), -(-width // 2), kernel.shape[3])
        rows = [jnp.stack([y.reshape(shape) for y in row], axis=3) for row in pixels]
        y = jnp.stack(rows, axis=2).reshape(len(x), 2 * shape[1], 2 * shape[2], shape[3])
        return y[:, :height, :width].astype(x.dtype)

    y = _in_chunks(of_chunk, _chunk(x, _num_tiles(x, pads)), x)
    return y.swapaxes(0, 1).reshape(len(x), height, width, kernel.shape[3])


def kernel_gradient(
    x: jax.Array, gradient: jax.Array, pads: Sequence[tuple[int, int]]
) -> jax.Array:
    """Returns the (3, 3, C, features) gradient of the kernel by that of the result."""

    def of_chunk(x: jax.Array, gradient: jax.Array) -> jax.Array:
        height, width = gradient.shape[1:3]
        gradient = jnp.pad(gradient, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        of_gradient = _both(_of_product_back, _places(gradient, 2))
        of_gradient = lax.optimization_barrier(_flat(of_gradient))
        transposed = [in_rows(a.T) for a in _coefficients(x, pads)]
        by_place = _both(_of_kernel_back, _products(transposed, of_gradient))
        return jnp.stack([jnp.stack(row) for row in by_place])

    parts = _in_chunks(of_chunk, _chunk(x, _num_tiles(x, pads)), x, gradient)
    return parts.sum(axis=0).astype(x.dtype)


# Each multiplies arrays by a matrix of the paper, or by its transpose.
def _of_map(d: Sequence[jax.Array]) -> _Values:  # B transposed
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _of_kernel(g: Sequence[jax.Array]) -> _Values:  # G
    ends = g[0] + g[2]
    return [g[0], 0.5 * (ends + g[1]), 0.5 * (ends - g[1]), g[2]]


def _of_kernel_back(u: Sequence[jax.Array]) -> _Values:  # G transposed
    half = 0.5 * (u[1] + u[2])
    return [u[0] + half, 0.5 * (u[1] - u[2]), half + u[3]]


def _of_product(m: Sequence[jax.Array]) -> _Values:  # A transposed
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _of_product_back(y: Sequence[jax.Array]) -> _Values:  # A
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _both(transform: _Transform, grid: _Grid) -> _Grid:
    """Transforms the columns of a grid, then its rows."""
    columns = [transform([row[j] for row in grid]) for j in range(len(grid[0]))]
    return [transform([column[i] for column in columns]) for i in range(len(columns[0]))]


def _flat(grid: _Grid) -> _Values:
    return [value for row in grid for value in row]


def _grid(values: _Values, width: int) -> _Grid:
    return [values[first : first + width] for first in range(0, len(values), width)]


def _coefficients(x: jax.Array, pads: Sequence[tuple[int, int]]) -> _Values:
    """Returns 16 (B * tiles, C) coefficients of the maps."""
    odd = [side % 2 for side in _sides_after(x, pads)]
    widths = [(before, after + more) for (before, after), more in zip(pads, odd, strict=True)]
    x = jnp.pad(x, ((0, 0), *widths, (0, 0)))
    # Behind the barrier XLA computes the coefficients once, not in each product.
    return lax.optimization_barrier(_flat(_both(_of_map, _places(x, 4))))


def _products(a: _Values, b: _Values) -> _Grid:
    """Returns the products of the 16 coefficients, float32."""
    pairs = zip(a, b, strict=True)
    values = [jnp.matmul(*pair, preferred_element_type=jnp.float32) for pair in pairs]
    # Without the barrier XLA may transpose a product of bfloat16 in place, which it cannot compute.
    return _grid(lax.optimization_barrier(values), 4)


def _places(x: jax.Array, size: int) -> _Grid:
    """Returns the pixels at each place of the tiles, (B * tiles, C) for each of size x size."""
    parts = shifted(x, (size, size), (2, 2))
    return _grid([part.reshape(-1, x.shape[3]) for part in parts], size)


def _sides_after(x: jax.Array, pads: Sequence[tuple[int, int]]) -> list[int]:
    return [side + sum(pair) - 2 for side, pair in zip(x.shape[1:3], pads, strict=True)]


def _num_tiles(x: jax.Array, pads: Sequence[tuple[int, int]]) -> int:
    """Returns the tiles of an image."""
    return math.prod(-(-side // 2) for side in _sides_after(x, pads))


def _wanted_tiles(x: jax.Array) -> int:
    """Returns the tiles of a chunk: of 2 MiB, but at least two for each channel.

    With fewer the coefficients of the kernel are read too often.
    """
    channels = x.shape[3]
    return max(_CHUNK_COMPONENTS // (4 * channels), 2 * channels)


def _chunk(x: jax.Array, tiles: int) -> int:
    """Returns the images of a chunk, which divide the batch."""
    most = max(1, _wanted_tiles(x) // tiles)
    return max(size for size in range(1, min(most, len(x)) + 1) if len(x) % size == 0)


def _in_chunks(of_chunk: Callable[..., jax.Array], chunk: int, *batches: jax.Array) -> jax.Array:
    """Returns a function of each chunk, (B / chunk, ...).

    A chunk has every (B / chunk)-th image, so that a batch which is divided over devices stays so.
    """
    if chunk == len(batches[0]):
        return of_chunk(*batches)[None]
    parts = [batch.reshape(chunk, -1, *batch.shape[1:]).swapaxes(0, 1) for batch in batches]
    return lax.map(lambda chunks: of_chunk(*chunks), parts)
