"""The convolution of the networks: XLA's, but for what XLA's CPU compiler does slowly.

On a CPU, a 1x1 convolution of float32 or bfloat16 and its gradients are matrix products, and maps
smaller than the kernel are padded first: XLA has no fast convolution for them (3 instead of 400
GFLOP/s on 2x2 maps). A 3x3 convolution of stride 1 with 128 channels or more is
`rll_jax.networks.winograd`'s. A depthwise convolution of float32 is a sum of shifted maps. The
others, and other platforms, have XLA's.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from rll_jax.networks import depthwise, winograd
from rll_jax.networks._layout import in_rows
from rll_jax.networks._stages import as_varying

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_Pads = tuple[tuple[int, int], ...]


def conv_general_dilated(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """Convolves maps with a kernel, for `flax.linen.Conv(conv_general_dilated=...)`.

    Args:
      x: (B, H, W, C) maps.
      kernel: (kernel height, kernel width, C, features).
      window_strides: the vertical and the horizontal stride.
      padding: the pads before and after each side, or "SAME" or "VALID".
      **options: further arguments of `jax.lax.conv_general_dilated`. With a precision or a
        preferred dtype the program is XLA's everywhere. With a `feature_group_count` of C the
        convolution is depthwise: the kernel is (kernel height, kernel width, 1, C).

    Returns:
      (B, H after, W after, features). Gradients of first order in reverse mode exist. On CPUs
      `jax.export` takes those of bfloat16 only where
      `DisabledSafetyCheck.custom_call("LayoutConstraint")` is among its disabled checks.

    Raises:
      ValueError: the kernel has not two sides, there are dilations, other groups, or features
        that are not C of a depthwise convolution, or the dimensions are not NHWC and HWIO.
    """
    _check(x, kernel, **options)
    strides = tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    # Beyond the kernel's reach a map is padded first: XLA's gradients of such pads may be NaN.
    reach = [size - 1 for size in kernel.shape[:2]]
    pads = tuple(
        (min(before, most), min(after, most))
        for (before, after), most in zip(padding, reach, strict=True)
    )
    beyond = [(a - c, b - d) for (a, b), (c, d) in zip(padding, pads, strict=True)]
    if any(max(pair) > 0 for pair in beyond):
        x = jnp.pad(x, ((0, 0), *beyond, (0, 0)))
    rest = {key: options.get(key) for key in ("precision", "preferred_element_type")}
    is_depthwise = _groups(x, kernel) > 1
    dtypes = (jnp.float32,) if is_depthwise else (jnp.float32, jnp.bfloat16)
    is_xlas = x.dtype != kernel.dtype or x.dtype not in dtypes or any(rest.values())
    if is_xlas or (not is_depthwise and _on_explicit_axes(x, kernel)):
        return _by_xla(x, kernel, strides, pads, **rest)
    return _convolve(*as_varying(x, kernel), strides, pads)


def convolve_patches(
    x: jax.Array, kernel: jax.Array, window_strides: Sequence[int], padding: object, **_: object
) -> jax.Array:
    """Convolves patches that do not overlap: one matrix product, and so are its gradients.

    Args:
      x: (B, H, W, C) maps. What they have beyond whole patches is not seen.
      kernel: (patch, patch, C, features).
      window_strides: the side of a patch, twice.
      padding: none, "VALID".
    """
    patch, channels = window_strides[0], kernel.shape[2]
    height, width = (side // patch for side in x.shape[1:3])
    x = x[:, : height * patch, : width * patch]
    x = x.reshape(x.shape[0], height, patch, width, patch, channels).swapaxes(2, 3)
    x = x.reshape(x.shape[0], height, width, patch * patch * channels)
    return x @ kernel.reshape(-1, kernel.shape[-1])


def _check(
    x: jax.Array,
    kernel: jax.Array,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    **_: Any,
) -> None:
    """Raises ValueError for a convolution of another kind."""
    groups, dilations = (feature_group_count, batch_group_count), (lhs_dilation, rhs_dilation)
    undilated = all(set(dilation or ()) <= {1} for dilation in dilations)
    is_depthwise = groups == (x.shape[-1], 1) and kernel.shape[2:] == (1, x.shape[-1])
    if kernel.ndim != 4 or not (groups == (1, 1) or is_depthwise) or not undilated:
        raise ValueError(
            f"a kernel of shape {kernel.shape} with groups {groups}, dilations {dilations}: "
            "expected two sides, one group or a group and a feature for each channel, and no "
            "dilation"
        )
    shapes = x.shape, kernel.shape
    expected = lax.conv_dimension_numbers(*shapes, _DIMENSIONS)
    if dimension_numbers and lax.conv_dimension_numbers(*shapes, dimension_numbers) != expected:
        raise ValueError(f"dimension_numbers={dimension_numbers}: expected {_DIMENSIONS}")


def _on_explicit_axes(*arrays: jax.Array) -> bool:
    """Whether an array lies on explicit axes of a mesh."""
    specs = [jax.typeof(array).sharding.spec for array in arrays]
    return any(axis is not None for spec in specs for axis in spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: _Pads) -> jax.Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_on_cpu(x, kernel, pads)[0], strides=strides, pads=pads),
        default=functools.partial(_by_xla, strides=strides, pads=pads),
    )


def _forward(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: _Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel, strides, pads), (x, kernel)


def _backward(
    strides: tuple[int, ...],
    pads: _Pads,
    inputs: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    _, on_cpu = _on_cpu(*inputs, pads)
    return lax.platform_dependent(
        *inputs,
        gradient,
        cpu=functools.partial(on_cpu, strides=strides, pads=pads),
        default=functools.partial(_gradients_by_xla, strides=strides, pads=pads),
    )


_convolve.defvjp(_forward, _backward)


def _by_xla(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: _Pads, **rest: Any
) -> jax.Array:
    groups = _groups(x, kernel)
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
        **rest,
    )


def _groups(x: jax.Array, kernel: jax.Array) -> int:
    return x.shape[-1] // kernel.shape[2]


def _on_cpu(
    x: jax.Array, kernel: jax.Array, pads: _Pads
) -> tuple[Callable[..., jax.Array], Callable[..., tuple[jax.Array, jax.Array]]]:
    """Returns the program of a CPU, and that of its gradients."""
    if _groups(x, kernel) > 1:
        return depthwise.convolve, depthwise.gradients
    if kernel.shape[:2] == (1, 1) and pads == ((0, 0), (0, 0)):
        return _product, _product_gradients
    return _spatial, _spatial_gradients


def _gradients_by_xla(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, strides: tuple[int, ...], pads: _Pads
) -> tuple[jax.Array, jax.Array]:
    of_x = jax.linear_transpose(lambda x: _by_xla(x, kernel, strides, pads), x)
    of_kernel = jax.linear_transpose(lambda kernel: _by_xla(x, kernel, strides, pads), kernel)
    return *of_x(gradient), *of_kernel(gradient)


def _product(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: _Pads) -> jax.Array:
    del pads  # none
    return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]


def _product_gradients(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, strides: tuple[int, ...], pads: _Pads
) -> tuple[jax.Array, jax.Array]:
    del pads  # none
    seen = x[:, :: strides[0], :: strides[1]]
    inputs, features = kernel.shape[2:]
    of_kernel = in_rows(seen.reshape(-1, inputs).T) @ gradient.reshape(-1, features)
    of_seen = gradient @ in_rows(kernel[0, 0].T)
    between = [
        (0, before - 1 - (after - 1) * stride, stride - 1)
        for before, after, stride in zip(x.shape[1:3], seen.shape[1:3], strides, strict=True)
    ]
    of_x = lax.pad(of_seen, jnp.zeros((), x.dtype), ((0, 0, 0), *between, (0, 0, 0)))
    return of_x, of_kernel[None, None]


def _spatial(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: _Pads) -> jax.Array:
    """Convolves, in the form that suits; a map smaller than the kernel is padded before."""
    if strides == (1, 1) and winograd.suits(x, kernel, pads):
        return winograd.convolve(x, kernel, pads)
    small = any(side < size for side, size in zip(x.shape[1:3], kernel.shape[:2], strict=True))
    if small and min(min(pair) for pair in pads) >= 0:
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        pads = ((0, 0), (0, 0))
    return _by_xla(x, kernel, strides, pads)


def _spatial_gradients(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, strides: tuple[int, ...], pads: _Pads
) -> tuple[jax.Array, jax.Array]:
    if strides != (1, 1):
        return _gradients_by_xla(x, kernel, gradient, strides, pads)
    around = tuple(
        (size - 1 - before, size - 1 - after)
        for (before, after), size in zip(pads, kernel.shape[:2], strict=True)
    )
    turned = in_rows(kernel[::-1, ::-1].swapaxes(2, 3))
    of_x = _spatial(gradient, turned, strides, around)
    if winograd.suits(x, kernel, pads):
        return of_x, winograd.kernel_gradient(x, gradient, pads)
    of_kernel = jax.linear_transpose(lambda kernel: _by_xla(x, kernel, strides, pads), kernel)
    return of_x, *of_kernel(gradient)
