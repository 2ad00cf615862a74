"""The views of an image by the names of --augment, to train on and to test by."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import numpy as np

from rll_jax import typing
from rll_jax.data import views
from rll_jax.data.images import Interpolation

_RESIZE = 256 / 227  # the recipes resize to 256 pixels and keep 227


class Views(NamedTuple):
    """Two ways to look at an image, each made for a size in pixels and an interpolation.

    Attributes:
      train: (size, interpolation) -> a random view: (image, rng) -> (size, size, 3) uint8.
      test: (size, interpolation) -> a fixed view: image -> (size, size, 3) uint8.
    """

    train: Callable[[int, Interpolation], typing.View]
    test: Callable[[int, Interpolation], Callable[[Any], np.ndarray]]


def resized_side(size: int) -> int:
    """Returns the side that an image is resized to before `size` pixels of it are kept."""
    return round(size * _RESIZE)


def _whole_image(size: int, interpolation: Interpolation) -> Callable[[Any], np.ndarray]:
    return functools.partial(
        views.resize_center_crop, size=size, resize=size, interpolation=interpolation
    )


def _centre(size: int, interpolation: Interpolation) -> Callable[[Any], np.ndarray]:
    return functools.partial(
        views.resize_center_crop,
        size=size,
        resize=resized_side(size),
        interpolation=interpolation,
    )


def _centre_of_aspect(size: int, interpolation: Interpolation) -> Callable[[Any], np.ndarray]:
    return functools.partial(
        views.short_side_center_crop,
        size=size,
        short_side=resized_side(size),
        interpolation=interpolation,
    )


def _border_centre(size: int, interpolation: Interpolation) -> Callable[[Any], np.ndarray]:
    return functools.partial(
        views.border_center_crop, size=size, fit=resized_side(size), interpolation=interpolation
    )


def _affine(size: int, interpolation: Interpolation) -> typing.View:
    del interpolation  # always bicubic
    return views.RandomAffine(size)


def _random_resized_crop(size: int, interpolation: Interpolation) -> typing.View:
    return views.RandomResizedCrop(size, interpolation=interpolation)


def _wide_crop(size: int, interpolation: Interpolation) -> typing.View:
    return views.RandomResizedCrop(
        size, scale=(0.16, 1.0), interpolation=interpolation, square=False
    )


def _scaled_crop(size: int, interpolation: Interpolation) -> typing.View:
    return views.ScaledCrop(size, resized_side(size), interpolation=interpolation)


def _resize_crop(size: int, interpolation: Interpolation) -> typing.View:
    return views.ResizeCrop(size, resized_side(size), interpolation)


def _border_crop(size: int, interpolation: Interpolation) -> typing.View:
    return views.BorderCrop(size, resized_side(size), interpolation)


def _jittered(size: int, interpolation: Interpolation, *, strong: bool) -> typing.View:
    return views.Jittered(_random_resized_crop(size, interpolation), strong=strong)


VIEWS = {
    "affine": Views(_affine, _whole_image),
    "random_resized_crop": Views(_random_resized_crop, _centre),
    "scaled_crop": Views(_scaled_crop, _centre),
    "wide_crop": Views(_wide_crop, _centre_of_aspect),
    "resize_crop": Views(_resize_crop, _centre),
    "border_crop": Views(_border_crop, _border_centre),
    "colour_jitter": Views(functools.partial(_jittered, strong=False), _centre),
    "rand_augment": Views(functools.partial(_jittered, strong=True), _centre),
}
