"""What follows a convolution: batch norm and ReLU, as in Flax, but fast on CPUs too; exact GELU.

XLA's CPU compiler sums over the rows of a map at a twentieth of the memory's speed, and computes a
ReLU again for everything that reads it. Here the sums are taken in groups of rows on a CPU, of
which the compiler makes vector instructions, and a ReLU is a choice between two arrays, which it
keeps. Other platforms get Flax's program, with one sum less in the gradient.
"""

from collections.abc import Sequence
import math
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rll_jax.networks._stages import as_varying

_QUICK_GROUPS = range(5, 17)  # the compiler unrolls sums of so few rows, and then takes vectors
_FEW_ROWS = 64


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last (Ioffe & Szegedy 2015), with `flax.linen`'s names.

    The arithmetic, scales and biases are float32; the variance is the mean square less the squared
    mean, at least 0.

    Args:
      use_running_average: whether the running statistics are used instead of the batch's.
      momentum: the share of the running statistics that a step keeps.
      epsilon: what is added to the variance.
      dtype: the dtype of the result.
      axis_name: the device axis whose batches give the statistics together, or None.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalised (..., C) `x`."""
        channels = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        if self.use_running_average:
            of_mean, of_var = mean.value, var.value
        else:
            of_mean, of_square = _moments(x)
            if self.axis_name is not None and not self.is_initializing():
                of_mean, of_square = lax.pmean(jnp.stack([of_mean, of_square]), self.axis_name)
            of_var = jnp.maximum(0.0, of_square - of_mean * of_mean)
            if not self.is_initializing():
                mean.value = self.momentum * mean.value + (1 - self.momentum) * of_mean
                var.value = self.momentum * var.value + (1 - self.momentum) * of_var
        factor = lax.rsqrt(of_var + self.epsilon) * scale
        return _scale_and_shift(*as_varying(x, of_mean, factor, bias)).astype(self.dtype)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """Returns max(x, 0), NaN for NaN. The gradient at 0 is 0."""
    return lax.platform_dependent(x, cpu=lambda x: jnp.where(x <= 0, 0, x), default=nn.relu)


def _relu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = relu(x)
    return y, y


def _relu_backward(y: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(y > 0, gradient, 0),)


relu.defvjp(_relu_forward, _relu_backward)


def relu6(x: jax.Array) -> jax.Array:
    """Returns min(max(x, 0), 6), NaN for NaN. The gradient at 0 and 6 is 0."""
    x = relu(x)
    return jnp.where(x >= 6, 6, x)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Returns x times the normal distribution's share below x, exactly.

    With a derivative of its own: in jax 0.12 that of the error function fails under shard_map.
    """
    return x * _normal_share(x)


@gelu.defjvp
def _gelu_derivative(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    share = _normal_share(x)
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * share, tangent * (share + x * density)


def _normal_share(x: jax.Array) -> jax.Array:
    return 0.5 * lax.erfc(-x * math.sqrt(0.5))


def _wide(x: jax.Array) -> jax.Array:
    """Returns `x` in float32, or in its own dtype if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _beside(values: jax.Array, x: jax.Array) -> jax.Array:
    """Returns (C,) values with the rank of `x`: users may forbid that ranks are promoted."""
    return values.reshape((1,) * (x.ndim - 1) + values.shape)


@jax.custom_vjp
def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the (C,) means of (..., C) values and of their squares."""
    values = _wide(x)
    rows = x.size // x.shape[-1]
    first, second = row_sums(values, values * values)
    return first / rows, second / rows


def _moments_forward(x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    return _moments(x), x


def _moments_backward(x: jax.Array, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    of_mean, of_square = (gradient / (x.size // x.shape[-1]) for gradient in gradients)
    of_mean, of_square = _beside(of_mean, x), _beside(of_square, x)
    return ((of_mean + 2 * of_square * _wide(x)).astype(x.dtype),)


_moments.defvjp(_moments_forward, _moments_backward)


@jax.custom_vjp
def _scale_and_shift(
    x: jax.Array, mean: jax.Array, factor: jax.Array, bias: jax.Array
) -> jax.Array:
    """Returns (x - mean) * factor + bias from (..., C) values and (C,) statistics."""
    return (_wide(x) - _beside(mean, x)) * _beside(factor, x) + _beside(bias, x)


def _scale_and_shift_forward(*inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _scale_and_shift(*inputs), inputs


def _scale_and_shift_backward(
    inputs: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, ...]:
    x, mean, factor, _ = inputs
    centred = _wide(x) - _beside(mean, x)
    of_bias, of_factor = row_sums(gradient, gradient * centred)
    gradients = (gradient * _beside(factor, x), -factor * of_bias, of_factor, of_bias)
    return tuple(g.astype(array.dtype) for g, array in zip(gradients, inputs, strict=True))


_scale_and_shift.defvjp(_scale_and_shift_forward, _scale_and_shift_backward)


def row_sums(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the (C,) sums of (..., C) arrays of one shape over all axes but the last."""
    return lax.platform_dependent(*arrays, cpu=_row_sums_on_cpu, default=_row_sums_at_once)


def _row_sums_at_once(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x.sum(range(x.ndim - 1)) for x in arrays)


def _row_sums_on_cpu(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Sums groups of a few rows of all arrays in one pass, the groups likewise, and so on.

    What few rows are left are summed by a product with ones. Sums of few numbers at a time round
    less than one long sum.
    """
    channels = arrays[0].shape[-1]
    arrays = tuple(x.reshape(-1, channels) for x in arrays)
    zeros = tuple(jnp.zeros((), x.dtype) for x in arrays)
    while len(arrays[0]) > _FEW_ROWS:
        group = _group_size(len(arrays[0]))
        spare = -len(arrays[0]) % group
        padded = (jnp.pad(x, ((0, spare), (0, 0))) if spare else x for x in arrays)
        grouped = tuple(x.reshape(-1, group, channels) for x in padded)
        arrays = tuple(lax.reduce(grouped, zeros, _add_each, (1,)))
    ones = jnp.ones((1, len(arrays[0])), arrays[0].dtype)
    return tuple((ones @ x)[0] for x in arrays)


def _group_size(rows: int) -> int:
    """Returns the largest quick number that divides the rows, or the largest quick one."""
    divisors = [size for size in _QUICK_GROUPS if rows % size == 0]
    return max(divisors, default=max(_QUICK_GROUPS))


def _add_each(left: Sequence[Any], right: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))
