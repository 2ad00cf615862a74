"""PyTorch's side of `experiments.benchmarks.model`: torchvision's ResNet (its structure and names) with an embedding, and the loss."""

import contextlib
import os

import torch
from torch import nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, config, before, width, stride):
        super().__init__()
        first, second = (stride, 1) if config.stride_in_first else (1, stride)
        shapes = ((before, width, 3, stride), (width, width, 3, 1))
        if config.bottleneck:
            shapes = (
                (before, width, 1, first),
                (width, width, 3, second),
                (width, 4 * width, 1, 1),
            )
        for i, (a, b, kernel, strides) in enumerate(shapes, start=1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, kernel, strides, kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        self.convolutions, self.downsample = len(shapes), None
        if stride != 1 or before != b:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, b, 1, stride, bias=False), nn.BatchNorm2d(b)
            )

    def forward(self, x):
        y = x
        for i in range(1, self.convolutions + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu_(y) if i < self.convolutions else y
        y += x if self.downsample is None else self.downsample(x)
        return F.relu_(y)


class EmbeddingResNet(nn.Module):
    """The network of a `backbones.ResNetConfig` with level H; (B, 3, H, W) normalised pixels -> (B, dim)."""

    def __init__(self, config, dim):
        super().__init__()
        self.config, before = config, config.width
        stem = (3, 1, 1) if config.small_images else (7, 2, 3)
        self.conv1, self.bn1 = nn.Conv2d(3, before, *stem, bias=False), nn.BatchNorm2d(before)
        for stage, blocks in enumerate(config.stage_sizes):
            made = []
            for block in range(blocks):
                made.append(
                    Block(config, before, config.width << stage, 2 if stage and not block else 1)
                )
                before = (config.width << stage) * (4 if config.bottleneck else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
        self.embedding = nn.Linear(before, dim, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu"
                )  # as ours and torchvision's

    def forward(self, x):
        x = F.relu_(self.bn1(self.conv1(x)))
        x = (
            F.avg_pool2d(x, self.config.stem_pool)
            if self.config.small_images
            else F.max_pool2d(x, 3, 2, 1)
        )
        for stage in range(1, len(self.config.stage_sizes) + 1):
            x = getattr(self, f"layer{stage}")(x)
        return F.normalize(self.embedding(x.mean((2, 3))).float())


def ranked_list_loss(x, labels, alpha=1.2, margin=0.4, temperature_neg=10.0):
    """`rll_jax.loss.cvpr2019` of normalised rows, written plainly."""
    d = (2 - 2 * x @ x.detach().T).clamp_min(1e-12).sqrt()
    same = labels[:, None] == labels
    positive = (same & (d > alpha - margin)).float().fill_diagonal_(0)
    negative = torch.where(~same & (d < alpha), (temperature_neg * (alpha - d)).exp(), 0).detach()
    mean = lambda h, w: (h * w).sum(1) / w.sum(1).clamp_min(1e-12)
    return (mean(d - (alpha - margin), positive) + mean(alpha - d, negative)).mean() / 2


def calls(config, images, labels, dim, dtype, platform, channels_last, compiled):
    """{"train", "forward", "loss": to be timed}, and the most memory held on the device (MiB), a function, or None on CPU."""
    if platform != "cpu" and not torch.cuda.is_available():
        raise ModuleNotFoundError("torch with CUDA")  # shown as not installed
    device = "cpu" if platform == "cpu" else "cuda"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cudnn.benchmark = True  # XLA tries algorithms too
    torch.set_float32_matmul_precision("high")  # TF32 where XLA takes it by default
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = EmbeddingResNet(config, dim).to(device, memory_format=layout)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True
    )
    x = torch.from_numpy((images - config.mean) / config.std).permute(0, 3, 1, 2)
    x, labels = (
        x.to(device, torch.float32, memory_format=layout),
        torch.from_numpy(labels).to(device),
    )
    embedding = F.normalize(torch.randn(len(x), dim, device=device)).requires_grad_()
    run = torch.compile(network) if compiled else network
    mixed = (
        torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
    )
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def train():
        network.train()
        optimizer.zero_grad()
        with mixed:
            embeddings = run(x)
        ranked_list_loss(embeddings, labels).backward()
        optimizer.step()
        wait()

    def forward():
        network.eval()
        with torch.inference_mode(), mixed:
            run(x)
        wait()

    def loss():
        embedding.grad = None
        ranked_list_loss(embedding, labels).backward()
        wait()

    memory = (lambda: torch.cuda.max_memory_allocated() / 2**20) if device == "cuda" else None
    return {"train": train, "forward": forward, "loss": loss}, memory
