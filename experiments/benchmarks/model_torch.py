"""PyTorch's side of `experiments.benchmarks.model`.

torchvision's ResNet, with its structure and names, with an embedding; the loss; what is measured.
"""

from collections.abc import Callable
import contextlib
import os

import numpy as np
import torch  # pyright: ignore[reportMissingImports] (optional)
from torch import nn  # pyright: ignore[reportMissingImports] (optional)
import torch.nn.functional as F  # pyright: ignore[reportMissingImports] (optional)

from experiments.benchmarks import efficientnet_torch, googlenet_torch, transformers_torch
from rll_jax.networks import backbones
from rll_jax.typing import Backbone


class Block(nn.Module):
    """A residual block of `stage_sizes`, with a bottleneck or without.

    Args:
      config: the network.
      before: channels of the input.
      width: channels of the 3x3 convolutions; a bottleneck has four times as many outside.
      stride: of the block.
    """

    def __init__(self, config: backbones.ResNetConfig, before: int, width: int, stride: int):
        super().__init__()
        first, second = (stride, 1) if config.stride_in_first else (1, stride)
        shapes = ((before, width, 3, stride), (width, width, 3, 1))
        after = width
        if config.bottleneck:
            after = 4 * width
            shapes = (
                (before, width, 1, first),
                (width, width, 3, second),
                (width, after, 1, 1),
            )
        for i, (channels_in, channels_out, kernel, strides) in enumerate(shapes, start=1):
            conv = nn.Conv2d(channels_in, channels_out, kernel, strides, kernel // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels_out))
        self.convolutions, self.downsample = len(shapes), None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, channels, h, w) of (B, channels, h, w)."""
        y = x
        for i in range(1, self.convolutions + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu_(y) if i < self.convolutions else y
        y += x if self.downsample is None else self.downsample(x)
        return F.relu_(y)


class EmbeddingResNet(nn.Module):
    """The network of a `backbones.ResNetConfig` with level H.

    Args:
      config: the network.
      dim: embedding dimension.
    """

    def __init__(self, config: backbones.ResNetConfig, dim: int):
        super().__init__()
        self.config, before = config, config.width
        stem = (3, 1, 1) if config.small_images else (7, 2, 3)
        self.conv1, self.bn1 = nn.Conv2d(3, before, *stem, bias=False), nn.BatchNorm2d(before)
        for stage, blocks in enumerate(config.stage_sizes):
            width, layers = config.width << stage, []
            for block in range(blocks):
                layers.append(Block(config, before, width, 2 if stage and not block else 1))
                before = width * (4 if config.bottleneck else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.embedding = nn.Linear(before, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, dim) float32 of unit length, of (B, 3, H, W) normalised pixels."""
        x = F.relu_(self.bn1(self.conv1(x)))
        if self.config.small_images:
            x = F.avg_pool2d(x, self.config.stem_pool)
        else:
            x = F.max_pool2d(x, 3, 2, 1)
        for stage in range(1, len(self.config.stage_sizes) + 1):
            x = getattr(self, f"layer{stage}")(x)
        return F.normalize(self.embedding(x.mean((2, 3))).float())


_Network = (
    EmbeddingResNet
    | googlenet_torch.EmbeddingGoogLeNet
    | efficientnet_torch.EmbeddingEfficientNet
    | transformers_torch.EmbeddingViT
    | transformers_torch.EmbeddingConvNeXt
)


def ranked_list_loss(
    x: torch.Tensor,
    labels: torch.Tensor,
    alpha: float = 1.2,
    margin: float = 0.4,
    temperature_neg: float = 10.0,
) -> torch.Tensor:
    """Returns `rll_jax.loss.cvpr2019` of (N, D) rows of unit length, written plainly."""
    distance = (2 - 2 * x @ x.detach().T).clamp_min(1e-12).sqrt()
    same = labels[:, None] == labels
    positive = (same & (distance > alpha - margin)).float().fill_diagonal_(0)
    negative_weight = (temperature_neg * (alpha - distance)).exp()
    negative = torch.where(~same & (distance < alpha), negative_weight, 0).detach()
    positive_term = _weighted_mean(distance - (alpha - margin), positive)
    return (positive_term + _weighted_mean(alpha - distance, negative)).mean() / 2


def _weighted_mean(hinge: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the weighted mean of each row, 0 where no weight is positive."""
    return (hinge * weight).sum(1) / weight.sum(1).clamp_min(1e-12)


class _Measured:
    """The network, its optimiser and a batch on one device, with the calls to measure."""

    def __init__(
        self,
        network: _Network,
        images: torch.Tensor,
        labels: torch.Tensor,
        dtype: str,
        compiled: bool,
    ):
        self._network, self._images, self._labels, self._dtype = network, images, labels, dtype
        self._run = torch.compile(network) if compiled else network
        self._optimizer = torch.optim.SGD(
            network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True
        )
        embeddings = torch.randn(len(images), network.embedding.out_features, device=images.device)
        self._embeddings = F.normalize(embeddings).requires_grad_()

    def train(self) -> None:
        """Makes one step: forward, backward and the update."""
        self._network.train()
        self._optimizer.zero_grad()
        with self._autocast():
            embeddings = self._run(self._images)
        ranked_list_loss(embeddings, self._labels).backward()
        self._optimizer.step()
        self._wait()

    def forward(self) -> None:
        """Embeds the batch."""
        self._network.eval()
        with torch.inference_mode(), self._autocast():
            self._run(self._images)
        self._wait()

    def loss(self) -> None:
        """Computes the loss of random embeddings, forward and backward."""
        self._embeddings.grad = None
        ranked_list_loss(self._embeddings, self._labels).backward()
        self._wait()

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self._dtype == "bfloat16":
            return torch.autocast(self._images.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _wait(self) -> None:
        if self._images.device.type == "cuda":
            torch.cuda.synchronize()


def calls(
    config: Backbone,
    images: np.ndarray,
    labels: np.ndarray,
    dim: int,
    dtype: str,
    platform: str,
    *,
    channels_last: bool,
    compiled: bool,
) -> tuple[dict[str, Callable[[], None]], Callable[[], float] | None]:
    """Returns what to measure.

    Args:
      config: the network.
      images: (B, H, W, 3) uint8.
      labels: (B,) integer classes.
      dim: embedding dimension.
      dtype: "float32", or "bfloat16" for the convolutions by autocast.
      platform: JAX's platform: "cpu", or any other for CUDA.
      channels_last: the layout of the images.
      compiled: compile the network.

    Returns:
      {"train", "forward", "loss": functions to time}, and a function that returns the most memory
      held on the device in MiB, or None on a CPU.

    Raises:
      ModuleNotFoundError: the platform is no CPU and torch has no CUDA; shown as not installed.
    """
    if platform != "cpu" and not torch.cuda.is_available():
        raise ModuleNotFoundError("torch with CUDA")
    device = "cpu" if platform == "cpu" else "cuda"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cudnn.benchmark = True  # XLA tries algorithms too
    torch.set_float32_matmul_precision("high")  # TF32 where XLA takes it by default
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = embedding_network(config, dim).to(
        device,
        memory_format=layout,  # pyright: ignore[reportCallIssue] not in the stub
    )
    images = images[..., ::-1] if config.bgr else images
    pixels = torch.from_numpy((images - config.mean) / config.std).permute(0, 3, 1, 2)
    measured = _Measured(
        network,
        pixels.to(device, torch.float32, memory_format=layout),
        torch.from_numpy(labels).to(device),
        dtype,
        compiled,
    )
    functions = {"train": measured.train, "forward": measured.forward, "loss": measured.loss}
    return functions, _peak_device_mib if device == "cuda" else None


def embedding_network(config: Backbone, dim: int) -> _Network:
    """Returns the network of a backbone with level H and embeddings of `dim` dimensions.

    Raises:
      ValueError: the backbone is of another family.
      ModuleNotFoundError: transformers is not installed, and the backbone is a vision transformer
        or a ConvNeXt.
    """
    if isinstance(config, backbones.ViTConfig):
        return transformers_torch.EmbeddingViT(config, dim)
    if isinstance(config, backbones.ConvNeXtConfig):
        return transformers_torch.EmbeddingConvNeXt(config, dim)
    if isinstance(config, backbones.ResNetConfig):
        network = EmbeddingResNet(config, dim)
    elif isinstance(config, backbones.GoogLeNetV2Config):
        network = googlenet_torch.EmbeddingGoogLeNet(config, dim)
    elif isinstance(config, backbones.EfficientNetLiteConfig):
        network = efficientnet_torch.EmbeddingEfficientNet(config, dim)
    else:
        raise ValueError(f"no network of PyTorch for {config}")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # initialised as ours and torchvision's
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _peak_device_mib() -> float:
    return torch.cuda.max_memory_allocated() / 2**20
