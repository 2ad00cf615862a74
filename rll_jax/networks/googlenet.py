"""GoogLeNet-V2 (BN-Inception, Ioffe & Szegedy 2015), the paper's network, in the names of its Caffe model.

Modules are made in the scope of the caller, under the names that weights are published with.
"""

import dataclasses
from typing import Any

from flax import linen as nn
from jax import lax
import jax.numpy as jnp

from rll_jax.networks._stages import given_ends

# Channels of each inception: 1x1; 3x3 reduce, 3x3; double 3x3 reduce, double 3x3; pool projection. No 1x1: stride 2 and a max pool.
_INCEPTIONS = {
    "3a": (64, 64, 64, 64, 96, 32), "3b": (64, 64, 96, 64, 96, 64), "3c": (0, 128, 160, 64, 96, 0),
    "4a": (224, 64, 96, 96, 128, 128), "4b": (192, 96, 128, 96, 128, 128), "4c": (160, 128, 160, 128, 160, 128),
    "4d": (96, 128, 192, 160, 192, 128), "4e": (0, 128, 192, 192, 256, 0),
    "5a": (352, 192, 320, 160, 224, 128), "5b": (352, 192, 320, 192, 224, 128),
}  # fmt: skip
_INCEPTION_ENDS = ("3c", "4e", "5b")


@dataclasses.dataclass(frozen=True)
class GoogLeNetV2Config:
    """BN-Inception as its Caffe model has it; the last block's pool is a maximum there, the others' averages.

    Args:
      width: share of the published channels.
      mean, std: of the values 0-255 that the weights expect, in the order of their channels.
    """

    width: float = 1.0
    mean: tuple[float, ...] = (104.0, 117.0, 128.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    bgr = True  # the order of the channels that the published weights expect
    num_stages = len(_INCEPTION_ENDS)

    def stage_of(self, module: str) -> int:
        """The stage, from 1, of a module of this network by its name; 0 for the stem."""
        if not module.startswith("inception_"):
            return 0
        order = list(_INCEPTIONS)
        return 1 + sum(
            order.index(end) < order.index(module[len("inception_") :]) for end in _INCEPTION_ENDS
        )

    def stage_ends(self, x, conv, norm, remat=(), frozen=0) -> list:
        """The maps at the ends of inception 3c, 4e and 5b: stages 1, 2, 3 for `x`, `remat` and `frozen`, with all blocks since the one
        before; see `ResNetConfig.ends`.
        """
        ends, x = given_ends(x) if isinstance(x, dict) else ([], self._stem(x, conv, norm))
        there = len(ends)
        for name, channels in _INCEPTIONS.items():
            if self.stage_of(f"inception_{name}") <= there:
                continue
            block_class = nn.remat(_Inception) if len(ends) + 1 in remat else _Inception
            channels = tuple(map(self._channels, channels))
            x = block_class(channels, name == "5b", conv, norm, name=f"inception_{name}")(x)
            if name in _INCEPTION_ENDS:
                x = lax.stop_gradient(x) if len(ends) < frozen else x
                ends.append(x)
        return ends

    def _stem(self, x, conv, norm):
        x = _ConvUnit(self._channels(64), 7, 2, conv, norm, name="conv1_7x7_s2")(x)
        x = _ceil_max_pool(x)
        x = _ConvUnit(self._channels(64), 1, 1, conv, norm, name="conv2_3x3_reduce")(x)
        x = _ConvUnit(self._channels(192), 3, 1, conv, norm, name="conv2_3x3")(x)
        return _ceil_max_pool(x)

    def _channels(self, published: int) -> int:
        return round(self.width * published)


class _ConvUnit(nn.Module):
    features: int
    kernel: int
    strides: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        pad = [(self.kernel // 2, self.kernel // 2)] * 2
        kernel, strides = (self.kernel, self.kernel), (self.strides, self.strides)
        return nn.relu(
            self.norm(name="bn")(
                self.conv(self.features, kernel, strides, padding=pad, name="conv")(x)
            )
        )


class _Inception(nn.Module):
    channels: tuple[int, ...]
    max_pool: bool
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        def unit(features, kernel, strides, name):
            return _ConvUnit(features, kernel, strides, self.conv, self.norm, name=name)

        one, three_reduce, three, double_reduce, double, pool = self.channels
        strides = 1 if one else 2
        a = unit(three, 3, strides, "3x3")(unit(three_reduce, 1, 1, "3x3_reduce")(x))
        b = unit(double, 3, 1, "double_3x3_1")(unit(double_reduce, 1, 1, "double_3x3_reduce")(x))
        b = unit(double, 3, strides, "double_3x3_2")(b)
        if not one:
            return jnp.concatenate([a, b, _ceil_max_pool(x, a.shape[1:3])], axis=-1)
        around = [(1, 1)] * 2
        pooled = (
            nn.max_pool(x, (3, 3), padding=around)
            if self.max_pool
            else nn.avg_pool(x, (3, 3), padding=around)
        )
        first = unit(one, 1, 1, "1x1")(x)
        return jnp.concatenate([first, a, b, unit(pool, 1, 1, "pool_proj")(pooled)], axis=-1)


def _ceil_max_pool(x, sides=None):
    """3x3, stride 2, to maps of `sides`; as Caffe rounds by default: the last window may hang over the edge."""
    sides = sides or [-(-(side - 3) // 2) + 1 for side in x.shape[1:3]]
    over = [max(0, (to - 1) * 2 + 3 - side) for side, to in zip(x.shape[1:3], sides)]
    return nn.max_pool(x, (3, 3), (2, 2), padding=[(o // 2, o - o // 2) for o in over])
