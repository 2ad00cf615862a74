"""The CPU's program of a depthwise convolution: XLA's takes 10 to 100 times as long.

A map is the sum of shifted maps, each times its element of the kernel, and the gradient of the
kernel is a sum over the rows of each product.
"""

from collections.abc import Iterator
import functools

import jax
from jax import lax
import jax.numpy as jnp

from rll_jax.networks.normalization import row_sums

_Pads = tuple[tuple[int, int], ...]

# Summed at once, the products of more kernel rows take a second to compile, and longer to run.
_MOST_KERNEL_ROWS = 5


def convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: _Pads) -> jax.Array:
    """Convolves each channel of a map with its own kernel.

    Args:
      x: (B, H, W, C) maps.
      kernel: (kernel height, kernel width, 1, C).
      strides: the vertical and the horizontal stride.
      pads: the pads before and after each side.

    Returns:
      (B, H after, W after, C).
    """
    elements = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
    seen = shifted(_padded(x, pads), kernel.shape[:2], strides)
    return functools.reduce(
        jnp.add, (part * element for part, element in zip(seen, elements, strict=True))
    )


def gradients(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, strides: tuple[int, ...], pads: _Pads
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of the maps and of the kernel, from that of the result."""
    padded = _padded(x, pads)
    rows, columns = kernel.shape[:2]
    height = max(0, padded.shape[1] - rows + 1)

    def of_row(row: jax.Array) -> jax.Array:
        seen = lax.dynamic_slice_in_dim(padded, row, height, axis=1)
        return _element_gradients(seen, gradient, (1, columns), strides)

    if rows > _MOST_KERNEL_ROWS:
        elements = lax.map(of_row, jnp.arange(rows))
    else:
        elements = _element_gradients(padded, gradient, (rows, columns), strides)
    of_kernel = elements.reshape(kernel.shape)
    if strides == (1, 1):
        around = tuple(
            (size - 1 - before, size - 1 - after)
            for (before, after), size in zip(pads, kernel.shape[:2], strict=True)
        )
        return convolve(gradient, kernel[::-1, ::-1], strides, around), of_kernel
    of_x = jax.linear_transpose(lambda x: convolve(x, kernel, strides, pads), x)
    return *of_x(gradient), of_kernel


def _element_gradients(
    x: jax.Array, gradient: jax.Array, sides: tuple[int, ...], strides: tuple[int, ...]
) -> jax.Array:
    """Returns the (elements, C) gradient of a kernel of these sides, from padded maps."""
    return jnp.stack(row_sums(*(part * gradient for part in shifted(x, sides, strides))))


def _padded(x: jax.Array, pads: _Pads) -> jax.Array:
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)))


def shifted(x: jax.Array, sides: tuple[int, ...], strides: tuple[int, ...]) -> Iterator[jax.Array]:
    """Yields what each element of a kernel of these sides sees of padded maps, row by row."""
    # The last place of the kernel's first element.
    height, width = (
        max(0, side - size + 1) for side, size in zip(x.shape[1:3], sides, strict=True)
    )
    for row in range(sides[0]):
        for column in range(sides[1]):
            yield x[:, row : row + height : strides[0], column : column + width : strides[1]]
