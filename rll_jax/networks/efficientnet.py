"""EfficientNet-Lite (Tan & Le 2019; Liu 2020) by configuration, and the names of its weights.

They are EfficientNets without squeeze and excitation, with ReLU6: networks for CPUs. Modules are
made in the scope of the caller.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import lax
import numpy as np

from rll_jax.networks import drop_path as drop_path_lib
from rll_jax.networks._stages import ModuleMaker, cached_ends
from rll_jax.networks.normalization import relu6

STEM, HEAD = 32, 1280  # channels, whatever the width
EPSILON = 1e-3  # of the batch norms

# EfficientNet-PyTorch's names of layers, which begin with "_", and timm's.
_OTHERS = re.compile(r"(?<![^.])(?:_blocks\.(\d+)\.)?_((?:conv|bn|expand|depthwise|project)\w*)")
_TO_TIMM = {"conv_stem": "conv_stem", "bn0": "bn1", "conv_head": "conv_head", "bn1": "bn2"}
_BLOCK_TO_TIMM = {
    "expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2",
    "project_conv": "conv_pwl", "bn2": "bn3",
}  # fmt: skip
_FIRST_BLOCK_TO_TIMM = {"depthwise_conv": "conv_dw", "project_conv": "conv_pw"}


class Group(NamedTuple):
    """Blocks of one width."""

    stage: int
    blocks: int
    kernel: int
    strides: int
    expansion: int
    channels: int


_GROUPS = (
    Group(1, 1, 3, 1, 1, 16),
    Group(2, 2, 3, 2, 6, 24),
    Group(3, 2, 5, 2, 6, 40),
    Group(4, 3, 3, 2, 6, 80),
    Group(4, 3, 5, 1, 6, 112),
    Group(5, 4, 5, 2, 6, 192),
    Group(5, 1, 3, 1, 6, 320),
)


@dataclasses.dataclass(frozen=True)
class EfficientNetLiteConfig:
    """An EfficientNet-Lite, as a `rll_jax.typing.Backbone`.

    A stage ends before a map is halved; the last has the 1x1 convolution to 1280 channels too.

    Args:
      width: what the numbers of channels are multiplied with, and rounded to a multiple of 8. The
        stem's and the last keep theirs.
      depth: what the numbers of blocks are multiplied with, and rounded up. The first and the last
        group of blocks keep theirs.
      mean: the mean of the RGB values 0-255 that the weights expect.
      std: the standard deviation that goes with `mean`.
      drop_path: as for `rll_jax.networks.resnet.ResNetConfig`.

    Raises:
      ValueError: `width` or `depth` is not above 0, or `drop_path` is out of range.
    """

    width: float = 1.0
    depth: float = 1.0
    mean: tuple[float, ...] = (127.0, 127.0, 127.0)
    std: tuple[float, ...] = (128.0, 128.0, 128.0)
    # Not in the names of cached features, which it does not change.
    drop_path: float = dataclasses.field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        if not (self.width > 0 and self.depth > 0):
            raise ValueError(f"width={self.width}, depth={self.depth}: expected more than 0")
        drop_path_lib.check(self.drop_path)

    @property
    def bgr(self) -> bool:
        """False: published weights expect red, green, blue."""
        return False

    @property
    def num_stages(self) -> int:
        """The number of stages."""
        return _GROUPS[-1].stage

    def stage_of(self, module: str) -> int:
        """Returns the stage, from 1, of a top-level module by its name; 0 for the stem."""
        kind, *numbers = module.split("_")
        if kind == "blocks":
            return _GROUPS[int(numbers[0])].stage
        return self.num_stages if module in ("conv_head", "bn2") else 0

    def array_name(self, modules: Sequence[str]) -> str:
        """Returns timm's name of a module: blocks.1.0.conv_dw."""
        first, *inner = modules
        return ".".join([first.replace("_", ".") if first.startswith("blocks_") else first, *inner])

    def from_published(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns arrays under timm's names from those of EfficientNet-PyTorch, or as they are."""
        blocks = [(f"blocks.{place}.{block}.", group) for place, block, group in self.blocks()]

        def renamed(found: re.Match[str]) -> str:
            number, layer = found.groups()
            if number is None:
                return _TO_TIMM.get(layer, layer)
            if int(number) >= len(blocks):  # of a deeper network: its name tells
                return found[0]
            beginning, group = blocks[int(number)]
            names = _BLOCK_TO_TIMM if group.expansion > 1 else _FIRST_BLOCK_TO_TIMM
            return beginning + names.get(layer, layer)

        return {_OTHERS.sub(renamed, name): array for name, array in arrays.items()}

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
            x = conv(STEM, (3, 3), (2, 2), padding="SAME", name="conv_stem")(x)
            ends, x = [], relu6(norm(name="bn1", epsilon=EPSILON)(x))
        blocks = self.blocks()
        for stage in range(len(ends) + 1, self.num_stages + 1):
            make_block = nn.remat(InvertedBottleneck) if stage in remat else InvertedBottleneck
            for number, (place, block, group) in enumerate(blocks):
                if group.stage == stage:
                    x = make_block(
                        group._replace(strides=group.strides if block == 0 else 1),
                        conv=conv,
                        norm=norm,
                        drop_path=drop_path_lib.rate_of(
                            self.drop_path, number, len(blocks), stage <= frozen
                        ),
                        name=f"blocks_{place}_{block}",
                    )(x)
            if stage == self.num_stages:
                x = conv(HEAD, (1, 1), name="conv_head")(x)
                x = relu6(norm(name="bn2", epsilon=EPSILON)(x))
            x = lax.stop_gradient(x) if stage <= frozen else x
            ends.append(x)
        return ends

    def blocks(self) -> list[tuple[int, int, Group]]:
        """Returns the place of its group, its place there, and its group, for each block."""
        blocks = []
        for place, group in enumerate(_GROUPS):
            keeps_depth = group in (_GROUPS[0], _GROUPS[-1])
            group = group._replace(channels=_scaled_channels(group.channels, self.width))
            count = group.blocks if keeps_depth else math.ceil(group.blocks * self.depth)
            blocks += [(place, block, group) for block in range(count)]
        return blocks


class InvertedBottleneck(nn.Module):
    """A 1x1 convolution to more channels, a depthwise one, and a 1x1 convolution to fewer.

    The first is left out where the channels do not grow. A block that keeps the map's shape adds
    its input.

    Args:
      group: what kind of block it is.
      conv: makes a convolution.
      norm: makes a batch norm.
      drop_path: the share of images that skip the branch while the network trains.
    """

    group: Group
    conv: ModuleMaker
    norm: ModuleMaker
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, h / strides, w / strides, channels) from (B, h, w, channels)."""
        _, _, kernel, strides, expansion, channels = self.group
        y, hidden, norms = x, x.shape[-1] * expansion, iter(("bn1", "bn2", "bn3"))
        if expansion > 1:
            y = self.conv(hidden, (1, 1), name="conv_pw")(y)
            y = relu6(self.norm(name=next(norms), epsilon=EPSILON)(y))
        y = self.conv(
            hidden,
            (kernel, kernel),
            (strides, strides),
            padding="SAME",
            feature_group_count=hidden,
            name="conv_dw",
        )(y)
        y = relu6(self.norm(name=next(norms), epsilon=EPSILON)(y))
        y = self.conv(channels, (1, 1), name="conv_pwl" if expansion > 1 else "conv_pw")(y)
        y = self.norm(name=next(norms), epsilon=EPSILON)(y)
        return x + drop_path_lib.drop(self, y, self.drop_path) if x.shape == y.shape else y


def _scaled_channels(channels: int, width: float) -> int:
    """Returns the multiple of 8 next to `width` times the channels, at least 90 % of them."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded
