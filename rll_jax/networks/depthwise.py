"""Depthwise convolution: XLA's, but on CPUs, where XLA's program takes 10 to 100 times as long.

There a float32 map is the sum of shifted maps, each times its element of the kernel, and the
gradient of the kernel is a sum over the rows of each product.
"""

from collections.abc import Iterator
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from rll_jax.networks.normalization import row_sums

_Pads = tuple[tuple[int, int], ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: _Pads) -> jax.Array:
    """Convolves each channel of a map with its own kernel.

    Args:
      x: (B, H, W, C) float32 maps. They and the kernel vary alike over the axes of shard_map.
      kernel: (kernel height, kernel width, 1, C).
      strides: the vertical and the horizontal stride.
      pads: the pads before and after each side.

    Returns:
      (B, H after, W after, C). Gradients of first order in reverse mode exist.
    """
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_sum_of_shifted, strides=strides, pads=pads),
        default=functools.partial(by_xla, strides=strides, pads=pads),
    )


def by_xla(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: _Pads, **options: Any
) -> jax.Array:
    """Convolves as `convolve`, by XLA's program on every platform, for any floating dtype."""
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        **options,
    )


def _forward(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: _Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(x, kernel, strides, pads), (x, kernel)


def _backward(
    strides: tuple[int, ...],
    pads: _Pads,
    inputs: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return lax.platform_dependent(
        *inputs,
        gradient,
        cpu=functools.partial(_gradients, strides=strides, pads=pads),
        default=functools.partial(_gradients_by_xla, strides=strides, pads=pads),
    )


convolve.defvjp(_forward, _backward)


def _gradients_by_xla(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, strides: tuple[int, ...], pads: _Pads
) -> tuple[jax.Array, jax.Array]:
    of_x = jax.linear_transpose(lambda x: by_xla(x, kernel, strides, pads), x)
    of_kernel = jax.linear_transpose(lambda kernel: by_xla(x, kernel, strides, pads), kernel)
    return *of_x(gradient), *of_kernel(gradient)


def _shifted(
    x: jax.Array, sides: tuple[int, ...], strides: tuple[int, ...], pads: _Pads
) -> Iterator[jax.Array]:
    """Yields what each element of a kernel of these sides sees of the maps, row by row."""
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)))
    # The last place of the kernel's first element.
    height, width = (
        max(0, side - size + 1) for side, size in zip(x.shape[1:3], sides, strict=True)
    )
    for row in range(sides[0]):
        for column in range(sides[1]):
            yield x[:, row : row + height : strides[0], column : column + width : strides[1]]


def _sum_of_shifted(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: _Pads
) -> jax.Array:
    elements = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1])
    seen = _shifted(x, kernel.shape[:2], strides, pads)
    return functools.reduce(
        jnp.add, (part * element for part, element in zip(seen, elements, strict=True))
    )


def _gradients(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, strides: tuple[int, ...], pads: _Pads
) -> tuple[jax.Array, jax.Array]:
    products = (part * gradient for part in _shifted(x, kernel.shape[:2], strides, pads))
    of_kernel = jnp.stack(row_sums(*products)).reshape(kernel.shape)
    if strides == (1, 1):
        around = tuple(
            (size - 1 - before, size - 1 - after)
            for (before, after), size in zip(pads, kernel.shape[:2], strict=True)
        )
        return _sum_of_shifted(gradient, kernel[::-1, ::-1], strides, around), of_kernel
    of_x = jax.linear_transpose(lambda x: _sum_of_shifted(x, kernel, strides, pads), x)
    return *of_x(gradient), of_kernel
