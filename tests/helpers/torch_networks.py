"""The published networks in PyTorch, written from their papers, with the published names."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(
        self, before: int, width: int, stride: int, bottleneck: bool, stride_in_first: bool
    ) -> None:
        super().__init__()
        after = width * (4 if bottleneck else 1)
        first, second = (stride, 1) if stride_in_first else (1, stride)
        shapes = [(before, width, 1, first), (width, width, 3, second), (width, after, 1, 1)]
        if not bottleneck:
            shapes = [(before, width, 3, stride), (width, width, 3, 1)]
        self.number = len(shapes)
        for i, (inputs, outputs, kernel, strides) in enumerate(shapes, start=1):
            conv = nn.Conv2d(inputs, outputs, kernel, strides, kernel // 2, bias=False)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(outputs))
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for i in range(1, self.number + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.number else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNetStages(nn.Module):
    def __init__(
        self,
        stages: Sequence[int],
        bottleneck: bool,
        width: int = 64,
        stride_in_first: bool = False,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        self.small_images = small_images
        stem = (3, 1, 1) if small_images else (7, 2, 3)
        self.conv1, self.bn1 = nn.Conv2d(3, width, *stem, bias=False), nn.BatchNorm2d(width)
        before = width
        for stage, blocks in enumerate(stages):
            modules = []
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                modules.append(Block(before, width << stage, stride, bottleneck, stride_in_first))
                before = (width << stage) * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*modules))
        self.stages = len(stages)

    def stage_ends(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.small_images else F.max_pool2d(x, 3, 2, 1)
        ends = []
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
            ends.append(x)
        return ends


class ResNet(ResNetStages):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The maps at the ends of the stages."""
        return self.stage_ends(x)


class EmbeddingResNet(ResNetStages):
    """A ResNet with the heads of `levels`; the heads' sizes come with the weights."""

    def __init__(self, levels: str, **options: Any) -> None:
        super().__init__(**options)
        self.levels = levels
        for level in levels:
            if level != "H":
                setattr(self, f"{level}_conv", nn.LazyConv2d(128, 1, bias=False))
                setattr(self, f"{level}_bn1", nn.BatchNorm2d(128))
                setattr(self, f"{level}_dense", nn.LazyLinear(1024, bias=False))
                setattr(self, f"{level}_bn2", nn.BatchNorm1d(1024))
            setattr(self, f"{level}_embedding", nn.LazyLinear(0, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, levels * D): each level's embedding normalised, and all of them again."""
        ends, embeddings = self.stage_ends(x), []
        for level in self.levels:
            x = self.head(level, ends["LMH".index(level) - 3])
            embeddings.append(F.normalize(x))
        return F.normalize(torch.cat(embeddings, 1))

    def head(self, level: str, x: torch.Tensor) -> torch.Tensor:
        if level == "H":
            x = x.mean((2, 3))
        else:
            x = F.avg_pool2d(x, 5, 3, ceil_mode=True, count_include_pad=False)
            x = self.layer(level, "conv")(x)
            x = F.relu(self.layer(level, "bn1")(x))
            x = self.layer(level, "dense")(x.flatten(1))
            x = F.relu(self.layer(level, "bn2")(x))
        return self.layer(level, "embedding")(x)

    def layer(self, level: str, name: str) -> nn.Module:
        return getattr(self, f"{level}_{name}")


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 of another width, with timm's names."""

    GROUPS = [
        (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
    ]  # fmt: skip
    ENDS = (0, 1, 2, 4, 6)

    def __init__(self, width: float) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = self.convolution(3, 32, 3, 2)
        self.blocks, before = nn.ModuleList(), 32
        for blocks, kernel, stride, expansion, channels in self.GROUPS:
            after, group = max(8, int(channels * width + 4) // 8 * 8), nn.ModuleList()
            for block in range(blocks):
                first = stride if block == 0 else 1
                group.append(self.block(before, after, kernel, first, expansion))
                before = after
            self.blocks.append(group)
        self.conv_head, self.bn2 = self.convolution(before, 1280, 1)

    @staticmethod
    def convolution(
        before: int, after: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        conv = nn.Conv2d(before, after, kernel, stride, groups=groups, bias=False)
        return conv, nn.BatchNorm2d(after, eps=1e-3)

    def block(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> nn.Module:
        hidden, layers = before * expansion, []
        if expansion > 1:
            layers.append(("conv_pw", self.convolution(before, hidden, 1)))
        layers.append(("conv_dw", self.convolution(hidden, hidden, kernel, stride, hidden)))
        last = "conv_pwl" if expansion > 1 else "conv_pw"
        layers.append((last, self.convolution(hidden, after, 1)))
        module = nn.Module()
        for number, (name, (conv, norm)) in enumerate(layers, start=1):
            module.add_module(name, conv)
            module.add_module(f"bn{number}", norm)
        return module

    @staticmethod
    def layer(x: torch.Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> torch.Tensor:
        """Pads as TensorFlow does: the odd row and column come last."""
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        pads = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
        around = [p for pad in reversed(pads) for p in (pad // 2, pad - pad // 2)]
        return norm(conv(F.pad(x, around)))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The maps at the ends of the stages."""
        x, ends = F.relu6(self.layer(x, self.conv_stem, self.bn1)), []
        for number, group in enumerate(self.blocks):
            for block in group:
                layers = [m for m in block.children()]
                y = x
                for conv, norm in zip(layers[::2], layers[1::2], strict=True):
                    y = self.layer(y, conv, norm)
                    y = y if norm is layers[-1] else F.relu6(y)
                x = x + y if x.shape == y.shape else y
            if number in self.ENDS:
                ends.append(x)
        ends[-1] = F.relu6(self.layer(x, self.conv_head, self.bn2))
        return ends


class GoogLeNetV2(nn.Module):
    """Convolutions with biases, as the Caffe model and its ports have them."""

    CHANNELS = {
        "3a": (64, 64, 64, 64, 96, 32),
        "3b": (64, 64, 96, 64, 96, 64),
        "3c": (0, 128, 160, 64, 96, 0),
        "4a": (224, 64, 96, 96, 128, 128),
        "4b": (192, 96, 128, 96, 128, 128),
        "4c": (160, 128, 160, 128, 160, 128),
        "4d": (96, 128, 192, 160, 192, 128),
        "4e": (0, 128, 192, 192, 256, 0),
        "5a": (352, 192, 320, 160, 224, 128),
        "5b": (352, 192, 320, 192, 224, 128),
    }

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.add("conv1_7x7_s2", 3, self.scaled(64), 7, 2)
        self.add("conv2_3x3_reduce", self.scaled(64), self.scaled(64), 1, 1)
        self.add("conv2_3x3", self.scaled(64), self.scaled(192), 3, 1)
        before = self.scaled(192)
        for name, channels in self.CHANNELS.items():
            one, three_reduce, three, double_reduce, double, pool = map(self.scaled, channels)
            prefix, stride = f"inception_{name}_", 1 if one else 2
            if one:
                self.add(prefix + "1x1", before, one, 1, 1)
                self.add(prefix + "pool_proj", before, pool, 1, 1)
            self.add(prefix + "3x3_reduce", before, three_reduce, 1, 1)
            self.add(prefix + "3x3", three_reduce, three, 3, stride)
            self.add(prefix + "double_3x3_reduce", before, double_reduce, 1, 1)
            self.add(prefix + "double_3x3_1", double_reduce, double, 3, 1)
            self.add(prefix + "double_3x3_2", double, double, 3, stride)
            before = (one + pool if one else before) + three + double

    def scaled(self, published: int) -> int:
        return round(self.share * published)

    def add(self, name: str, before: int, after: int, kernel: int, stride: int) -> None:
        setattr(self, name, nn.Conv2d(before, after, kernel, stride, kernel // 2))
        setattr(self, name + "_bn", nn.BatchNorm2d(after))

    def unit(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.relu(getattr(self, name + "_bn")(getattr(self, name)(x)))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The maps at the ends of the stages."""
        x = F.max_pool2d(self.unit("conv1_7x7_s2", x), 3, 2, ceil_mode=True)
        x = self.unit("conv2_3x3", self.unit("conv2_3x3_reduce", x))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        ends = []
        for name in self.CHANNELS:
            x = self.inception(name, x)
            if name in ("3c", "4e", "5b"):
                ends.append(x)
        return ends

    def inception(self, name: str, x: torch.Tensor) -> torch.Tensor:
        prefix = f"inception_{name}_"
        parts = [self.unit(prefix + "3x3", self.unit(prefix + "3x3_reduce", x))]
        y = self.unit(prefix + "double_3x3_1", self.unit(prefix + "double_3x3_reduce", x))
        parts.append(self.unit(prefix + "double_3x3_2", y))
        has_1x1 = self.CHANNELS[name][0] > 0
        if has_1x1:
            pool = F.max_pool2d if name == "5b" else F.avg_pool2d
            projected = self.unit(prefix + "pool_proj", pool(x, 3, 1, 1))
            parts = [self.unit(prefix + "1x1", x), *parts, projected]
        else:
            # Rounded as by Caffe. For maps with odd sides the windows are centred: there Caffe's
            # own network has no pool of the same size as the convolutions.
            height, width = x.shape[2:]
            padded = F.pad(x, (width % 2, 1, height % 2, 1), value=-torch.inf)
            parts.append(F.max_pool2d(padded, 3, 2))
        return torch.cat(parts, 1)
