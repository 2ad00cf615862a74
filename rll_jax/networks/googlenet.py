"""GoogLeNet-V2 (BN-Inception, Ioffe & Szegedy 2015), the paper's network, and its Caffe names.

Modules are made in the scope of the caller.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from rll_jax.networks._stages import ModuleMaker, cached_ends
from rll_jax.networks.normalization import relu
from rll_jax.networks.pooling import avg_pool, max_pool


class Channels(NamedTuple):
    """The channels of the convolutions in an inception block.

    A block without a 1x1 convolution has stride 2, and a max pool instead of the pool projection.
    """

    conv1x1: int
    reduce3x3: int
    conv3x3: int
    double_reduce3x3: int
    double3x3: int
    pool_projection: int


INCEPTIONS = {
    "3a": Channels(64, 64, 64, 64, 96, 32),
    "3b": Channels(64, 64, 96, 64, 96, 64),
    "3c": Channels(0, 128, 160, 64, 96, 0),
    "4a": Channels(224, 64, 96, 96, 128, 128),
    "4b": Channels(192, 96, 128, 96, 128, 128),
    "4c": Channels(160, 128, 160, 128, 160, 128),
    "4d": Channels(96, 128, 192, 160, 192, 128),
    "4e": Channels(0, 128, 192, 192, 256, 0),
    "5a": Channels(352, 192, 320, 160, 224, 128),
    "5b": Channels(352, 192, 320, 192, 224, 128),
}
_ENDS_OF_STAGES = ("3c", "4e", "5b")
MAX_POOLED = "5b"  # its pool is a maximum in the Caffe model; the other blocks' are averages
_PREFIX = "inception_"


@dataclasses.dataclass(frozen=True)
class GoogLeNetV2Config:
    """BN-Inception as its Caffe model has it, as a `rll_jax.typing.Backbone`.

    Its stages 1, 2 and 3 end with the inception blocks 3c, 4e and 5b.

    Args:
      width: the share of the published numbers of channels.
      mean: the mean of the BGR values 0-255 that the weights expect.
      std: the standard deviation that goes with `mean`.
    """

    width: float = 1.0
    mean: tuple[float, ...] = (104.0, 117.0, 128.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    def bgr(self) -> bool:
        """True: the published weights expect blue, green, red."""
        return True

    @property
    def num_stages(self) -> int:
        """The number of stages."""
        return len(_ENDS_OF_STAGES)

    def stage_of(self, module: str) -> int:
        """Returns the stage, from 1, of a top-level module by its name; 0 for the stem."""
        if not module.startswith(_PREFIX):
            return 0
        blocks = list(INCEPTIONS)
        block = blocks.index(module.removeprefix(_PREFIX))
        return 1 + sum(blocks.index(end) < block for end in _ENDS_OF_STAGES)

    def array_name(self, modules: Sequence[str]) -> str:
        """Returns the Caffe model's name of a module: inception_3a_3x3_reduce_bn.

        Args:
          modules: the names on the module's path: ("inception_3a", "3x3_reduce", "bn").
        """
        return "_".join(modules).removesuffix("_conv")

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
        cached = len(ends)
        for name in INCEPTIONS:
            stage = self.stage_of(_PREFIX + name)
            if stage <= cached:
                continue
            make_block = nn.remat(_Inception) if stage in remat else _Inception
            x = make_block(
                self.channels(name), name == MAX_POOLED, conv, norm, name=_PREFIX + name
            )(x)
            if name in _ENDS_OF_STAGES:
                x = lax.stop_gradient(x) if stage <= frozen else x
                ends.append(x)
        return ends

    def _stem(self, x: jax.Array, conv: ModuleMaker, norm: ModuleMaker) -> jax.Array:
        """Returns the input of the first stage from (B, H, W, 3) normalised images."""
        x = _ConvUnit(self.scaled(64), 7, 2, conv, norm, name="conv1_7x7_s2")(x)
        x = _caffe_max_pool(x)
        x = _ConvUnit(self.scaled(64), 1, 1, conv, norm, name="conv2_3x3_reduce")(x)
        x = _ConvUnit(self.scaled(192), 3, 1, conv, norm, name="conv2_3x3")(x)
        return _caffe_max_pool(x)

    def channels(self, name: str) -> Channels:
        """Returns the channels of an inception block of this network by its name, such as "3a"."""
        return Channels(*map(self.scaled, INCEPTIONS[name]))

    def scaled(self, published: int) -> int:
        """Returns the number of channels here where the Caffe model has `published`."""
        return round(self.width * published)


class _ConvUnit(nn.Module):
    """A convolution, its batch norm and a ReLU."""

    features: int
    kernel: int
    strides: int
    conv: ModuleMaker
    norm: ModuleMaker

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(
            self.features,
            (self.kernel, self.kernel),
            (self.strides, self.strides),
            padding=[(self.kernel // 2, self.kernel // 2)] * 2,
            name="conv",
        )(x)
        return relu(self.norm(name="bn")(x))


class _Inception(nn.Module):
    """An inception block: branches side by side, whose channels are concatenated.

    Args:
      channels: the channels of the convolutions.
      max_pool: whether the pool before the pool projection is a maximum, not an average.
      conv: makes a convolution.
      norm: makes a batch norm.
    """

    channels: Channels
    max_pool: bool
    conv: ModuleMaker
    norm: ModuleMaker

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = self.channels
        strides = 1 if channels.conv1x1 else 2
        a = self._unit(channels.reduce3x3, 1, 1, "3x3_reduce")(x)
        a = self._unit(channels.conv3x3, 3, strides, "3x3")(a)
        b = self._unit(channels.double_reduce3x3, 1, 1, "double_3x3_reduce")(x)
        b = self._unit(channels.double3x3, 3, 1, "double_3x3_1")(b)
        b = self._unit(channels.double3x3, 3, strides, "double_3x3_2")(b)
        if not channels.conv1x1:
            return jnp.concatenate([a, b, _caffe_max_pool(x, a.shape[1:3])], axis=-1)
        pool = max_pool if self.max_pool else avg_pool
        pooled = pool(x, (3, 3), padding=[(1, 1)] * 2)
        pooled = self._unit(channels.pool_projection, 1, 1, "pool_proj")(pooled)
        first = self._unit(channels.conv1x1, 1, 1, "1x1")(x)
        return jnp.concatenate([first, a, b, pooled], axis=-1)

    def _unit(self, features: int, kernel: int, strides: int, name: str) -> _ConvUnit:
        return _ConvUnit(features, kernel, strides, self.conv, self.norm, name=name)


def _caffe_max_pool(x: jax.Array, sides: Sequence[int] | None = None) -> jax.Array:
    """Pools 3x3 maxima with stride 2, by default to maps whose sides are rounded up as by Caffe.

    The last windows may hang over the edge of the map.

    Args:
      x: (B, h, w, channels).
      sides: the height and width of the result, or None for Caffe's rounding.
    """
    if sides is None:
        sides = [-(-(side - 3) // 2) + 1 for side in x.shape[1:3]]
    overhangs = [
        max(0, (after - 1) * 2 + 3 - before)
        for before, after in zip(x.shape[1:3], sides, strict=True)
    ]
    padding = [(overhang // 2, overhang - overhang // 2) for overhang in overhangs]
    return max_pool(x, (3, 3), (2, 2), padding=padding)
