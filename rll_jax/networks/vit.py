"""Vision transformers (Dosovitskiy et al. 2021) by configuration, as published in many variants.

Modules are made in the scope of the caller. Blocks are the stages: a stage ends with (B, tokens,
width) instead of a map. The tokens are the class token, the registers and the patches row by row.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any, Literal, get_args

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from rll_jax.networks import drop_path as drop_path_lib
from rll_jax.networks import vit_weights
from rll_jax.networks._bicubic import bicubic
from rll_jax.networks._stages import ModuleMaker, cached_ends
from rll_jax.networks.convolution import convolve_patches
from rll_jax.networks.normalization import gelu
from rll_jax.networks.resnet import IMAGENET_MEAN, IMAGENET_STD

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]

LORA = "attn_lora"  # the name of the module that LoRA adds to a block
_INIT = nn.initializers.truncated_normal(0.02)
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's CLIP
}
# timm's names of modules where they differ from ours, which have no dots.
_PUBLISHED = {
    "tokens": "",
    "patch_embed": "patch_embed.proj",
    "attn_qkv": "attn.qkv",
    "attn_proj": "attn.proj",
    "mlp_fc1": "mlp.fc1",
    "mlp_fc2": "mlp.fc2",
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A vision transformer, as a `rll_jax.typing.TokenBackbone`.

    Args:
      patch: the side of a patch in pixels. What an image has beyond whole patches, at the right and
        at the bottom, is not seen.
      width: the number of channels of a token.
      depth: the number of blocks, which are the stages. Levels L, M and H are the ends of those at
        a third, at two thirds and at the end.
      heads: the number of heads of an attention; they share the width.
      image_size: the side of the images in pixels that the position embeddings were learnt on. They
        are interpolated to images of other sides. Without effect where `rotary`.
      antialias: whether position embeddings are interpolated as by PyTorch's bicubic interpolation
        with antialias (timm, DINOv2 with registers) or without it.
      mlp_width: the channels inside the MLP of a block; 0: 4 times the width.
      activation: what the MLP computes: GELU, exact or by tanh; x * sigmoid(1.702 x); or SwiGLU,
        silu(a) * b of two halves.
      class_token: whether a class token goes along. It is what the head H takes.
      rotary: whether queries and keys are turned by the places of their patches (DINOv3), instead
        of position embeddings that are added to the patches. Keys have no bias then.
      registers: the number of register tokens (Darcet et al. 2024). They have no positions, and
        then the class token has none either, as in timm.
      layer_scale: whether the branches of a block have learnt scales (DINOv2).
      pre_norm: whether the tokens are normalised before the first block (CLIP).
      attention_pool: whether a learnt query pools the tokens at the end (SigLIP). The result takes
        the place of a class token, for the head H. Without it and without a class token, H takes
        the mean of the patches.
      lora_rank: the rank of low-rank adapters (Hu et al. 2022) beside the queries, keys and values
        of each block. The gradient does not reach the backbone's linear layers then. 0: none.
      lora_alpha: the factor of the adapters is this number divided by the rank.
      epsilon: what layer norms add to the variance.
      mean: the mean of the RGB values 0-255 that the weights expect.
      std: the standard deviation that goes with `mean`.
      drop_path: the share of images that skip the last block's branches in training; the others'
        grow linearly to it from 0 at the first. Frozen stages skip none. Random numbers
        named "drop_path" say which, as `apply(..., rngs={"drop_path": key})`; without, none.

    Raises:
      ValueError: a number is out of range, or two do not go together.
    """

    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    image_size: int = 224
    antialias: bool = False
    mlp_width: int = 0
    activation: Activation = "gelu"
    class_token: bool = True
    rotary: bool = False
    registers: int = 0
    layer_scale: bool = False
    pre_norm: bool = False
    attention_pool: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    epsilon: float = 1e-6
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    # Not in the names of cached features, which it does not change.
    drop_path: float = dataclasses.field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        if min(self.patch, self.width, self.depth, self.heads) < 1 or self.width % self.heads:
            raise ValueError(
                f"patch={self.patch}, width={self.width}, depth={self.depth}, heads={self.heads}: "
                "expected at least 1, and a width that the heads divide"
            )
        least = min(self.registers, self.mlp_width, self.lora_rank)
        if self.image_size < self.patch or least < 0:
            raise ValueError(
                f"image_size={self.image_size}, registers={self.registers}, "
                f"mlp_width={self.mlp_width}, lora_rank={self.lora_rank}: expected an image of one "
                f"patch of {self.patch} pixels or more, and nothing below 0"
            )
        fits = self.class_token and not self.attention_pool and self.width // self.heads % 4 == 0
        if self.rotary and not fits:
            raise ValueError(
                f"rotary, class_token={self.class_token}, attention_pool={self.attention_pool}, "
                f"width={self.width}, heads={self.heads}: expected a class token, no attention "
                "pool, and a multiple of 4 channels for each head"
            )
        drop_path_lib.check(self.drop_path)
        if self.activation not in get_args(Activation):
            raise ValueError(
                f"activation={self.activation!r}: expected one of {', '.join(get_args(Activation))}"
            )

    @property
    def bgr(self) -> bool:
        """False: published weights expect red, green, blue."""
        return False

    @property
    def num_stages(self) -> int:
        """The number of blocks."""
        return self.depth

    @property
    def level_stages(self) -> tuple[int, int, int]:
        """The blocks whose ends are the levels L, M and H."""
        return round(self.depth / 3), round(2 * self.depth / 3), self.depth

    def stage_of(self, module: str) -> int:
        """Returns the block, from 1, of a top-level module by its name; 0 before the first.

        The last layer norm and the attention pool belong to the last block.
        """
        if module.startswith("blocks_"):
            return int(module.removeprefix("blocks_")) + 1
        return self.depth if module in ("norm", "attn_pool") else 0

    def array_name(self, modules: Sequence[str]) -> str:
        """Returns timm's name of a module: blocks.0.attn.qkv.

        Args:
          modules: the names on the module's path: ("blocks_0", "attn_qkv").
        """
        names = (_PUBLISHED.get(name, name).replace("blocks_", "blocks.") for name in modules)
        return ".".join(names)

    def merged(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns parameters with LoRA's adapters added to the kernels that they stand beside."""
        return {name: self._merged_block(module) for name, module in params.items()}

    def _merged_block(self, module: Any) -> Any:
        if not self.lora_rank or LORA not in module:
            return module
        block = dict(module)
        lora, qkv = block.pop(LORA), dict(block["attn_qkv"])
        a = np.asarray(lora["a"]).reshape(self.width, 3, self.lora_rank)
        added = np.einsum("ikr,kro->iko", a, np.asarray(lora["b"])).reshape(self.width, -1)
        qkv["kernel"] = np.asarray(qkv["kernel"]) + self.lora_alpha / self.lora_rank * added
        return {**block, "attn_qkv": qkv}

    def from_published(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns arrays that Hugging Face or the authors named under timm's names.

        Raises:
          ValueError: there are several networks, or position embeddings of another image size.
        """
        named = vit_weights.to_timm(arrays, rotary=self.rotary)
        if "pos_embed" in named and self.rotary:
            raise ValueError(
                "the weights have position embeddings, and this network has none: they are not "
                "DINOv3's"
            )
        if "patch_embed.proj.weight" in named and "pos_embed" not in named and not self.rotary:
            raise ValueError(
                "the weights have no position embeddings, as DINOv3's: take a network with rotary "
                "places for those (--backbone=vit_small_16_dinov3)"
            )
        others = self.class_token and not self.registers
        count = named["pos_embed"].shape[1] - others if "pos_embed" in named else 0
        if count and count != (self.image_size // self.patch) ** 2:
            raise ValueError(
                f"the weights have positions of {count} patches, expected those of images of "
                f"{self.image_size} pixels: give image_size={math.isqrt(count) * self.patch} "
                "(--position_size) for these weights"
            )
        return named

    def to_huggingface(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns arrays under timm's names under Hugging Face's."""
        return vit_weights.to_huggingface(arrays, self.activation == "swiglu")

    def stage_ends(
        self,
        x: jax.Array | Mapping[int, jax.Array],
        conv: ModuleMaker,
        norm: ModuleMaker,
        remat: Sequence[int] = (),
        frozen: int = 0,
    ) -> list[jax.Array | None]:
        """Returns the tokens at the end of every block; see `rll_jax.typing.TokenBackbone`.

        The last ones are normalised, and begin with what the attention pool computes if there is
        one.
        """
        if isinstance(x, Mapping):
            ends, x = cached_ends(x)
            grid = self._square_grid(x) if self.rotary else None
        else:
            sides = (x.shape[1] // self.patch, x.shape[2] // self.patch)
            grid = sides if self.rotary else None
            ends, x = [], self._stem(x, conv)
        for block in range(len(ends), self.depth):
            make_block = nn.remat(ViTBlock) if block + 1 in remat else ViTBlock
            rate = drop_path_lib.rate_of(self.drop_path, block, self.depth, block < frozen)
            x = make_block(self, grid, rate, name=f"blocks_{block}")(x)
            if block + 1 == self.depth:
                x = _norm(self, x, "norm")
                if self.attention_pool:
                    pooled = AttentionPool(self, name="attn_pool")(x)
                    x = jnp.concatenate([pooled, x], axis=1)
            x = lax.stop_gradient(x) if block < frozen else x
            ends.append(x)
        return ends

    def pooled(self, tokens: jax.Array) -> jax.Array:
        """Returns the (B, width) class token, attention pool or mean from the last stage's end."""
        if self.class_token or self.attention_pool:
            return tokens[:, 0]
        return tokens.mean(axis=1)

    def to_map(self, tokens: jax.Array, sides: Sequence[int] | None = None) -> jax.Array:
        """Returns the (B, h, w, width) map of the patches from the tokens at a stage's end.

        Args:
          tokens: (B, tokens, width).
          sides: the height and the width of the images in pixels; None: they are square.
        """
        if sides is None:
            height, width = self._square_grid(tokens)
        else:
            height, width = (side // self.patch for side in sides)
        patches = tokens[:, -height * width :]
        return patches.reshape(tokens.shape[0], height, width, self.width)

    def _square_grid(self, tokens: jax.Array) -> tuple[int, int]:
        """Returns the number of patches down and across of square images, from a stage's end."""
        count = tokens.shape[1] - self.registers - self.class_token
        side = math.isqrt(count)
        # The attention pool's token comes before those of the last stage.
        if count not in (side * side, side * side + self.attention_pool):
            raise ValueError(f"{count} patches of an image: expected those of a square image")
        return side, side

    def _stem(self, x: jax.Array, conv: ModuleMaker) -> jax.Array:
        """Returns the tokens before the first block from (B, H, W, 3) normalised images."""
        if min(x.shape[1:3]) < self.patch:
            raise ValueError(
                f"images of {x.shape[1]} x {x.shape[2]} pixels: expected sides of one patch of "
                f"{self.patch} pixels or more"
            )
        x = conv(
            self.width,
            (self.patch, self.patch),
            (self.patch, self.patch),
            padding="VALID",
            use_bias=not self.pre_norm,
            kernel_init=_INIT,
            conv_general_dilated=convolve_patches,
            name="patch_embed",
        )(x)
        x = Tokens(self, name="tokens")(x)
        return _norm(self, x, "norm_pre") if self.pre_norm else x


class Tokens(nn.Module):
    """Adds positions to patches, and the class token and the registers before them."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, tokens, width) from (B, h, w, width) embedded patches."""
        config, (batch, *sides, width) = self.config, x.shape
        grid = config.image_size // config.patch
        others = []
        if config.class_token:
            others.append(self.param("cls_token", nn.initializers.zeros, (1, 1, width)))
        # Beside registers, positions are those of patches alone.
        placed = len(others) if not config.registers else 0
        if not config.rotary:
            positions = self.param("pos_embed", _INIT, (1, placed + grid * grid, width))
            if placed:
                others[0] = others[0] + positions[:, :1]
            of_patches = positions[0, placed:].reshape(grid, grid, width)
            if sides != [grid, grid]:
                down, across = (bicubic(grid, side, config.antialias) for side in sides)
                of_patches = jnp.einsum("yh,xw,hwc->yxc", down, across, of_patches)
            x = x + of_patches.astype(x.dtype)
        if config.registers:
            others.append(self.param("reg_token", _INIT, (1, config.registers, width)))
        patches = x.reshape(batch, sides[0] * sides[1], width)
        first = [
            jnp.broadcast_to(token, (batch, *token.shape[1:])).astype(x.dtype) for token in others
        ]
        return jnp.concatenate([*first, patches], axis=1)


class ViTBlock(nn.Module):
    """A block: attention between tokens, then an MLP for each, both beside a shortcut.

    Args:
      config: the network that the block belongs to.
      grid: the number of patches down and across, where queries and keys are turned; else None.
      drop_path: the share of images that skip each of the two while the network trains.
    """

    config: ViTConfig
    grid: tuple[int, int] | None
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, tokens, width) of the same shape."""
        config = self.config
        y = _norm(config, x, "norm1")
        qkv = _dense(config, 3 * config.width, y, "attn_qkv")
        if config.lora_rank:
            qkv = qkv + LoRA(config, name=LORA)(y)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        y = _attend(q, k, v, config.heads, self.grid)
        y = _dense(config, config.width, y, "attn_proj")
        y = LayerScale(name="ls1")(y) if config.layer_scale else y
        x = x + drop_path_lib.drop(self, y, self.drop_path)
        y = _mlp(config, _norm(config, x, "norm2"))
        y = LayerScale(name="ls2")(y) if config.layer_scale else y
        return x + drop_path_lib.drop(self, y, self.drop_path)


class LoRA(nn.Module):
    """Low-rank adapters of queries, keys and values: factor * (x a) b, with b at 0 first."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, tokens, 3 * width), what is added to queries, keys and values."""
        rank, width = self.config.lora_rank, x.shape[-1]
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        a = self.param("a", init, (width, 3 * rank))
        b = self.param("b", nn.initializers.zeros, (3, rank, width))
        y = (x @ a.astype(x.dtype)).reshape(*x.shape[:2], 3, rank)
        y = jnp.einsum("btkr,krc->btkc", y, b.astype(x.dtype))
        return self.config.lora_alpha / rank * y.reshape(*x.shape[:2], 3 * width)


class LayerScale(nn.Module):
    """A learnt factor for each channel (Touvron et al. 2021)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `x` times the factors, in its dtype."""
        gamma = self.param("gamma", nn.initializers.constant(1e-5), x.shape[-1:])
        return x * gamma.astype(x.dtype)


class AttentionPool(nn.Module):
    """A learnt query that attends to all tokens, and an MLP beside a shortcut (SigLIP)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, 1, width) from (B, tokens, width)."""
        config, width = self.config, x.shape[-1]
        latent = self.param("latent", _INIT, (1, 1, width))
        latent = jnp.broadcast_to(latent, (x.shape[0], 1, width)).astype(x.dtype)
        q = _dense(config, width, latent, "q")
        k, v = jnp.split(_dense(config, 2 * width, x, "kv"), 2, axis=-1)
        y = _attend(q, k, v, config.heads)
        y = _dense(config, width, y, "proj")
        return y + _mlp(config, _norm(config, y, "norm"))


class _FixedDense(nn.Dense):
    """A linear layer whose parameters the gradient does not reach."""

    def param(self, *args: Any, **kwargs: Any) -> Any:
        return lax.stop_gradient(super().param(*args, **kwargs))


class _WithoutKeyBias(nn.Dense):
    """A linear layer to queries, keys and values, whose bias of the keys stays as it is: 0."""

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        value = super().param(name, *args, **kwargs)
        if name != "bias":
            return value
        return value * np.repeat(np.array([1, 0, 1], np.float32), self.features // 3)


def _dense(config: ViTConfig, features: int, x: jax.Array, name: str) -> jax.Array:
    """Returns a linear layer of each token."""
    layer = _WithoutKeyBias if config.rotary and name == "attn_qkv" else nn.Dense
    layer = _FixedDense if config.lora_rank else layer
    return layer(features, dtype=x.dtype, kernel_init=_INIT, name=name)(x)


def _norm(config: ViTConfig, x: jax.Array, name: str) -> jax.Array:
    """Returns the layer norm of tokens; its statistics are float32 whatever the dtype."""
    norm = nn.LayerNorm(epsilon=config.epsilon, dtype=x.dtype, use_fast_variance=False, name=name)
    return norm(x)


def _mlp(config: ViTConfig, x: jax.Array) -> jax.Array:
    """Returns the MLP of each token."""
    hidden = config.mlp_width or 4 * config.width
    gated = config.activation == "swiglu"
    y = _dense(config, 2 * hidden if gated else hidden, x, "mlp_fc1")
    if gated:
        gate, value = jnp.split(y, 2, axis=-1)
        y = nn.silu(gate) * value
    else:
        y = _ACTIVATIONS[config.activation](y)
    return _dense(config, config.width, y, "mlp_fc2")


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, heads: int, grid: tuple[int, int] | None = None
) -> jax.Array:
    """Returns (B, queries, width) from queries, keys and values, (B, count, width) each.

    Queries and keys are turned where the grid of their patches is given.
    """
    shape = q.shape
    q, k, v = (x.reshape(*x.shape[:2], heads, shape[-1] // heads) for x in (q, k, v))
    if grid is not None:
        cosines, sines = _turns(grid, q.shape[-1], q.dtype)
        q, k = (_turned(x, cosines, sines) for x in (q, k))
    return jax.nn.dot_product_attention(q, k, v).reshape(shape)


def _turns(
    grid: tuple[int, int], channels: int, dtype: jnp.dtype[Any]
) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and the sines, (patches, 1, channels) each, that patches are turned by.

    The first half of the points of `_turned` turn by the patch's row, the others by its column;
    both go from -1 to 1.
    """
    (height, width), quarter = grid, channels // 4
    speeds = 2 * np.pi / 100 ** (np.arange(quarter) / quarter)
    angles = [(2 * (np.arange(side) + 0.5) / side - 1)[:, None] * speeds for side in grid]

    def table(function: Callable[[np.ndarray], np.ndarray]) -> jax.Array:
        # Small constants, broadcast in the program: whole tables would make it large.
        rows, columns = (jnp.asarray(function(part), dtype) for part in angles)
        half = jnp.concatenate(
            [
                jnp.broadcast_to(rows[:, None], (height, width, quarter)),
                jnp.broadcast_to(columns[None], (height, width, quarter)),
            ],
            axis=-1,
        )
        return jnp.tile(half.reshape(height * width, 1, 2 * quarter), 2)

    return table(np.cos), table(np.sin)


def _turned(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Returns (B, tokens, heads, channels) whose last tokens, the patches, are turned.

    Channel i and channel i + half are a point in a plane, and the point is turned.
    """
    others, patches = jnp.split(x, (x.shape[1] - len(cosines),), axis=1)
    first, second = jnp.split(patches, 2, axis=-1)
    turned = patches * cosines + jnp.concatenate([-second, first], axis=-1) * sines
    return jnp.concatenate([others, turned], axis=1)
