"""The views of an image by the names of --augment, to train on and to test by."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import numpy as np

from rll_jax import typing
from rll_jax.data import views

_RESIZE = 256 / 227  # the recipes resize to 256 pixels and keep 227


class Views(NamedTuple):
    """Two ways to look at an image, each made for a size in pixels.

    Attributes:
      train: size -> a random view: (image, rng) -> (size, size, 3) uint8.
      test: size -> a fixed view: image -> (size, size, 3) uint8.
    """

    train: Callable[[int], typing.View]
    test: Callable[[int], Callable[[Any], np.ndarray]]


def resized_side(size: int) -> int:
    """Returns the side that an image is resized to before `size` pixels of it are kept."""
    return round(size * _RESIZE)


def _whole_image(size: int) -> Callable[[Any], np.ndarray]:
    return functools.partial(views.resize_center_crop, size=size, resize=size)


def _centre(size: int) -> Callable[[Any], np.ndarray]:
    return functools.partial(views.resize_center_crop, size=size, resize=resized_side(size))


def _border_centre(size: int) -> Callable[[Any], np.ndarray]:
    return functools.partial(views.border_center_crop, size=size, fit=resized_side(size))


def _resize_crop(size: int) -> typing.View:
    return views.ResizeCrop(size, resized_side(size))


def _border_crop(size: int) -> typing.View:
    return views.BorderCrop(size, resized_side(size))


def _jittered(size: int, *, strong: bool) -> typing.View:
    return views.Jittered(views.RandomResizedCrop(size), strong=strong)


VIEWS = {
    "affine": Views(views.RandomAffine, _whole_image),
    "random_resized_crop": Views(views.RandomResizedCrop, _centre),
    "wide_crop": Views(functools.partial(views.RandomResizedCrop, scale=(0.16, 1.0)), _centre),
    "resize_crop": Views(_resize_crop, _centre),
    "border_crop": Views(_border_crop, _border_centre),
    "colour_jitter": Views(functools.partial(_jittered, strong=False), _centre),
    "rand_augment": Views(functools.partial(_jittered, strong=True), _centre),
}
