"""How a network looks at a picture: resized, cropped, augmented. A Pillow image or an `images.EncodedImage` in, (H, W, 3) uint8 out."""

import dataclasses
import functools
import math
import os
import threading
from typing import Callable

import cv2
import numpy as np
from PIL import Image, ImageOps

from rll_jax.data import images

_WHITE = (255, 255, 255)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def resize_center_crop(
    image: Image.Image | images.EncodedImage, size: int, resize: int
) -> np.ndarray:
    """(size, size, 3): the whole picture squeezed to resize x resize, its centre kept: the test view of the recipes."""
    edge = (resize - size) // 2
    return _resized(image, resize)[edge : edge + size, edge : edge + size]


def _resized(image, side: int, box=None) -> np.ndarray:
    if isinstance(image, images.EncodedImage):
        return image.resized(
            (side, side), box, nearest=box is not None
        )  # of random windows, any is as good
    return np.asarray(
        image.resize((side, side), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    )


def _mirrored_by_chance(pixels, rng) -> np.ndarray:
    return (
        cv2.flip(pixels, 1) if rng.random() < 0.5 else pixels
    )  # a view with steps backwards is slow to stack


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random window of the picture squeezed to a square, of area share `scale` and aspect `ratio`, resized to size x size; mirrored
    half of the time.

    The train view of the 2020 recipes (resize to 256 x 256, then a crop of scale 0.5-1 and aspect 3/4-4/3), in one resize; of an
    `images.EncodedImage` its edges are whole pixels.
    """

    size: int
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __call__(
        self, image: Image.Image | images.EncodedImage, rng: np.random.Generator
    ) -> np.ndarray:
        area = rng.uniform(*self.scale)
        aspect = math.exp(rng.uniform(*map(math.log, self.ratio)))
        # at an area near 1 no window of another aspect fits
        aspect = min(max(aspect, area), 1 / area)
        width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        right, bottom = min(left + width, 1), min(top + height, 1)
        box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
        pixels = _resized(image, self.size, box)
        return _mirrored_by_chance(pixels, rng) if self.flip else pixels


@dataclasses.dataclass(frozen=True)
class ResizeCrop:
    """The whole picture squeezed to resize x resize, a random size x size of it kept; mirrored half of the time."""

    size: int
    resize: int

    def __call__(
        self, image: Image.Image | images.EncodedImage, rng: np.random.Generator
    ) -> np.ndarray:
        left, top = rng.integers(0, self.resize - self.size + 1, 2)
        pixels = _resized(image, self.resize)[top : top + self.size, left : left + self.size]
        return _mirrored_by_chance(pixels, rng)


@dataclasses.dataclass(frozen=True)
class BorderCrop:
    """The white border cut off, the rest fitted to fit x fit on white, a random size x size of it kept; mirrored half of the time.

    The train view of the 2019 recipes: a border is where all of a row or column is of grey 250 or more, and 15 pixels of it stay.
    """

    size: int
    fit: int

    def __call__(
        self, image: Image.Image | images.EncodedImage, rng: np.random.Generator
    ) -> np.ndarray:
        left, top = rng.integers(0, self.fit - self.size + 1, 2)
        pixels = _without_border(image, self.fit)[top : top + self.size, left : left + self.size]
        return _mirrored_by_chance(pixels, rng)


def border_center_crop(image: Image.Image | images.EncodedImage, size: int, fit: int) -> np.ndarray:
    """(size, size, 3): the test view that goes with `BorderCrop`."""
    edge = (fit - size) // 2
    return _without_border(image, fit)[edge : edge + size, edge : edge + size]


def _without_border(image, fit: int, white: int = 250, pad: int = 15) -> np.ndarray:
    image = _whole(image)
    drawn = np.asarray(image.convert("L")) < white
    if drawn.any():
        (top, bottom), (left, right) = (
            np.flatnonzero(drawn.any(axis=axis))[[0, -1]] for axis in (1, 0)
        )
        box = (
            max(left - pad, 0),
            max(top - pad, 0),
            min(right + 1 + pad, image.width),
            min(bottom + 1 + pad, image.height),
        )
        image = image.crop(tuple(map(int, box)))
    return np.asarray(ImageOps.pad(image, (fit, fit), Image.Resampling.BILINEAR, color=_WHITE))


def _whole(image) -> Image.Image:
    return image.rgb() if isinstance(image, images.EncodedImage) else image


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """A drawing turned, zoomed, stretched, shifted and recoloured a little, white where nothing was drawn; never mirrored.

    Args:
      size: side of the result, pixels.
      rotate: largest angle, degrees, either way.
      zoom: range of the scale; below 1 the drawing shrinks.
      stretch: largest log ratio of the two sides' scales.
      shift: largest shift, as a share of the side.
      colour: standard deviation of the colour matrix's change from the identity and of its offset (0: colours kept).
      grey: probability of losing all colour.
    """

    size: int
    rotate: float = 10.0
    zoom: tuple[float, float] = (0.8, 1.15)
    stretch: float = 0.1
    shift: float = 0.08
    colour: float = 0.1
    grey: float = 0.0

    def __call__(
        self, image: Image.Image | images.EncodedImage, rng: np.random.Generator
    ) -> np.ndarray:
        angle = np.deg2rad(rng.uniform(-self.rotate, self.rotate))
        zoom = np.exp(rng.uniform(*np.log(self.zoom)))
        stretch = np.exp(rng.uniform(-self.stretch, self.stretch) / 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        # Pillow's matrix maps the result's pixels to the source's
        matrix = (
            turn
            @ np.diag([image.width / (zoom * stretch), image.height * stretch / zoom])
            / self.size
        )
        centre = np.array([image.width, image.height]) * (
            0.5 + rng.uniform(-self.shift, self.shift, 2)
        )
        offset = centre - matrix @ [self.size / 2, self.size / 2]
        coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
        view = _whole(image).transform(
            (self.size, self.size),
            Image.Transform.AFFINE,
            coefficients,
            Image.Resampling.BICUBIC,
            fillcolor=_WHITE,
        )
        pixels = np.asarray(view)
        if not self.colour and not self.grey:
            return pixels
        mix = np.eye(3, dtype=np.float32) + rng.normal(0, self.colour, (3, 3)).astype(np.float32)
        if rng.random() < self.grey:
            mix = np.outer(mix @ np.ones(3, np.float32), _LUMA)
        # colours change around white, so that the paper stays white
        moved = (pixels.astype(np.float32) - 255) @ mix.T * np.float32(
            np.exp(rng.normal(0, self.colour))
        ) + 255
        return np.clip(moved, 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class ClassTransform:
    """Makes another class of a class: all its images of a batch mirrored, turned by quarters or with colours exchanged.

    A ranked list knows a class by its company in the batch alone, so a class that looks otherwise in another batch is one
    class more to learn from. Give each image of the class a generator in the same state.

    Args:
      mirror: probability of mirroring left and right.
      turn: probability of a turn by 90, 180 or 270 degrees.
      exchange: probability of a random permutation of red, green and blue.
    """

    mirror: float = 0.5
    turn: float = 0.3
    exchange: float = 0.5

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if rng.random() < self.mirror:
            pixels = pixels[:, ::-1]
        if rng.random() < self.turn:
            pixels = np.rot90(pixels, rng.integers(1, 4))
        if rng.random() < self.exchange:
            pixels = pixels[..., rng.permutation(3)]
        return np.ascontiguousarray(pixels)


@dataclasses.dataclass(frozen=True)
class Jittered:
    """A view whose pixels are then changed by albumentations, an optional package: colours alone, or RandAugment's kind of changes.

    Args:
      view: (image, rng) -> pixels.
      strong: two of eight changes of colour and shape, as RandAugment (Cubuk et al. 2020) draws them, instead of colours a little.

    Raises:
      ValueError: albumentations is not installed.
    """

    view: Callable
    strong: bool

    def __post_init__(self):
        try:
            _changes(self.strong, 0)
        except ImportError:
            raise ValueError(
                "this augmentation needs albumentations: pip install albumentations==2.0.8"
            )

    def __call__(
        self, image: Image.Image | images.EncodedImage, rng: np.random.Generator
    ) -> np.ndarray:
        pixels = np.ascontiguousarray(self.view(image, rng))
        changes = _changes(
            self.strong, threading.get_ident()
        )  # they remember their random state: one for each thread
        changes.set_random_seed(int(rng.integers(2**31)))
        return changes(image=pixels)["image"]


@functools.lru_cache(maxsize=256)
def _changes(strong: bool, thread: int):
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network otherwise
    import albumentations as A

    if not strong:
        return A.Compose(
            [
                A.ColorJitter(
                    brightness=(0.75, 1.25),
                    contrast=(0.75, 1.25),
                    saturation=(0.75, 1.25),
                    hue=(-0.05, 0.05),
                    p=0.8,
                )
            ]
        )
    one_of = [
        A.ColorJitter(
            brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.1, 0.1), p=1
        ),
        A.AutoContrast(p=1),
        A.Equalize(p=1),
        A.Posterize(num_bits=(4, 7), p=1),
        A.Solarize(p=1),
        A.Sharpen(p=1),
        A.ToGray(p=1),
        A.Affine(rotate=(-25, 25), shear=(-15, 15), translate_percent=(-0.1, 0.1), p=1),
    ]
    return A.Compose([A.SomeOf(one_of, n=2, replace=False)])
