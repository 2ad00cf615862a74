"""ResNet (He et al. 2016) by configuration, and the names of its published weights.

Modules are made in the scope of the caller.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import lax
import numpy as np

from rll_jax.networks import drop_path as drop_path_lib
from rll_jax.networks._stages import ModuleMaker, cached_ends
from rll_jax.networks.normalization import relu
from rll_jax.networks.pooling import (
    NO_PADDING,
    PoolRounding,
    avg_pool,
    last_window_padding,
    max_pool,
)

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_PUBLISHED = {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A ResNet, as a `rll_jax.typing.Backbone`.

    Args:
      stage_sizes: the number of blocks in each stage. The number of channels doubles from stage to
        stage.
      bottleneck: whether a block has three convolutions, the last with four times the channels,
        instead of two.
      width: the number of channels in the first stage.
      small_images: whether the stem is a 3x3 convolution of stride 1 and an average pool, instead
        of a 7x7 convolution of stride 2 and a max pool.
      stem_pool: the side of the average pool in the stem for small images.
      stride_in_first: whether a bottleneck has its stride in the first 1x1 convolution (v1: Caffe,
        Keras) instead of in the 3x3 convolution (v1.5: torchvision, timm).
      mean: the mean of the RGB values 0-255 that the weights expect.
      std: the standard deviation that goes with `mean`.
      pool_rounding: whether the average pool in the stem rounds the number of its windows "up", so
        that maps with odd sides lose no edge, or "down".
      drop_path: the share of images that skip the last block's branch in training; the others'
        grow linearly to it from 0 at the first. Frozen stages skip none. Random numbers
        named "drop_path" say which, as `apply(..., rngs={"drop_path": key})`; without, none.

    Raises:
      ValueError: there is no stage, a stage size, the width or the pool is below 1, or `drop_path`
        is out of range.
    """

    stage_sizes: tuple[int, ...]
    bottleneck: bool = False
    width: int = 64
    small_images: bool = False
    stem_pool: int = 1
    stride_in_first: bool = False
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    pool_rounding: PoolRounding = "up"
    # Not in the names of cached features, which it does not change.
    drop_path: float = dataclasses.field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        if not self.stage_sizes or min(self.stage_sizes) < 1:
            raise ValueError(
                f"stage_sizes={self.stage_sizes}: expected one or more blocks for each stage, "
                "such as (3, 4, 6, 3)"
            )
        if self.width < 1 or self.stem_pool < 1:
            raise ValueError(f"width={self.width}, stem_pool={self.stem_pool}: expected at least 1")
        drop_path_lib.check(self.drop_path)

    @property
    def bgr(self) -> bool:
        """False: published weights expect red, green, blue."""
        return False

    @property
    def num_stages(self) -> int:
        """The number of stages."""
        return len(self.stage_sizes)

    def stage_of(self, module: str) -> int:
        """Returns the stage, from 1, of a top-level module by its name; 0 for the stem."""
        if not module.startswith("layer"):
            return 0
        stage, _, _ = module.removeprefix("layer").partition("_")
        return int(stage)

    def array_name(self, modules: Sequence[str]) -> str:
        """Returns torchvision's and timm's name of a module: layer1.0.downsample.0.

        Args:
          modules: the names on the module's path: ("layer1_0", "downsample_conv").
        """
        first, *inner = modules
        block = first.split("_") if self.stage_of(first) else [first]
        return ".".join([*block, *(_PUBLISHED.get(name, name) for name in inner)])

    def from_published(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the arrays: their published names are those of `array_name`."""
        return dict(arrays)

    def stage_ends(
        self,
        x: jax.Array | Mapping[int, jax.Array],
        conv: ModuleMaker,
        norm: ModuleMaker,
        remat: Sequence[int] = (),
        frozen: int = 0,
    ) -> list[jax.Array | None]:
        """Returns the feature map at the end of every stage; see `rll_jax.typing.Backbone`."""
        if isinstance(x, Mapping):
            ends, x = cached_ends(x)
        else:
            ends, x = [], self._stem(x, conv, norm)
        for stage in range(len(ends) + 1, self.num_stages + 1):
            make_block = nn.remat(ResNetBlock) if stage in remat else ResNetBlock
            for block in range(self.stage_sizes[stage - 1]):
                number = sum(self.stage_sizes[: stage - 1]) + block
                x = make_block(
                    self,
                    features=self.width << (stage - 1),
                    strides=2 if stage > 1 and block == 0 else 1,
                    conv=conv,
                    norm=norm,
                    drop_path=drop_path_lib.rate_of(
                        self.drop_path, number, sum(self.stage_sizes), stage <= frozen
                    ),
                    name=f"layer{stage}_{block}",
                )(x)
            x = lax.stop_gradient(x) if stage <= frozen else x
            ends.append(x)
        return ends

    def _stem(self, x: jax.Array, conv: ModuleMaker, norm: ModuleMaker) -> jax.Array:
        """Returns the input of the first stage from (B, H, W, 3) normalised images."""
        kernel, strides, padding = (3, 1, 1) if self.small_images else (7, 2, 3)
        x = conv(
            self.width,
            (kernel, kernel),
            (strides, strides),
            padding=[(padding, padding)] * 2,
            name="conv1",
        )(x)
        x = relu(norm(name="bn1")(x))
        if self.small_images:
            window = (self.stem_pool, self.stem_pool)
            padding = last_window_padding(x.shape[1:3], window, window, self.pool_rounding)
            return avg_pool(x, window, window, padding, count_include_pad=padding == NO_PADDING)
        return max_pool(x, (3, 3), (2, 2), padding=[(1, 1)] * 2)


class _Convolution(NamedTuple):
    """A convolution of a block."""

    kernel: int
    strides: int
    widening: int  # its channels, in units of the block's `features`


class ResNetBlock(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3 and 1x1 in a bottleneck, and a shortcut.

    Args:
      config: the network that the block belongs to.
      features: the number of channels of the convolutions. A bottleneck ends with four times it.
      strides: the stride of the block.
      conv: makes a convolution.
      norm: makes a batch norm.
      drop_path: the share of images that skip the branch while the network trains.
    """

    config: ResNetConfig
    features: int
    strides: int
    conv: ModuleMaker
    norm: ModuleMaker
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, h / strides, w / strides, channels) from (B, h, w, channels)."""
        convolutions = self._convolutions()
        y = x
        for number, (kernel, strides, widening) in enumerate(convolutions, start=1):
            y = self.conv(
                self.features * widening,
                (kernel, kernel),
                (strides, strides),
                padding=[(kernel // 2, kernel // 2)] * 2,
                name=f"conv{number}",
            )(y)
            y = self.norm(name=f"bn{number}")(y)
            y = relu(y) if number < len(convolutions) else y
        if self.strides != 1 or x.shape[-1] != y.shape[-1]:
            strides = (self.strides, self.strides)
            x = self.conv(y.shape[-1], (1, 1), strides, padding="VALID", name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x)
        return relu(x + drop_path_lib.drop(self, y, self.drop_path))

    def _convolutions(self) -> list[_Convolution]:
        if not self.config.bottleneck:
            return [_Convolution(3, self.strides, 1), _Convolution(3, 1, 1)]
        if self.config.stride_in_first:
            first, second = self.strides, 1
        else:
            first, second = 1, self.strides
        return [_Convolution(1, first, 1), _Convolution(3, second, 1), _Convolution(1, 1, 4)]
