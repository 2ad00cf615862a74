"""The published networks in PyTorch, written from their papers, under the names that weights are published with."""

import torch
from torch import nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, before, width, stride, bottleneck, stride_in_first):
        super().__init__()
        after = width * (4 if bottleneck else 1)
        first, second = (stride, 1) if stride_in_first else (1, stride)
        shapes = [(before, width, 1, first), (width, width, 3, second), (width, after, 1, 1)]
        if not bottleneck:
            shapes = [(before, width, 3, stride), (width, width, 3, 1)]
        self.number = len(shapes)
        for i, (a, b, kernel, s) in enumerate(shapes, start=1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, kernel, s, kernel // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x):
        y = x
        for i in range(1, self.number + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.number else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, stages, bottleneck, width=64, stride_in_first=False, small_images=False):
        super().__init__()
        self.small_images = small_images
        stem = (3, 1, 1) if small_images else (7, 2, 3)
        self.conv1, self.bn1 = nn.Conv2d(3, width, *stem, bias=False), nn.BatchNorm2d(width)
        before = width
        for stage, blocks in enumerate(stages):
            made = []
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                made.append(Block(before, width << stage, stride, bottleneck, stride_in_first))
                before = (width << stage) * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*made))
        self.stages = len(stages)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.small_images else F.max_pool2d(x, 3, 2, 1)
        ends = []
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
            ends.append(x)
        return ends


class EmbeddingResNet(ResNet):
    """With the heads of `levels`, as section 2 of the reference has them; their sizes come with the weights."""

    def __init__(self, levels, **options):
        super().__init__(**options)
        self.levels = levels
        for level in levels:
            if level != "H":
                setattr(self, f"{level}_conv", nn.LazyConv2d(128, 1, bias=False))
                setattr(self, f"{level}_bn1", nn.BatchNorm2d(128))
                setattr(self, f"{level}_dense", nn.LazyLinear(1024, bias=False))
                setattr(self, f"{level}_bn2", nn.BatchNorm1d(1024))
            setattr(self, f"{level}_embedding", nn.LazyLinear(0, bias=False))

    def forward(self, x):
        """(B, levels * D): each level's embedding normalised, and all of them again."""
        ends, embeddings = super().forward(x), []
        for level in self.levels:
            of = lambda name: getattr(self, f"{level}_{name}")
            x = ends["LMH".index(level) - 3]
            if level == "H":
                x = x.mean((2, 3))
            else:
                x = F.relu(of("bn1")(of("conv")(F.avg_pool2d(x, 5, 3))))
                x = F.relu(of("bn2")(of("dense")(x.flatten(1))))
            embeddings.append(F.normalize(of("embedding")(x)))
        return F.normalize(torch.cat(embeddings, 1))


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

    def __init__(self, share):
        super().__init__()
        self.of = lambda published: round(share * published)
        self.add("conv1_7x7_s2", 3, self.of(64), 7, 2)
        self.add("conv2_3x3_reduce", self.of(64), self.of(64), 1, 1)
        self.add("conv2_3x3", self.of(64), self.of(192), 3, 1)
        before = self.of(192)
        for name, channels in self.CHANNELS.items():
            one, three_reduce, three, double_reduce, double, pool = map(self.of, channels)
            p, stride = f"inception_{name}_", 1 if one else 2
            if one:
                self.add(p + "1x1", before, one, 1, 1)
                self.add(p + "pool_proj", before, pool, 1, 1)
            self.add(p + "3x3_reduce", before, three_reduce, 1, 1)
            self.add(p + "3x3", three_reduce, three, 3, stride)
            self.add(p + "double_3x3_reduce", before, double_reduce, 1, 1)
            self.add(p + "double_3x3_1", double_reduce, double, 3, 1)
            self.add(p + "double_3x3_2", double, double, 3, stride)
            before = (one + pool if one else before) + three + double

    def add(self, name, before, after, kernel, stride):
        setattr(self, name, nn.Conv2d(before, after, kernel, stride, kernel // 2))
        setattr(self, name + "_bn", nn.BatchNorm2d(after))

    def unit(self, name, x):
        return F.relu(getattr(self, name + "_bn")(getattr(self, name)(x)))

    def forward(self, x):
        x = F.max_pool2d(self.unit("conv1_7x7_s2", x), 3, 2, ceil_mode=True)
        x = F.max_pool2d(
            self.unit("conv2_3x3", self.unit("conv2_3x3_reduce", x)), 3, 2, ceil_mode=True
        )
        ends = []
        for name, channels in self.CHANNELS.items():
            p = f"inception_{name}_"
            parts = [self.unit(p + "3x3", self.unit(p + "3x3_reduce", x))]
            y = self.unit(p + "double_3x3_1", self.unit(p + "double_3x3_reduce", x))
            parts.append(self.unit(p + "double_3x3_2", y))
            if channels[0]:
                pool = F.max_pool2d if name == "5b" else F.avg_pool2d
                parts = [
                    self.unit(p + "1x1", x),
                    *parts,
                    self.unit(p + "pool_proj", pool(x, 3, 1, 1)),
                ]
            else:
                # as Caffe rounds; of maps with odd sides, where Caffe's network has no pool of the convolutions' size, centred
                height, width = x.shape[2:]
                parts.append(
                    F.max_pool2d(F.pad(x, (width % 2, 1, height % 2, 1), value=-torch.inf), 3, 2)
                )
            x = torch.cat(parts, 1)
            if name in ("3c", "4e", "5b"):
                ends.append(x)
        return ends
