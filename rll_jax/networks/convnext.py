"""ConvNeXt (Liu et al. 2022) and its second version (Woo et al. 2023) by configuration.

With the names of the published weights: timm's, torchvision's, Hugging Face's, and the authors' of
both versions and of DINOv3. Modules are made in the scope of the caller.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from rll_jax.networks import drop_path as drop_path_lib
from rll_jax.networks._stages import ModuleMaker, cached_ends, renamed
from rll_jax.networks.convolution import convolve_patches
from rll_jax.networks.normalization import gelu
from rll_jax.networks.resnet import IMAGENET_MEAN, IMAGENET_STD

_STEM = 4  # the side of the patches that the stem takes
_EPSILON = 1e-6  # of the layer norms
_INIT = nn.initializers.truncated_normal(0.02)

# Parts of names to replace, in this order; each begins where a part of a name begins.
_TO_TIMM: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # torchvision
    (r"features\.0\.([01])\.", r"stem.\1."),
    (r"features\.([246])\.([01])\.", lambda m: f"stages.{int(m[1]) // 2}.downsample.{m[2]}."),
    (r"features\.([1357])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"block\.0\.", "conv_dw."),
    (r"block\.2\.", "norm."),
    (r"block\.3\.", "mlp.fc1."),
    (r"block\.5\.", "mlp.fc2."),
    (r"layer_scale$", "gamma"),
    (r"classifier\.0\.", "head.norm."),
    (r"classifier\.2\.", "head.fc."),
    # Hugging Face
    (r"embeddings\.patch_embeddings\.", "stem.0."),
    (r"embeddings\.layernorm\.", "stem.1."),
    (r"encoder\.(stages\.\d+\.(?:layers|downsampling_layer)\.)", r"\1"),
    (r"downsampling_layer\.", "downsample."),
    (r"(stages\.\d+)\.layers\.", r"\1.blocks."),
    (r"(blocks\.\d+)\.layer_?norm\.", r"\1.norm."),
    (r"layer_scale_parameter$", "gamma"),
    (r"stages\.0\.downsample_layers\.", "stem."),
    (r"(stages\.\d+)\.downsample_layers\.", r"\1.downsample."),
    (r"depthwise_conv\.", "conv_dw."),
    (r"pointwise_conv([12])\.", r"mlp.fc\1."),
    # The authors
    (r"downsample_layers\.0\.", "stem."),
    (r"downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"(stages\.\d+)\.(\d+)\.", r"\1.blocks.\2."),
    (r"dwconv\.", "conv_dw."),
    (r"pwconv([12])\.", r"mlp.fc\1."),
    (r"(?<!mlp\.)grn\.", "mlp.grn."),
    (r"grn\.gamma$", "grn.weight"),
    (r"grn\.beta$", "grn.bias"),
]
_INSIDE = re.compile(r"(?<![^.])st(?:em|ages)\.")  # of a name of the stem or of a stage
_LAST_NORM = re.compile(r"(?<![^.])(?<!head\.)(?:layer_?norm|norm)\.(?=(?:weight|bias)$)")
_COPIED_NORM = re.compile(r"(?<![^.])norms\.\d+\.")  # DINOv3's authors have the last norm twice
_TO_HUGGINGFACE = [
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^head\.norm\.", "layernorm."),
    (r"^stages\.(\d+)\.blocks\.", r"encoder.stages.\1.layers."),
    (r"^stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"(?<=\d)\.norm\.", ".layernorm."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"\.mlp\.grn\.", ".grn."),
    (r"\.gamma$", ".layer_scale_parameter"),
]


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig:
    """A ConvNeXt, as a `rll_jax.typing.TokenBackbone`.

    The first three stages end with a map. The last ends with tokens, all normalised: the mean of
    its map, which is what the network was published with, and the places of the map row by row.

    Args:
      stage_sizes: the number of blocks in each of the four stages.
      widths: the number of channels in each.
      response_norm: whether the MLPs normalise their responses over the map and have no scales
        behind them (version 2).
      mean: the mean of the RGB values 0-255 that the weights expect.
      std: the standard deviation that goes with `mean`.
      drop_path: as for `rll_jax.networks.resnet.ResNetConfig`.

    Raises:
      ValueError: there are not four stages of at least 1 block and channel, or `drop_path` is out
        of range.
    """

    stage_sizes: tuple[int, int, int, int] = (3, 3, 9, 3)
    widths: tuple[int, int, int, int] = (96, 192, 384, 768)
    response_norm: bool = False
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    # Not in the names of cached features, which it does not change.
    drop_path: float = dataclasses.field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        if {len(self.stage_sizes), len(self.widths)} != {4} or min(
            *self.stage_sizes, *self.widths
        ) < 1:
            raise ValueError(
                f"stage_sizes={self.stage_sizes}, widths={self.widths}: expected four numbers of "
                "at least 1 each, such as (3, 3, 9, 3) and (96, 192, 384, 768)"
            )
        drop_path_lib.check(self.drop_path)

    @property
    def bgr(self) -> bool:
        """False: published weights expect red, green, blue."""
        return False

    @property
    def num_stages(self) -> int:
        """The number of stages: 4."""
        return len(self.stage_sizes)

    @property
    def level_stages(self) -> tuple[int, int, int]:
        """The stages whose ends are the levels L, M and H: the last three."""
        return 2, 3, 4

    def stage_of(self, module: str) -> int:
        """Returns the stage, from 1, of a top-level module by its name; 0 for the stem.

        The last layer norm belongs to the last stage.
        """
        if module.startswith("stages_"):
            return int(module.split("_")[1]) + 1
        return self.num_stages if module == "norm" else 0

    def array_name(self, modules: Sequence[str]) -> str:
        """Returns timm's name of a module: stages.0.blocks.0.mlp.fc1.

        Args:
          modules: the names on the module's path: ("stages_0_blocks_0", "mlp_fc1").
        """
        first, *inner = modules
        first = "head.norm" if first == "norm" else first.replace("_", ".")
        return ".".join([first, *(name.replace("mlp_", "mlp.") for name in inner)])

    def merged(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters: there are no adapters."""
        return dict(params)

    def from_published(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns arrays that others named under timm's names. What stands before them stays."""
        named: dict[str, np.ndarray] = {}
        patterns = [(rf"(?<![^.]){pattern}", new) for pattern, new in _TO_TIMM]
        for name, array in renamed(_without_model(arrays), patterns).items():
            if not _INSIDE.search(name):
                name = _LAST_NORM.sub("head.norm.", name)
            if ".mlp.fc" in name and array.ndim == 4:  # timm's 1x1 convolutions
                array = array.reshape(array.shape[:2])
            if not _COPIED_NORM.search(name):
                named[name] = array
        return named

    def to_huggingface(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns arrays under timm's names under Hugging Face's, of both versions."""
        shaped = {
            name: array.reshape(1, 1, 1, -1) if ".mlp.grn." in name else array
            for name, array in arrays.items()
        }
        return renamed(shaped, _TO_HUGGINGFACE)

    def stage_ends(
        self,
        x: jax.Array | Mapping[int, jax.Array],
        conv: ModuleMaker,
        norm: ModuleMaker,
        remat: Sequence[int] = (),
        frozen: int = 0,
    ) -> list[jax.Array | None]:
        """Returns the end of every stage; see the class and `rll_jax.typing.TokenBackbone`."""
        if isinstance(x, Mapping):
            ends, x = cached_ends(x)
        else:
            ends, x = [], self._stem(x, conv)
        for stage in range(len(ends), self.num_stages):
            if stage:
                x = _norm(x, f"stages_{stage}_downsample_0")
                x = _patches(self.widths[stage], 2, x, conv, f"stages_{stage}_downsample_1")
            make_block = nn.remat(ConvNeXtBlock) if stage + 1 in remat else ConvNeXtBlock
            for block in range(self.stage_sizes[stage]):
                number = sum(self.stage_sizes[:stage]) + block
                rate = drop_path_lib.rate_of(
                    self.drop_path, number, sum(self.stage_sizes), stage < frozen
                )
                x = make_block(self, conv, rate, name=f"stages_{stage}_blocks_{block}")(x)
            if stage + 1 == self.num_stages:
                places = x.reshape(x.shape[0], -1, x.shape[-1])
                x = jnp.concatenate([places.mean(axis=1, keepdims=True), places], axis=1)
                x = _norm(x, "norm")
            x = lax.stop_gradient(x) if stage < frozen else x
            ends.append(x)
        return ends

    def pooled(self, tokens: jax.Array) -> jax.Array:
        """Returns the (B, channels) normalised mean from the last stage's end."""
        return tokens[:, 0]

    def to_map(self, tokens: jax.Array, sides: Sequence[int] | None = None) -> jax.Array:
        """Returns the (B, h, w, channels) map from a stage's end.

        Args:
          tokens: the end of a stage: (B, 1 + h * w, channels) of the last, else a map.
          sides: the height and the width of the images in pixels; None: they are square.
        """
        if tokens.ndim == 4:
            return tokens
        if sides is None:
            height = width = math.isqrt(tokens.shape[1] - 1)
        else:
            height, width = (side // self._last_stride for side in sides)
        if height * width + 1 != tokens.shape[1]:
            raise ValueError(
                f"the last stage ends with {tokens.shape[1] - 1} places: expected {height * width}"
                f"{' of square images' if sides is None else ''}"
            )
        return tokens[:, 1:].reshape(tokens.shape[0], height, width, tokens.shape[-1])

    @property
    def _last_stride(self) -> int:
        return _STEM << (self.num_stages - 1)

    def _stem(self, x: jax.Array, conv: ModuleMaker) -> jax.Array:
        """Returns the map before the first stage from (B, H, W, 3) normalised images."""
        if min(x.shape[1:3]) < self._last_stride:
            raise ValueError(
                f"images of {x.shape[1]} x {x.shape[2]} pixels: expected sides of "
                f"{self._last_stride} pixels or more (--image_size of the commands)"
            )
        return _norm(_patches(self.widths[0], _STEM, x, conv, "stem_0"), "stem_1")


class ConvNeXtBlock(nn.Module):
    """A depthwise 7x7 convolution, a norm, and an MLP for each place, beside a shortcut.

    Args:
      config: the network that the block belongs to.
      conv: makes a convolution.
      drop_path: the share of images that skip the branch while the network trains.
    """

    config: ConvNeXtConfig
    conv: ModuleMaker
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, h, w, channels) of the same shape."""
        channels = x.shape[-1]
        y = self.conv(
            channels,
            (7, 7),
            padding=[(3, 3)] * 2,
            feature_group_count=channels,
            use_bias=True,
            kernel_init=_INIT,
            name="conv_dw",
        )(x)
        y = _norm(y, "norm")
        y = gelu(_dense(4 * channels, y, "mlp_fc1"))
        y = ResponseNorm(name="mlp_grn")(y) if self.config.response_norm else y
        y = _dense(channels, y, "mlp_fc2")
        if not self.config.response_norm:
            gamma = self.param("gamma", nn.initializers.constant(1e-6), (channels,))
            y = y * gamma.astype(y.dtype)
        return x + drop_path_lib.drop(self, y, self.drop_path)


class ResponseNorm(nn.Module):
    """Global response normalisation: channels compete by their norm over the map (Woo et al.)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, h, w, channels) of the same shape and dtype; the norms are float32."""
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        squares = jnp.square(x.astype(jnp.float32)).sum(axis=(1, 2), keepdims=True)
        # The gradient of a root is infinite at 0, where a channel is silent on the whole map.
        norms = jnp.sqrt(jnp.where(squares > 0, squares, 1.0)) * (squares > 0)
        share = (norms / (norms.mean(axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)
        return x + scale.astype(x.dtype) * (x * share) + bias.astype(x.dtype)


def pixels_of(name: str) -> str | None:
    """Returns "clip" of `backbones.PIXELS` where the weights are a CLIP's; else None.

    Args:
      name: a name of the Hugging Face hub, or of a file: timm/convnext_base.clip_laion2b.
    """
    return "clip" if re.search(r"(?<![a-z])(?:clip|laion)", name.lower()) else None


def _without_model(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns arrays without "model." where it stands before the stages, and not the last norm.

    So names transformers 5 a DINOv3.
    """
    norm = "layer_norm.weight"
    outside = [name for name in arrays if name.endswith(norm) and "stages." not in name]
    wrapped = tuple(f"{name.removesuffix(norm)}model.stages." for name in outside)
    return {
        name.replace("model.stages.", "stages.", 1) if name.startswith(wrapped) else name: array
        for name, array in arrays.items()
    }


def _norm(x: jax.Array, name: str) -> jax.Array:
    """Returns the layer norm of each place; its statistics are float32 whatever the dtype."""
    return nn.LayerNorm(epsilon=_EPSILON, dtype=x.dtype, use_fast_variance=False, name=name)(x)


def _dense(features: int, x: jax.Array, name: str) -> jax.Array:
    """Returns a linear layer of each place."""
    return nn.Dense(features, dtype=x.dtype, kernel_init=_INIT, name=name)(x)


def _patches(features: int, side: int, x: jax.Array, conv: ModuleMaker, name: str) -> jax.Array:
    """Returns the convolution of patches that do not overlap."""
    layer = conv(
        features,
        (side, side),
        (side, side),
        padding="VALID",
        use_bias=True,
        kernel_init=_INIT,
        conv_general_dilated=convolve_patches,
        name=name,
    )
    return layer(x)
