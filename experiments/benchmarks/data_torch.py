"""PyTorch's side of `experiments.benchmarks.data`: files read, decoded and augmented.

The views are those of torchvision on Pillow images. torchvision need not be installed.
"""

from collections.abc import Sequence
import math
import os
from typing import IO

import numpy as np
from PIL import Image
import torch  # pyright: ignore[reportMissingImports] (optional)


class Files(torch.utils.data.Dataset):
    """(pixels, label) of each file, cropped at random.

    Args:
      files: the paths.
      labels: the class of each.
      size: side of the pixels.
    """

    def __init__(self, files: Sequence[str | os.PathLike], labels: Sequence[int], size: int):
        self._files, self._labels, self._size = files, labels, size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        with open(self._files[row], "rb") as file:
            return train_view(file, self._size), self._labels[row]


def train_view(file: IO[bytes], size: int) -> torch.Tensor:
    """Returns (size, size, 3) uint8: torchvision's view for training.

    RandomResizedCrop(size, (0.5, 1), (3/4, 4/3)), RandomHorizontalFlip and PILToTensor, but for the
    order of the axes.
    """
    image = decode(file)
    for _ in range(10):
        area = image.width * image.height * torch.empty(1).uniform_(0.5, 1).item()
        aspect = torch.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3))).item()
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if width <= image.width and height <= image.height:
            top = int(torch.randint(0, image.height - height + 1, (1,)).item())
            left = int(torch.randint(0, image.width - width + 1, (1,)).item())
            break
    else:  # the whole of a square image, which the benchmark's are
        top, left, width, height = 0, 0, *image.size
    image = image.crop((left, top, left + width, top + height)).resize(
        (size, size), Image.Resampling.BILINEAR
    )
    if torch.rand(1) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _to_tensor(image)


def test_view(file: IO[bytes], size: int, resize: int) -> torch.Tensor:
    """Returns (size, size, 3) uint8: torchvision's view for tests.

    Resize((resize, resize)), CenterCrop(size) and PILToTensor, but for the order of the axes.
    """
    edge = (resize - size) // 2
    image = decode(file).resize((resize, resize), Image.Resampling.BILINEAR)
    return _to_tensor(image.crop((edge, edge, edge + size, edge + size)))


def decode(file: IO[bytes]) -> Image.Image:
    """Returns the whole image in RGB."""
    return Image.open(file).convert("RGB")


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))  # a copy, as torchvision makes one
