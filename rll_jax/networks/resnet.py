"""ResNet (He et al. 2016) by configuration, in torchvision's names.

Modules are made in the scope of the caller, under the names that weights are published with.
"""

import dataclasses
from typing import Any

from flax import linen as nn
from jax import lax

from rll_jax.networks._stages import given_ends

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


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
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    bgr = False  # the order of the channels that published weights expect

    def __post_init__(self):
        if not self.stage_sizes or min(self.stage_sizes) < 1:
            raise ValueError(
                f"stage_sizes={self.stage_sizes}: expected one or more blocks for each stage, such as (3, 4, 6, 3)"
            )
        if self.width < 1 or self.stem_pool < 1:
            raise ValueError(f"width={self.width}, stem_pool={self.stem_pool}: expected at least 1")

    @property
    def num_stages(self) -> int:
        return len(self.stage_sizes)

    def stage_of(self, module: str) -> int:
        """The stage, from 1, of a module of this network by its name; 0 for the stem."""
        return int(module[len("layer") :].split("_")[0]) if module.startswith("layer") else 0

    def stage_ends(self, x, conv, norm, remat=(), frozen=0) -> list:
        """The maps at the ends of the stages, of images or, by {stage: map}, of the ends of some first stages, the last of which goes on.

        Blocks of the stages in `remat` (from 1) are computed again for the gradient, which does not reach the first `frozen` ones.
        """
        ends, x = given_ends(x) if isinstance(x, dict) else ([], self._stem(x, conv, norm))
        for stage, blocks in enumerate(self.stage_sizes[len(ends) :], start=len(ends) + 1):
            block_class = nn.remat(ResNetBlock) if stage in remat else ResNetBlock
            for block in range(blocks):
                strides = 2 if stage > 1 and block == 0 else 1
                x = block_class(
                    self,
                    self.width << (stage - 1),
                    strides,
                    conv,
                    norm,
                    name=f"layer{stage}_{block}",
                )(x)
            x = lax.stop_gradient(x) if stage <= frozen else x
            ends.append(x)
        return ends

    def _stem(self, x, conv, norm):
        kernel, strides, pad = (3, 1, 1) if self.small_images else (7, 2, 3)
        x = conv(
            self.width, (kernel, kernel), (strides, strides), padding=[(pad, pad)] * 2, name="conv1"
        )(x)
        x = nn.relu(norm(name="bn1")(x))
        if self.small_images:
            return nn.avg_pool(x, (self.stem_pool,) * 2, (self.stem_pool,) * 2)
        return nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1)] * 2)


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
            y = self.conv(
                self.features * widen,
                (kernel, kernel),
                (strides, strides),
                padding=pad,
                name=f"conv{i}",
            )(y)
            y = self.norm(name=f"bn{i}")(y)
            y = nn.relu(y) if i < len(kernels) else y
        if self.strides != 1 or x.shape[-1] != y.shape[-1]:
            strides = (self.strides, self.strides)
            x = self.conv(y.shape[-1], (1, 1), strides, padding="VALID", name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x)
        return nn.relu(x + y)
