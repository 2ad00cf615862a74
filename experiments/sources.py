"""Where pictures come from and how they are looked at, for each data set by name (--dataset)."""
import functools
import os
import pathlib
from typing import Callable, NamedTuple

from rll_jax import datasets, images

_SHIPPED_EMOJI = pathlib.Path(__file__).parent / "data" / "emoji"
_RESIZE = 256 / 227  # the recipes resize to 256 and keep 227


class Source(NamedTuple):
    """A data set.

    Attributes:
      open_split: (data_dir, "train" or "test") -> datasets.ImageSet.
      augment: image_size -> (image, rng) -> (image_size, image_size, 3) uint8, for training.
      test_view: image_size -> image -> (image_size, image_size, 3) uint8.
      ks: the K of Recall@K.
    """

    open_split: Callable
    augment: Callable
    test_view: Callable
    ks: tuple[int, ...]


def _whole(size):
    return functools.partial(images.resize_center_crop, size=size, resize=size)


def _centre(size):
    return functools.partial(images.resize_center_crop, size=size, resize=round(size * _RESIZE))


def _open_emoji(data_dir: str | os.PathLike, split: str) -> datasets.ImageSet:
    return datasets.open_prepared(data_dir or _SHIPPED_EMOJI, split)


SOURCES = {
    "emoji": Source(_open_emoji, images.RandomAffine, _whole, (1, 2, 4, 8)),
    "sop": Source(datasets.open_sop, images.RandomResizedCrop, _centre, (1, 10, 100, 1000)),
}
