"""Backbones in Flax linen: from pixels to the feature maps that the levels L, M and H are taken from.

ResNet (He et al. 2016) by configuration, in torchvision's names; GoogLeNet-V2 (BN-Inception, Ioffe & Szegedy 2015), the paper's
own, in the names of its Caffe model. Modules are made in the scope of the caller, under the names that weights are published with.
"""
import dataclasses
from typing import Any

from flax import linen as nn
from jax import lax
import jax.numpy as jnp

_IMAGENET_MEAN, _IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_CAFFE_MEAN, _NO_STD = (123.68, 116.779, 103.939), (1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A ResNet.

    Args:
      stage_sizes: blocks of each stage; the number of channels doubles from stage to stage.
      bottleneck: three convolutions a block, with four times the width at the end, instead of two.
      width: channels of the first stage.
      small_images: a 3x3 stem of stride 1 instead of 7x7, stride 2 and a max pool.
      stem_pool: side of the average pool after the small images' stem.
      stride_in_first: a bottleneck's stride in its first 1x1 convolution (v1: Caffe, Keras) instead of the 3x3 (v1.5:
        torchvision, timm).
      mean, std: of the RGB values 0-255 that the weights expect.

    Raises:
      ValueError: no stage, or sizes, a width or a pool below 1.
    """

    stage_sizes: tuple[int, ...]
    bottleneck: bool = False
    width: int = 64
    small_images: bool = False
    stem_pool: int = 1
    stride_in_first: bool = False
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    bgr = False  # the order of the channels that published weights expect

    def __post_init__(self):
        if not self.stage_sizes or min(self.stage_sizes) < 1:
            raise ValueError(f"stage_sizes={self.stage_sizes}: expected one or more blocks for each stage, such as (3, 4, 6, 3)")
        if self.width < 1 or self.stem_pool < 1:
            raise ValueError(f"width={self.width}, stem_pool={self.stem_pool}: expected at least 1")

    @property
    def num_ends(self) -> int:
        return len(self.stage_sizes)

    def stage_of(self, module: str) -> int:
        """The stage, from 1, of a module of this network by its name; 0 for the stem."""
        return int(module[len("layer") :].split("_")[0]) if module.startswith("layer") else 0

    def ends(self, x, conv, norm, remat=(), frozen=0) -> list:
        """The maps at the ends of the stages, of images or, by {stage: map}, of the ends of some first stages, the last of which goes on.

        Blocks of the stages in `remat` (from 1) are computed again for the gradient, which does not reach the first `frozen` ones.
        """
        ends, x = _given_ends(x) if isinstance(x, dict) else ([], self._stem(x, conv, norm))
        for stage, blocks in enumerate(self.stage_sizes[len(ends) :], start=len(ends) + 1):
            block_class = nn.remat(ResNetBlock) if stage in remat else ResNetBlock
            for block in range(blocks):
                strides = 2 if stage > 1 and block == 0 else 1
                x = block_class(self, self.width << (stage - 1), strides, conv, norm, name=f"layer{stage}_{block}")(x)
            x = lax.stop_gradient(x) if stage <= frozen else x
            ends.append(x)
        return ends

    def _stem(self, x, conv, norm):
        kernel, strides, pad = (3, 1, 1) if self.small_images else (7, 2, 3)
        x = conv(self.width, (kernel, kernel), (strides, strides), padding=[(pad, pad)] * 2, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x))
        if self.small_images:
            return nn.avg_pool(x, (self.stem_pool,) * 2, (self.stem_pool,) * 2)
        return nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1)] * 2)


def _given_ends(maps: dict) -> tuple[list, Any]:
    """Those of the stages up to the last given, None where not given, and that last one."""
    last = max(maps)
    return [maps.get(stage) for stage in range(1, last + 1)], maps[last]


class ResNetBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 where bottleneck, around a shortcut."""

    config: ResNetConfig
    features: int
    strides: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        first, second = (self.strides, 1) if self.config.stride_in_first else (1, self.strides)
        kernels = ((3, self.strides, 1), (3, 1, 1))
        if self.config.bottleneck:
            kernels = ((1, first, 1), (3, second, 1), (1, 1, 4))
        y = x
        for i, (kernel, strides, widen) in enumerate(kernels, start=1):
            pad = [(kernel // 2, kernel // 2)] * 2
            y = self.conv(self.features * widen, (kernel, kernel), (strides, strides), padding=pad, name=f"conv{i}")(y)
            y = self.norm(name=f"bn{i}")(y)
            y = nn.relu(y) if i < len(kernels) else y
        if self.strides != 1 or x.shape[-1] != y.shape[-1]:
            strides = (self.strides, self.strides)
            x = self.conv(y.shape[-1], (1, 1), strides, padding="VALID", name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x)
        return nn.relu(x + y)


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
    std: tuple[float, ...] = _NO_STD
    bgr = True  # the order of the channels that the published weights expect
    num_ends = len(_INCEPTION_ENDS)

    def stage_of(self, module: str) -> int:
        """The stage, from 1, of a module of this network by its name; 0 for the stem."""
        if not module.startswith("inception_"):
            return 0
        order = list(_INCEPTIONS)
        return 1 + sum(order.index(end) < order.index(module[len("inception_") :]) for end in _INCEPTION_ENDS)

    def ends(self, x, conv, norm, remat=(), frozen=0) -> list:
        """The maps at the ends of inception 3c, 4e and 5b: stages 1, 2, 3 for `x`, `remat` and `frozen`, with all blocks since the one
        before; see `ResNetConfig.ends`."""
        ends, x = _given_ends(x) if isinstance(x, dict) else ([], self._stem(x, conv, norm))
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
        return nn.relu(self.norm(name="bn")(self.conv(self.features, kernel, strides, padding=pad, name="conv")(x)))


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
        pooled = nn.max_pool(x, (3, 3), padding=around) if self.max_pool else nn.avg_pool(x, (3, 3), padding=around)
        first = unit(one, 1, 1, "1x1")(x)
        return jnp.concatenate([first, a, b, unit(pool, 1, 1, "pool_proj")(pooled)], axis=-1)


def _ceil_max_pool(x, sides=None):
    """3x3, stride 2, to maps of `sides`; as Caffe rounds by default: the last window may hang over the edge."""
    sides = sides or [-(-(side - 3) // 2) + 1 for side in x.shape[1:3]]
    over = [max(0, (to - 1) * 2 + 3 - side) for side, to in zip(x.shape[1:3], sides)]
    return nn.max_pool(x, (3, 3), (2, 2), padding=[(o // 2, o - o // 2) for o in over])


BACKBONES = {
    "resnet_tiny": ResNetConfig((1, 1), width=8, small_images=True),  # for tests: seconds to compile, nothing learnt
    "resnet_smaller": ResNetConfig((1, 1, 1), width=16, small_images=True, stem_pool=2),  # comparisons of many runs on a CPU
    "resnet_small": ResNetConfig((1, 1, 1), width=32, small_images=True, stem_pool=2),
    "resnet_medium": ResNetConfig((1, 1, 1), width=64, small_images=True, stem_pool=2),
    "resnet18_small": ResNetConfig((2, 2, 2, 2), small_images=True),
    "resnet18": ResNetConfig((2, 2, 2, 2)),
    "resnet34": ResNetConfig((3, 4, 6, 3)),
    "resnet50": ResNetConfig((3, 4, 6, 3), bottleneck=True),
    "resnet50_v1": ResNetConfig((3, 4, 6, 3), bottleneck=True, stride_in_first=True, mean=_CAFFE_MEAN, std=_NO_STD),
    "resnet101": ResNetConfig((3, 4, 23, 3), bottleneck=True),
    "resnet152": ResNetConfig((3, 8, 36, 3), bottleneck=True),
    "googlenet_v2": GoogLeNetV2Config(),
}
