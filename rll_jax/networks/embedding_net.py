"""Embedding networks in Flax linen: a backbone with an embedding head for each level.

The levels are those of Ranked List Loss (Wang et al. 2019). H is taken from the end of the last
stage: a global pool and a linear layer without a bias. M and L are taken from the ends of the two
stages before it: an average pool, a 1x1 convolution, batch norm, ReLU, a linear layer, batch norm,
ReLU, and a linear layer without a bias. Each embedding is L2-normalised.
"""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any, Literal, get_args

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from rll_jax.loss.rows import normalize_rows
from rll_jax.networks._stages import ModuleMaker
from rll_jax.networks.convolution import conv_general_dilated
from rll_jax.networks.normalization import BatchNorm, relu
from rll_jax.networks.pooling import NO_PADDING, PoolRounding, avg_pool, last_window_padding
from rll_jax.typing import Backbone, TokenBackbone

BatchNormMode = Literal["train", "local", "frozen", "frozen_affine"]
Pooling = Literal["own", "avg", "max", "avg+max", "gem"]

LEVELS = ("L", "M", "H")
BATCH_NORMS: tuple[BatchNormMode, ...] = get_args(BatchNormMode)
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
HEAD_PREFIXES = tuple(f"{level}_" for level in LEVELS)  # of the names of the heads' modules
LAST_LAYERS = tuple(f"{level}_embedding" for level in LEVELS)  # of the heads
POOLED = "pooled"  # what `EmbeddingNet` names the backbone's own features
HEAD_CHANNELS = 128  # of the maps that the heads' linear layers L_dense and M_dense take flattened
_HEAD_UNITS = 1024


class _FixedBatchNorm(BatchNorm):
    """A batch norm whose scales and biases the gradient does not reach."""

    def param(self, *args: Any, **kwargs: Any) -> Any:
        return lax.stop_gradient(super().param(*args, **kwargs))


class GeM(nn.Module):
    """The generalised mean with a learnt power (Radenovic et al. 2018): mean(x^p)^(1/p).

    The power starts at 3. Values below 1e-6 count as 1e-6, so that negative values are not seen.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, channels) from (B, h, w, channels); the arithmetic is float32."""
        power = self.param("p", nn.initializers.constant(3.0), (1,))
        values = jnp.maximum(x.astype(jnp.float32), 1e-6)
        return (values**power).mean(axis=(1, 2)) ** (1 / power)


class EmbeddingNet(nn.Module):
    """A network from images to L2-normalised embeddings.

    Args:
      backbone: the network before the heads, such as one of `rll_jax.networks.backbones.BACKBONES`.
      embedding_dim: the dimension of each level's embedding, at least 1.
      levels: one or more of "L", "M" and "H", each once.
      dtype: the type that convolutions and linear layers compute in. Parameters, batch statistics
        and embeddings are float32.
      batch_norm: where the backbone's batch norms take their statistics from while training:
        "train": the batches of all devices along `axis_name`.
        "local": this device's share of the batch.
        "frozen": the running averages.
        "frozen_affine": the running averages; scales and biases get no gradient either.
        Vision transformers and ConvNeXts have none.
        The heads' batch norms always use a batch's statistics while training, over all devices
        unless "local".
      pooling: how the head H pools the end of the last stage: "avg", "max", the sum of both
        ("avg+max"), or "gem" with a learnt power, over the map or the patches. "own": what the
        backbone was published with: the mean of a map, which a ConvNeXt normalises, or a vision
        transformer's class token.
      head_norm: whether a layer norm stands before the last linear layer of each head.
      axis_name: the device axis for batch statistics while training, that is, the axis of the
        step's pmap or shard_map (`rll_jax.training.devices.AXIS`), or None on one device.
      remat: the stages, from 1, whose blocks are computed again for the gradient instead of kept.
      frozen_stages: the number of first stages that the gradient does not reach. It does not reach
        the stem either if there are any.
      cached_stages: ((stage, (h, w, channels)), ...): the network takes cached feature maps of
        these stages instead of images, as `rll_jax.training.cached_features` keeps them. Stages
        before the last of them are not computed.
      pool_rounding: whether the pools of L and M round the number of their windows "up", as Caffe,
        where the last one averages what it holds of the map; or "down", where the last rows and
        columns of most maps are lost.
      batch_norm_momentum: the share of the running averages that a step keeps.

    Raises:
      ValueError: by `init` and `apply`: `levels`, `batch_norm` or `pooling` that do not exist,
        stages that the backbone does not have, a dimension below 1, or a level whose stage is
        before the last cached one and not cached.
    """

    backbone: Backbone
    embedding_dim: int = 128
    levels: tuple[str, ...] = ("H",)
    dtype: DTypeLike = jnp.float32
    batch_norm: BatchNormMode = "train"
    pooling: Pooling = "own"
    head_norm: bool = False
    axis_name: str | None = None
    remat: tuple[int, ...] = ()
    frozen_stages: int = 0
    cached_stages: tuple[tuple[int, tuple[int, ...]], ...] = ()
    pool_rounding: PoolRounding = "up"
    batch_norm_momentum: float = 0.9

    @nn.compact
    def __call__(
        self,
        images: jax.Array | np.ndarray,
        *,
        train: bool = False,
        features: bool = False,
        pooled: bool = False,
    ) -> dict[str, jax.Array] | list[jax.Array | None]:
        """Computes the embeddings of images, or their feature maps.

        Args:
          images: (B, H, W, 3) RGB, uint8 or floating in 0-255. With `cached_stages`, (B, values):
            the flattened maps of these stages, one after the other.
          train: whether batch norms use and update batch statistics, as `batch_norm` says. Blocks
            are dropped where `apply` gets random numbers for it (`drop_path` of the backbone's
            configuration).
          features: whether to return the backbone's feature maps.
          pooled: whether to return the backbone's own features beside the embeddings,
            L2-normalised: what a `TokenBackbone` pools by itself, or its last map, pooled as
            `pooling` says, by the average where that is "own" or learns ("gem").

        Returns:
          {level: (B, embedding_dim) float32}, with `pooled` {`POOLED`: (B, channels) float32} too.
          With `features` a list of the maps at the ends of
          the stages, (B, h, w, channels) of `dtype` each, or (B, tokens, channels) of a
          `TokenBackbone`, of a ConvNeXt for the last alone; None for stages that are not computed.
        """
        self._check()
        ends = self._stage_ends(images, train)
        if features:
            return ends
        embeddings, stages = {}, level_stages(self.backbone)
        for level in self.levels:
            end = ends[stages[level] - 1]
            if end is None:
                raise ValueError(
                    f"levels={self.levels}, cached_stages={self.cached_stages}: expected the stage "
                    f"of level {level} among the cached ones"
                )
            sides = None if self.cached_stages else images.shape[1:3]
            embeddings[level] = self._head(level, end, sides, train)
        end = ends[-1]
        if pooled and end is not None:  # the last stage is always computed or cached
            embeddings[POOLED] = self._own_features(end)
        return embeddings

    def _check(self) -> None:
        """Raises ValueError for fields that do not go with the backbone."""
        stages, possible = self.backbone.num_stages, level_stages(self.backbone)
        distinct = set(self.levels)
        if not distinct or len(distinct) < len(self.levels) or not distinct <= set(possible):
            raise ValueError(
                f"levels={self.levels}: expected some of {', '.join(possible)}, each once: the "
                f"backbone has {stages} stages"
            )
        if self.batch_norm not in BATCH_NORMS:
            raise ValueError(
                f"batch_norm={self.batch_norm!r}: expected one of {', '.join(BATCH_NORMS)}"
            )
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r}: expected one of {', '.join(POOLINGS)}")
        remat_exists = set(self.remat) <= set(range(1, stages + 1))
        if not remat_exists or not 0 <= self.frozen_stages <= stages:
            raise ValueError(
                f"remat={self.remat}, frozen_stages={self.frozen_stages}: the backbone's stages "
                f"are 1 to {stages}"
            )
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim={self.embedding_dim}: expected at least 1")

    def _stage_ends(self, images: jax.Array | np.ndarray, train: bool) -> list[jax.Array | None]:
        """Returns the feature maps at the ends of the backbone's stages."""
        x = self._cached_maps(images) if self.cached_stages else self._normalized(images)
        norm = self._norm(train, frozen=self.batch_norm.startswith("frozen"))
        return self.backbone.stage_ends(x, self._conv(), norm, self.remat, self.frozen_stages)

    def _normalized(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Returns images as the backbone expects them, in its order of the channels."""
        x = jnp.asarray(images)
        mean = jnp.array(self.backbone.mean).reshape(1, 1, 1, 3)
        std = jnp.array(self.backbone.std).reshape(1, 1, 1, 3)
        x = x[..., ::-1] if self.backbone.bgr else x
        return ((x.astype(jnp.float32) - mean) / std).astype(self.dtype)

    def _cached_maps(self, values: jax.Array | np.ndarray) -> dict[int, jax.Array]:
        """Returns the (B, h, w, channels) maps of the cached stages from (B, values)."""
        sizes = [math.prod(shape) for _, shape in self.cached_stages]
        parts = jnp.split(values.astype(self.dtype), np.cumsum(sizes)[:-1], axis=1)
        return {
            stage: part.reshape(-1, *shape)
            for (stage, shape), part in zip(self.cached_stages, parts, strict=True)
        }

    def _conv(self) -> ModuleMaker:
        """Returns what makes a convolution, with initial weights as by He et al. 2015."""
        he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        return functools.partial(
            nn.Conv,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=he,
            conv_general_dilated=conv_general_dilated,
        )

    def _norm(self, train: bool, frozen: bool) -> ModuleMaker:
        """Returns what makes a batch norm.

        Args:
          train: whether the network trains.
          frozen: whether the running averages are used even while the network trains.
        """
        return functools.partial(
            _FixedBatchNorm if frozen and self.batch_norm == "frozen_affine" else BatchNorm,
            use_running_average=frozen or not train,
            momentum=self.batch_norm_momentum,
            dtype=self.dtype,
            axis_name=self.axis_name if train and self.batch_norm != "local" else None,
        )

    def _head(
        self, level: str, x: jax.Array, sides: Sequence[int] | None, train: bool
    ) -> jax.Array:
        """Returns the (B, embedding_dim) embedding of a level from the end of its stage.

        Args:
          level: the level.
          x: (B, h, w, channels), or (B, tokens, channels) of a `TokenBackbone`.
          sides: the height and the width of the images in pixels; None: they are not known.
          train: whether the network trains.
        """
        conv, norm = self._conv(), self._norm(train, frozen=False)
        dense = functools.partial(nn.Dense, dtype=self.dtype, use_bias=False)
        backbone = self.backbone
        tokens = isinstance(backbone, TokenBackbone)
        if level == "H" and tokens and self.pooling == "own":
            x = backbone.pooled(x)
        else:
            x = backbone.to_map(x, sides) if tokens else x
            x = self._pooled_map(x) if level == "H" else x
        if level != "H":
            window, strides = _pool_window(x.shape[1:3]), (3, 3)
            padding = last_window_padding(x.shape[1:3], window, strides, self.pool_rounding)
            x = avg_pool(x, window, strides, padding, count_include_pad=padding == NO_PADDING)
            x = conv(HEAD_CHANNELS, (1, 1), name=f"{level}_conv")(x)
            x = relu(norm(name=f"{level}_bn1")(x))
            x = dense(_HEAD_UNITS, name=f"{level}_dense")(x.reshape(x.shape[0], -1))
            x = relu(norm(name=f"{level}_bn2")(x))
        if self.head_norm:
            x = nn.LayerNorm(dtype=self.dtype, use_fast_variance=False, name=f"{level}_norm")(x)
        x = dense(self.embedding_dim, name=f"{level}_embedding")(x)
        return normalize_rows(x.astype(jnp.float32))

    def _own_features(self, end: jax.Array) -> jax.Array:
        """Returns (B, channels) float32 of unit length, without what a head would learn.

        Args:
          end: the end of the last stage.
        """
        end, backbone = end.astype(jnp.float32), self.backbone
        if isinstance(backbone, TokenBackbone):
            return normalize_rows(backbone.pooled(end))
        learns = self.pooling == "gem"  # a power that nobody has trained
        return normalize_rows(jnp.mean(end, axis=(1, 2)) if learns else self._pooled_map(end))

    def _pooled_map(self, x: jax.Array) -> jax.Array:
        """Returns the (B, channels) pool of a (B, h, w, channels) map, for the head H."""
        if self.pooling == "gem":
            return GeM(name="H_gem")(x).astype(self.dtype)
        if self.pooling == "max":
            return jnp.max(x, axis=(1, 2))
        mean = jnp.mean(x, axis=(1, 2))
        return mean + jnp.max(x, axis=(1, 2)) if self.pooling == "avg+max" else mean


def level_stages(backbone: Backbone) -> dict[str, int]:
    """Returns {level: stage}, from 1, of the levels that a backbone has stages for."""
    last = backbone.num_stages
    tokens = isinstance(backbone, TokenBackbone)
    stages = backbone.level_stages if tokens else range(last - len(LEVELS) + 1, last + 1)
    return {level: stage for level, stage in zip(LEVELS, stages, strict=True) if stage > 0}


def _pool_window(sides: Sequence[int]) -> tuple[int, ...]:
    """Returns the window of the heads' pool: 5x5, or the map where it is smaller."""
    return tuple(min(5, side) for side in sides)


def concatenate_levels(embeddings: Mapping[str, jax.Array | np.ndarray]) -> jax.Array:
    """Concatenates the levels into the embedding that is searched with at test time.

    Args:
      embeddings: {level: (B, D)}, L2-normalised rows, in any order.

    Returns:
      (B, levels * D), in the order L, M, H, L2-normalised again.
    """
    # jit sorts a dict by its keys.
    ordered = [embeddings[level] for level in LEVELS if level in embeddings]
    return jnp.concatenate(ordered, axis=-1) / np.sqrt(len(ordered)).astype(np.float32)
