"""GoogLeNet-V2 in PyTorch, for `experiments.benchmarks.model`, under the Caffe model's names."""

import torch  # pyright: ignore[reportMissingImports] (optional)
from torch import nn  # pyright: ignore[reportMissingImports] (optional)
import torch.nn.functional as F  # pyright: ignore[reportMissingImports] (optional)

from rll_jax.networks import googlenet


class EmbeddingGoogLeNet(nn.Module):
    """The network of a `GoogLeNetV2Config` with level H.

    Args:
      config: the network.
      dim: the dimension of the embeddings.
    """

    def __init__(self, config: googlenet.GoogLeNetV2Config, dim: int):
        super().__init__()
        self.config = config
        stem, last = (config.scaled(channels) for channels in (64, 192))
        self._add("conv1_7x7_s2", 3, stem, 7, 2)
        self._add("conv2_3x3_reduce", stem, stem, 1, 1)
        self._add("conv2_3x3", stem, last, 3, 1)
        for name in googlenet.INCEPTIONS:
            last = self._add_inception(name, last)
        self.embedding = nn.Linear(last, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, dim) float32 of unit length, of (B, 3, H, W) normalised pixels."""
        x = F.max_pool2d(self._unit("conv1_7x7_s2", x), 3, 2, ceil_mode=True)
        x = self._unit("conv2_3x3", self._unit("conv2_3x3_reduce", x))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        for name in googlenet.INCEPTIONS:
            x = self._inception(name, x)
        return F.normalize(self.embedding(x.mean((2, 3))).float())

    def _add(self, name: str, before: int, after: int, kernel: int, stride: int) -> None:
        self.add_module(name, nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(after))

    def _add_inception(self, name: str, before: int) -> int:
        """Adds the layers of a block; returns the number of its channels."""
        channels = self.config.channels(name)
        prefix, stride = f"inception_{name}", 1 if channels.conv1x1 else 2
        self._add(f"{prefix}_3x3_reduce", before, channels.reduce3x3, 1, 1)
        self._add(f"{prefix}_3x3", channels.reduce3x3, channels.conv3x3, 3, stride)
        self._add(f"{prefix}_double_3x3_reduce", before, channels.double_reduce3x3, 1, 1)
        self._add(f"{prefix}_double_3x3_1", channels.double_reduce3x3, channels.double3x3, 3, 1)
        self._add(f"{prefix}_double_3x3_2", channels.double3x3, channels.double3x3, 3, stride)
        after = channels.conv3x3 + channels.double3x3
        if not channels.conv1x1:
            return after + before
        self._add(f"{prefix}_1x1", before, channels.conv1x1, 1, 1)
        self._add(f"{prefix}_pool_proj", before, channels.pool_projection, 1, 1)
        return after + channels.conv1x1 + channels.pool_projection

    def _unit(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.relu_(getattr(self, f"{name}_bn")(getattr(self, name)(x)))

    def _inception(self, name: str, x: torch.Tensor) -> torch.Tensor:
        prefix = f"inception_{name}"
        a = self._unit(f"{prefix}_3x3", self._unit(f"{prefix}_3x3_reduce", x))
        b = self._unit(f"{prefix}_double_3x3_1", self._unit(f"{prefix}_double_3x3_reduce", x))
        b = self._unit(f"{prefix}_double_3x3_2", b)
        if not self.config.channels(name).conv1x1:
            # Padded where a side is odd: the pool is then as large as a and b.
            odd = [side % 2 for side in x.shape[2:]]
            padded = F.pad(x, (odd[1], odd[1], odd[0], odd[0]), value=-torch.inf) if any(odd) else x
            return torch.cat([a, b, F.max_pool2d(padded, 3, 2, ceil_mode=True)], 1)
        pool = F.max_pool2d if name == googlenet.MAX_POOLED else F.avg_pool2d
        pooled = self._unit(f"{prefix}_pool_proj", pool(x, 3, 1, 1))
        return torch.cat([self._unit(f"{prefix}_1x1", x), a, b, pooled], 1)
