"""Embedding networks in Flax linen: a ResNet by configuration with an embedding head for each level.

Levels as in Ranked List Loss (Wang et al. 2019): H from the end of the last stage (global average pool, linear without
bias), M and L from the ends of the two stages before it (pool, 1x1 convolution, BN, ReLU, linear, BN, ReLU, linear
without bias). Each embedding is L2-normalised.
"""
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from rll_jax._inputs import normalize_rows


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A ResNet v1.5 (He et al. 2016; the stride in the 3x3 convolution, as torchvision and timm have it).

    Args:
      stage_sizes: blocks of each stage; the number of channels doubles from stage to stage.
      bottleneck: three convolutions a block, with four times the width at the end, instead of two.
      width: channels of the first stage.
      small_images: a 3x3 stem of stride 1 instead of 7x7, stride 2 and a max pool.
      stem_pool: side of the average pool after the small images' stem.
    """

    stage_sizes: tuple[int, ...]
    bottleneck: bool = False
    width: int = 64
    small_images: bool = False
    stem_pool: int = 1


RESNETS = {
    "resnet_tiny": ResNetConfig((1, 1), width=8, small_images=True),  # for tests: seconds to compile, nothing learnt
    "resnet_small": ResNetConfig((1, 1, 1), width=32, small_images=True, stem_pool=2),
    "resnet_medium": ResNetConfig((1, 1, 1), width=64, small_images=True, stem_pool=2),
    "resnet18_small": ResNetConfig((2, 2, 2, 2), small_images=True),
    "resnet18": ResNetConfig((2, 2, 2, 2)),
    "resnet34": ResNetConfig((3, 4, 6, 3)),
    "resnet50": ResNetConfig((3, 4, 6, 3), bottleneck=True),
    "resnet101": ResNetConfig((3, 4, 23, 3), bottleneck=True),
    "resnet152": ResNetConfig((3, 8, 36, 3), bottleneck=True),
}
LEVELS = ("L", "M", "H")
_HIDDEN_CHANNELS, _HIDDEN_UNITS = 128, 1024


class ResNetBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 where `bottleneck`, around a shortcut."""

    features: int
    strides: int
    bottleneck: bool
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        expansion = 4 if self.bottleneck else 1
        kernels = ((1, 1, 1), (3, self.strides, 1), (1, 1, 4)) if self.bottleneck else ((3, self.strides, 1), (3, 1, 1))
        y = x
        for i, (kernel, strides, widen) in enumerate(kernels, start=1):
            pad = [(kernel // 2, kernel // 2)] * 2
            y = self.conv(self.features * widen, (kernel, kernel), (strides, strides), padding=pad, name=f"conv{i}")(y)
            y = self.norm(name=f"bn{i}")(y)
            y = nn.relu(y) if i < len(kernels) else y
        if self.strides != 1 or x.shape[-1] != self.features * expansion:
            x = self.conv(
                self.features * expansion, (1, 1), (self.strides, self.strides), padding="VALID", name="downsample_conv"
            )(x)
            x = self.norm(name="downsample_bn")(x)
        return nn.relu(x + y)


class EmbeddingNet(nn.Module):
    """Images to L2-normalised embeddings.

    Args:
      backbone: a `ResNetConfig`.
      embedding_dim: dimension of each level's embedding.
      levels: any of "L", "M", "H".
      dtype: of the convolutions; parameters, batch statistics and embeddings are float32.
      batch_norm: "train" uses the batch's statistics when `train`, over all devices of `axis_name`; "frozen" always the
        running ones.
      axis_name: the axis over which batch statistics are taken, or None.
    """

    backbone: ResNetConfig
    embedding_dim: int = 128
    levels: tuple[str, ...] = ("H",)
    dtype: Any = jnp.float32
    batch_norm: str = "train"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train=False):
        """(B, H, W, 3) uint8 or floating in 0-255 -> {level: (B, embedding_dim) float32}."""
        config = self.backbone
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train or self.batch_norm == "frozen",
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name if train else None,
        )
        he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=he)
        # ImageNet's statistics, whose exact values matter to pretrained weights only
        mean, std = jnp.array([123.675, 116.28, 103.53]), jnp.array([58.395, 57.12, 57.375])
        x = ((images.astype(jnp.float32) - mean.reshape(1, 1, 1, 3)) / std.reshape(1, 1, 1, 3)).astype(self.dtype)
        kernel, strides, pad = (3, 1, 1) if config.small_images else (7, 2, 3)
        x = conv(config.width, (kernel, kernel), (strides, strides), padding=[(pad, pad)] * 2, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x))
        if config.small_images:
            x = nn.avg_pool(x, (config.stem_pool,) * 2, (config.stem_pool,) * 2)
        else:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1)] * 2)
        ends = []
        for stage, blocks in enumerate(config.stage_sizes):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                name = f"layer{stage + 1}_{block}"
                x = ResNetBlock(config.width << stage, strides, config.bottleneck, conv, norm, name=name)(x)
            ends.append(x)
        return {level: self._head(level, ends[LEVELS.index(level) - len(LEVELS)], conv, norm) for level in self.levels}

    def _head(self, level, x, conv, norm):
        dense = functools.partial(nn.Dense, dtype=self.dtype, use_bias=False)
        if level == "H":
            x = jnp.mean(x, axis=(1, 2))
        else:
            x = nn.avg_pool(x, tuple(min(5, side) for side in x.shape[1:3]), (3, 3))
            x = nn.relu(norm(name=f"{level}_bn1")(conv(_HIDDEN_CHANNELS, (1, 1), name=f"{level}_conv")(x)))
            x = dense(_HIDDEN_UNITS, name=f"{level}_dense")(x.reshape(x.shape[0], -1))
            x = nn.relu(norm(name=f"{level}_bn2")(x))
        x = dense(self.embedding_dim, name=f"{level}_embedding")(x)
        return normalize_rows(x.astype(jnp.float32))


def concatenated(embeddings):
    """{level: (B, D)} -> (B, levels * D), L2-normalised again: what is searched with at test time."""
    ordered = [embeddings[level] for level in LEVELS if level in embeddings]  # jit sorts a dict by its keys
    return jnp.concatenate(ordered, axis=-1) / np.sqrt(len(ordered)).astype(np.float32)
