"""Embedding networks in Flax linen: a backbone with an embedding head for each level.

Levels as in Ranked List Loss (Wang et al. 2019): H from the end of the last stage (global average pool, linear without
bias), M and L from the ends of the two stages before it (pool, 1x1 convolution, BN, ReLU, linear, BN, ReLU, linear
without bias). Each embedding is L2-normalised.
"""

import functools
import math
from typing import Any

from flax import linen as nn
from jax import lax
import jax.numpy as jnp
import numpy as np

from rll_jax.loss._problem import normalize_rows

LEVELS = ("L", "M", "H")
BATCH_NORMS = ("train", "local", "frozen", "frozen_affine")
_HIDDEN_CHANNELS, _HIDDEN_UNITS = 128, 1024


class _FixedBatchNorm(nn.BatchNorm):
    def param(self, *args, **kwargs):
        return lax.stop_gradient(super().param(*args, **kwargs))


class EmbeddingNet(nn.Module):
    """Images to L2-normalised embeddings.

    Args:
      backbone: of `rll_jax.networks.backbones`: a `ResNetConfig` or a `GoogLeNetV2Config`.
      embedding_dim: dimension of each level's embedding.
      levels: any of "L", "M", "H".
      dtype: of the convolutions; parameters, batch statistics and embeddings are float32.
      batch_norm: when `train`, the backbone's uses the batch's statistics over all devices of `axis_name` ("train"), those
        of the device's own share ("local"), or the running ones ("frozen"; "frozen_affine" stops the gradients of its
        scales and biases too). The heads' statistics are always trained, over all devices but for "local".
      axis_name: the axis over which batch statistics are taken where `train`, that of the step's pmap or shard_map (`devices.AXIS` for a
        `parallel.Runner`), or None on one device.
      remat: stages (1, 2, ...) whose blocks are computed again for the gradient instead of kept.
      frozen_stages: how many of the first stages, and the stem, the gradient does not reach.
      given: ((stage, (h, w, channels)), ...): instead of images, (B, values) of the maps at the ends of these stages, one after the other,
        as `rll_jax.training.cached_features` keeps them; stages before the last of them are not computed.

    Raises:
      ValueError: by `init` and `apply`: levels or a way of batch norm that do not exist, or stages that the backbone does not have.
    """

    backbone: Any
    embedding_dim: int = 128
    levels: tuple[str, ...] = ("H",)
    dtype: Any = jnp.float32
    batch_norm: str = "train"
    axis_name: str | None = None
    remat: tuple[int, ...] = ()
    frozen_stages: int = 0
    given: tuple = ()

    @nn.compact
    def __call__(self, images, *, train=False, features=False):
        """(B, H, W, 3) uint8 or floating in 0-255 -> {level: (B, embedding_dim) float32}.

        With `features` the backbone's maps at the ends of its stages instead, a list of (B, h, w, channels) of `dtype`.
        """
        self._check()
        ends = self._ends(images, train)
        if features:
            return ends
        conv, norm = self._conv(), self._norm(train, frozen=False)
        return {
            level: self._head(level, ends[LEVELS.index(level) - len(LEVELS)], conv, norm)
            for level in self.levels
        }

    def _check(self):
        stages = self.backbone.num_stages
        there = LEVELS[max(0, len(LEVELS) - stages) :]
        if (
            not self.levels
            or len(set(self.levels)) < len(self.levels)
            or not set(self.levels) <= set(there)
        ):
            raise ValueError(
                f"levels={self.levels}: expected some of {', '.join(there)}, each once: the backbone has {stages} stages"
            )
        if self.batch_norm not in BATCH_NORMS:
            raise ValueError(
                f"batch_norm={self.batch_norm!r}: expected one of {', '.join(BATCH_NORMS)}"
            )
        if (
            not set(self.remat) <= set(range(1, stages + 1))
            or not 0 <= self.frozen_stages <= stages
        ):
            raise ValueError(
                f"remat={self.remat}, frozen_stages={self.frozen_stages}: the backbone's stages are 1 to {stages}"
            )
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim={self.embedding_dim}: expected at least 1")

    def _ends(self, images, train):
        x = self._given(images) if self.given else self._normalized(images)
        norm = self._norm(train, frozen=self.batch_norm.startswith("frozen"))
        return self.backbone.stage_ends(x, self._conv(), norm, self.remat, self.frozen_stages)

    def _normalized(self, images):
        mean, std = (
            jnp.array(x).reshape(1, 1, 1, 3) for x in (self.backbone.mean, self.backbone.std)
        )
        x = images[..., ::-1] if self.backbone.bgr else images
        return ((x.astype(jnp.float32) - mean) / std).astype(self.dtype)

    def _given(self, values):
        stages, shapes = zip(*self.given)
        parts = jnp.split(
            values.astype(self.dtype),
            np.cumsum([math.prod(shape) for shape in shapes])[:-1],
            axis=1,
        )
        return {
            stage: part.reshape(-1, *shape) for stage, part, shape in zip(stages, parts, shapes)
        }

    def _conv(self):
        he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        return functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=he)

    def _norm(self, train, frozen):
        return functools.partial(
            _FixedBatchNorm if frozen and self.batch_norm == "frozen_affine" else nn.BatchNorm,
            use_running_average=frozen or not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name if train and self.batch_norm != "local" else None,
        )

    def _head(self, level, x, conv, norm):
        dense = functools.partial(nn.Dense, dtype=self.dtype, use_bias=False)
        if level == "H":
            x = jnp.mean(x, axis=(1, 2))
        else:
            x = nn.avg_pool(x, tuple(min(5, side) for side in x.shape[1:3]), (3, 3))
            x = nn.relu(
                norm(name=f"{level}_bn1")(conv(_HIDDEN_CHANNELS, (1, 1), name=f"{level}_conv")(x))
            )
            x = dense(_HIDDEN_UNITS, name=f"{level}_dense")(x.reshape(x.shape[0], -1))
            x = nn.relu(norm(name=f"{level}_bn2")(x))
        x = dense(self.embedding_dim, name=f"{level}_embedding")(x)
        return normalize_rows(x.astype(jnp.float32))


def concatenate_levels(embeddings):
    """{level: (B, D)} -> (B, levels * D), L2-normalised again: what is searched with at test time."""
    ordered = [
        embeddings[level] for level in LEVELS if level in embeddings
    ]  # jit sorts a dict by its keys
    return jnp.concatenate(ordered, axis=-1) / np.sqrt(len(ordered)).astype(np.float32)
