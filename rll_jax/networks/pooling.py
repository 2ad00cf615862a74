"""Max and average pools, as in Flax, but fast on CPUs too.

XLA's CPU compiler computes the gradients of pools one value at a time. On a CPU, pools and their
gradients are maxima and sums of slices here, of which it makes vector instructions. On every other
platform the program is that of `flax.linen.max_pool` and `flax.linen.avg_pool`.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
import math
import operator
from typing import Literal, NamedTuple, get_args

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

PoolRounding = Literal["up", "down"]
POOL_ROUNDINGS: tuple[PoolRounding, ...] = get_args(PoolRounding)
NO_PADDING = ((0, 0), (0, 0))

# Returns from (place in the window, slice of the windows) what these windows give to the values
# that they have at this place.
_Share = Callable[[int, tuple[slice, slice, slice]], jax.Array]


class _Window(NamedTuple):
    """The window of a pool: its two sides, strides and pads, as Flax takes them."""

    window_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, ...], ...]


def max_pool(
    x: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] = (1, 1),
    padding: Sequence[Sequence[int]] = NO_PADDING,
) -> jax.Array:
    """Returns the maxima of windows of maps. The gradient goes to the first maximum, row by row.

    Where a window holds NaN, its maximum is NaN, and the gradient may go to another value.

    Args:
      x: (B, H, W, C) floating.
      window_shape: the height and width of a window.
      strides: the steps from one window to the next.
      padding: how far windows reach over the edges of a map, before and after each side. A maximum
        is never there.

    Returns:
      (B, h, w, C) of the same dtype.

    Raises:
      ValueError: a pad is as large as the window's side, or larger.
    """
    return _max_pool(x, _window(window_shape, strides, padding))


def avg_pool(
    x: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] = (1, 1),
    padding: Sequence[Sequence[int]] = NO_PADDING,
    count_include_pad: bool = True,
) -> jax.Array:
    """Returns the means of windows of maps.

    Args:
      x: (B, H, W, C) floating.
      window_shape: the height and width of a window.
      strides: the steps from one window to the next.
      padding: how far windows reach over the edges of a map, before and after each side.
      count_include_pad: whether what is beyond the edges counts as zeros. Otherwise a window
        averages what it holds of the map.

    Returns:
      (B, h, w, C) of the same dtype.

    Raises:
      ValueError: a pad is as large as the window's side, or larger.
    """
    return _avg_pool(x, _window(window_shape, strides, padding), count_include_pad)


def last_window_padding(
    sides: Sequence[int],
    window_shape: Sequence[int],
    strides: Sequence[int],
    rounding: PoolRounding,
) -> tuple[tuple[int, int], ...]:
    """Returns the padding that gives a pool Caffe's number of windows.

    Caffe rounds the number of windows up, so that every row and column is in a window, unless the
    stride is larger than the window. The last window then hangs over the edge. PyTorch does so with
    `ceil_mode=True`.

    Args:
      sides: the height and width of the maps, at least those of a window.
      window_shape: the height and width of a window.
      strides: the steps from one window to the next.
      rounding: "up" as Caffe; or "down", which gives no padding.

    Returns:
      ((0, rows), (0, columns)), below the window's sides.

    Raises:
      ValueError: another rounding.
    """
    if rounding not in POOL_ROUNDINGS:
        raise ValueError(f"pool_rounding={rounding!r}: expected one of {', '.join(POOL_ROUNDINGS)}")
    if rounding == "down":
        return NO_PADDING
    overhangs = []
    for side, window, stride in zip(sides, window_shape, strides, strict=True):
        steps = math.ceil((side - window) / stride)
        if steps * stride >= side:  # a window that would begin beyond the edge
            steps -= 1
        overhangs.append(max(0, steps * stride + window - side))
    return tuple((0, overhang) for overhang in overhangs)


def _window(
    window_shape: Sequence[int], strides: Sequence[int], padding: Sequence[Sequence[int]]
) -> _Window:
    pads = tuple((before, after) for before, after in padding)
    if any(max(pair) >= side for pair, side in zip(pads, window_shape, strict=True)):
        raise ValueError(f"padding={pads}: expected pads below the window's sides {window_shape}")
    return _Window(tuple(window_shape), tuple(strides), pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, window: _Window) -> jax.Array:
    return lax.platform_dependent(
        x,
        cpu=lambda x: functools.reduce(jnp.maximum, _slices(x, window, -jnp.inf)),
        default=lambda x: _flax_pool(nn.max_pool, x, window),
    )


def _max_pool_forward(x: jax.Array, window: _Window) -> tuple[jax.Array, jax.Array]:
    return _max_pool(x, window), x


def _max_pool_backward(window: _Window, x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    def by_flax(x: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: _flax_pool(nn.max_pool, x, window), x)[1](gradient)[0]

    def on_cpu(x: jax.Array, gradient: jax.Array) -> jax.Array:
        values, *others = _slices(x, window, -jnp.inf)
        integer = jnp.int8 if _size(window) <= 127 else jnp.int32
        place_of_max = jnp.zeros(values.shape, integer)
        for place, there in enumerate(others, start=1):
            place_of_max = jnp.where(there > values, integer(place), place_of_max)
            values = jnp.maximum(values, there)
        place_of_max = _surrounded(place_of_max, window, -1)
        gradient = _surrounded(gradient, window, 0)

        def share(place: int, at: tuple[slice, slice, slice]) -> jax.Array:
            return jnp.where(place_of_max[at] == place, gradient[at], 0)

        return _sum_of_shares(share, x.shape, x.dtype, window)

    return (lax.platform_dependent(x, gradient, cpu=on_cpu, default=by_flax),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _avg_pool(x: jax.Array, window: _Window, with_pads: bool) -> jax.Array:
    def on_cpu(x: jax.Array) -> jax.Array:
        total = functools.reduce(operator.add, _slices(x, window, 0))
        return (total / counts).astype(x.dtype)

    counts = _counts(x, window, with_pads)
    return lax.platform_dependent(
        x, cpu=on_cpu, default=functools.partial(_flax_avg_pool, window=window, with_pads=with_pads)
    )


def _avg_pool_forward(
    x: jax.Array, window: _Window, with_pads: bool
) -> tuple[jax.Array, jax.Array]:
    return _avg_pool(x, window, with_pads), x


def _avg_pool_backward(
    window: _Window, with_pads: bool, x: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    def by_flax(gradient: jax.Array) -> jax.Array:
        pool = functools.partial(_flax_avg_pool, window=window, with_pads=with_pads)
        return jax.linear_transpose(pool, x)(gradient)[0]

    def on_cpu(gradient: jax.Array) -> jax.Array:
        if with_pads:
            shares = _surrounded(gradient, window, 0)
            total = _sum_of_shares(lambda _, at: shares[at], x.shape, x.dtype, window)
            return total / _size(window)
        divided = (gradient / _counts(x, window, with_pads)).astype(x.dtype)
        shares = _surrounded(divided, window, 0)
        return _sum_of_shares(lambda _, at: shares[at], x.shape, x.dtype, window)

    return (lax.platform_dependent(gradient, cpu=on_cpu, default=by_flax),)


_avg_pool.defvjp(_avg_pool_forward, _avg_pool_backward)


def _counts(x: jax.Array, window: _Window, with_pads: bool) -> int | jax.Array:
    """Returns the number of values that a window averages, or (1, h, w, 1) numbers."""
    if with_pads:
        return _size(window)
    along = []
    sides = zip(x.shape[1:3], *window, strict=True)
    for side, width, stride, (before, after) in sides:
        starts = np.arange(-before, side + after - width + 1, stride)
        along.append(np.minimum(starts + width, side) - np.maximum(starts, 0))
    return jnp.asarray(np.multiply.outer(*along)[None, ..., None], jnp.float32)


def _flax_avg_pool(x: jax.Array, window: _Window, with_pads: bool) -> jax.Array:
    pool = functools.partial(nn.avg_pool, count_include_pad=with_pads)
    return _flax_pool(pool, x, window).astype(x.dtype)


def _flax_pool(pool: Callable[..., jax.Array], x: jax.Array, window: _Window) -> jax.Array:
    return pool(x, window.window_shape, strides=window.strides, padding=window.padding)


def _size(window: _Window) -> int:
    return window.window_shape[0] * window.window_shape[1]


def _slices(x: jax.Array, window: _Window, fill: float) -> list[jax.Array]:
    """Returns what all windows hold at each place, row by row: as many (B, h, w, C) as places."""
    x = jnp.pad(x, ((0, 0), *window.padding, (0, 0)), constant_values=fill)
    stops = [a - b + 1 for a, b in zip(x.shape[1:3], window.window_shape, strict=True)]
    return [
        x[:, i : i + stops[0] : window.strides[0], j : j + stops[1] : window.strides[1]]
        for i, j in itertools.product(*map(range, window.window_shape))
    ]


def _surrounded(x: jax.Array, window: _Window, fill: int) -> jax.Array:
    """Pads (B, h, w, C) of windows so that `_sum_of_shares` can ask for windows beyond the map."""
    pads = [(side, side) for side in window.window_shape]
    return jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)


def _sum_of_shares(
    share: _Share, shape: Sequence[int], dtype: DTypeLike, window: _Window
) -> jax.Array:
    """Returns the gradient of (B, H, W, C) maps from the shares of all windows that hold a value.

    Values whose row and column leave the same remainders, divided by the strides, have the same
    places in their windows. They are computed together.
    """
    vertical, horizontal = (_windows_of_remainders(shape[1:3], window, axis) for axis in (0, 1))
    columns = window.window_shape[1]
    counts = [-(-side // stride) for side, stride in zip(shape[1:3], window.strides, strict=True)]
    nothing = jnp.zeros((shape[0], *counts, shape[3]), dtype)
    lines = []
    for above in vertical:
        line = []
        for left in horizontal:
            shares = [
                share(i * columns + j, (slice(None), rows, cols))
                for (i, rows), (j, cols) in itertools.product(above, left)
            ]
            line.append(functools.reduce(operator.add, shares, nothing))
        lines.append(jnp.stack(line, axis=3))
    together = jnp.stack(lines, axis=2)
    batch, height, strides_down, width, strides_right, channels = together.shape
    whole = together.reshape(batch, height * strides_down, width * strides_right, channels)
    return whole[:, : shape[1], : shape[2]]


def _windows_of_remainders(
    sides: Sequence[int], window: _Window, axis: int
) -> list[list[tuple[int, slice]]]:
    """Returns for each remainder the places that its values have, and in which windows.

    Args:
      sides: the sides of the map.
      window: the pool.
      axis: 0 for rows, 1 for columns.

    Returns:
      A list of (place, slice of `_surrounded` windows) for each remainder.
    """
    size, stride = window.window_shape[axis], window.strides[axis]
    before, count = window.padding[axis][0], -(-sides[axis] // stride)
    remainders = []
    for remainder in range(stride):
        found = []
        for place in range((remainder + before) % stride, size, stride):
            first = (remainder + before - place) // stride + size
            found.append((place, slice(first, first + count)))
        remainders.append(found)
    return remainders
