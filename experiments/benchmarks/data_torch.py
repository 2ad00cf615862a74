"""PyTorch's side of bench_data: files read, decoded and augmented as with torchvision on Pillow images, which need not be installed."""

import math

import numpy as np
from PIL import Image
import torch


class Files(torch.utils.data.Dataset):
    """(pixels, label) of the row's file, cropped at random."""

    def __init__(self, files, labels, size):
        self._files, self._labels, self._size = files, labels, size

    def __len__(self):
        return len(self._files)

    def __getitem__(self, row):
        with open(self._files[row], "rb") as file:
            return train_view(file, self._size), self._labels[row]


def train_view(file, size):
    """RandomResizedCrop(size, (0.5, 1), (3/4, 4/3)), RandomHorizontalFlip and PILToTensor but for its order of axes."""
    image = decode(file)
    for _ in range(10):
        area = image.width * image.height * torch.empty(1).uniform_(0.5, 1).item()
        aspect = torch.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3))).item()
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if width <= image.width and height <= image.height:
            top = torch.randint(0, image.height - height + 1, (1,)).item()
            left = torch.randint(0, image.width - width + 1, (1,)).item()
            break
    else:  # all of a square, which ours are
        top, left, width, height = 0, 0, *image.size
    image = image.crop((left, top, left + width, top + height)).resize(
        (size, size), Image.Resampling.BILINEAR
    )
    return _to_tensor(
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else image
    )


def test_view(file, size, resize):
    """Resize((resize, resize)), CenterCrop(size) and PILToTensor but for its order of axes."""
    edge = (resize - size) // 2
    image = decode(file).resize((resize, resize), Image.Resampling.BILINEAR)
    return _to_tensor(image.crop((edge, edge, edge + size, edge + size)))


def decode(file):
    return Image.open(file).convert("RGB")


def _to_tensor(image):
    return torch.from_numpy(np.array(image))  # a copy, as torchvision makes one
