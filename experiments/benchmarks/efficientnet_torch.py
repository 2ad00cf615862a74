"""EfficientNet-Lite in PyTorch, for `experiments.benchmarks.model`, under timm's names."""

import torch  # pyright: ignore[reportMissingImports] (optional)
from torch import nn  # pyright: ignore[reportMissingImports] (optional)
import torch.nn.functional as F  # pyright: ignore[reportMissingImports] (optional)

from rll_jax.networks import efficientnet


class EmbeddingEfficientNet(nn.Module):
    """The network of an `EfficientNetLiteConfig` with level H.

    Args:
      config: the network.
      dim: the dimension of the embeddings.
    """

    def __init__(self, config: efficientnet.EfficientNetLiteConfig, dim: int):
        super().__init__()
        before, places = efficientnet.STEM, {}
        self.conv_stem, self.bn1 = Convolution(3, before, 3, 2), _norm(before)
        for place, block, group in config.blocks():
            stride = group.strides if block == 0 else 1
            places.setdefault(place, []).append(Block(before, group, stride))
            before = group.channels
        self.blocks = nn.ModuleList(nn.Sequential(*blocks) for blocks in places.values())
        self.conv_head, self.bn2 = (
            Convolution(before, efficientnet.HEAD, 1),
            _norm(efficientnet.HEAD),
        )
        self.embedding = nn.Linear(efficientnet.HEAD, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, dim) float32 of unit length, of (B, 3, H, W) normalised pixels."""
        x = F.relu6(self.bn1(self.conv_stem(x)))
        for blocks in self.blocks:
            x = blocks(x)
        x = F.relu6(self.bn2(self.conv_head(x)))
        return F.normalize(self.embedding(x.mean((2, 3))).float())


class Block(nn.Module):
    """A 1x1 convolution to more channels, a depthwise one, and a 1x1 convolution to fewer.

    Args:
      before: channels of the input.
      group: what kind of block it is.
      stride: of the depthwise convolution.
    """

    def __init__(self, before: int, group: efficientnet.Group, stride: int):
        super().__init__()
        hidden, after = before * group.expansion, group.channels
        layers = [
            ("conv_dw", Convolution(hidden, hidden, group.kernel, stride, hidden)),
            ("conv_pwl" if group.expansion > 1 else "conv_pw", Convolution(hidden, after, 1)),
        ]
        if group.expansion > 1:
            layers.insert(0, ("conv_pw", Convolution(before, hidden, 1)))
        for number, (name, convolution) in enumerate(layers, start=1):
            self.add_module(name, convolution)
            self.add_module(f"bn{number}", _norm(convolution.out_channels))
        self.names = [name for name, _ in layers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, channels, h, w) of (B, channels, h, w)."""
        y = x
        for number, name in enumerate(self.names, start=1):
            y = getattr(self, f"bn{number}")(getattr(self, name)(y))
            y = F.relu6(y) if number < len(self.names) else y
        return x + y if x.shape == y.shape else y


class Convolution(nn.Conv2d):
    """A convolution that pads as TensorFlow does: the odd row and column come last."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(before, after, kernel, stride, groups=groups, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns (B, channels, h / stride, w / stride), rounded up, of (B, channels, h, w)."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = [
            max(((side - 1) // stride) * stride + kernel - side, 0) for side in input.shape[-2:]
        ]
        around = [part for pad in reversed(pads) for part in (pad // 2, pad - pad // 2)]
        return super().forward(F.pad(input, around) if any(around) else input)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=efficientnet.EPSILON)
