"""Views: how a network sees an image, resized, cropped and augmented.

A view takes a Pillow image or an `images.EncodedImage` and returns (H, W, 3) uint8. A training view
also takes a generator of random numbers, and is a `rll_jax.typing.View`.
"""

import dataclasses
import functools
import math
import os
import threading
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from rll_jax.data import images
from rll_jax.data.images import Interpolation
from rll_jax.typing import View

AnyImage = Image.Image | images.EncodedImage

_WHITE = (255, 255, 255)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_BORDER_GREY = 250  # a row or column is border where all of it is at least so light
_BORDER_KEPT = 15  # pixels of the border that stay


def resize_center_crop(
    image: AnyImage, size: int, resize: int, interpolation: Interpolation = "bilinear"
) -> np.ndarray:
    """Returns the test view of the recipes: the centre of the image resized to a square.

    Args:
      image: the image.
      size: side of the result, pixels.
      resize: side of the square that the full image is resized to, whatever its aspect.
      interpolation: "bilinear" or "bicubic".
    """
    edge = (resize - size) // 2
    pixels = _resized(image, resize, interpolation=interpolation)
    return pixels[edge : edge + size, edge : edge + size]


def short_side_center_crop(
    image: AnyImage, size: int, short_side: int, interpolation: Interpolation = "bilinear"
) -> np.ndarray:
    """Returns the test view of ImageNet: the centre of the image, which keeps its aspect.

    Args:
      image: the image.
      size: side of the result, pixels.
      short_side: what the shorter side of the full image is resized to, pixels.
      interpolation: "bilinear" or "bicubic".
    """
    side = min(image.width, image.height) * size / short_side
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return _resized(image, size, (left, top, left + side, top + side), interpolation)


def border_center_crop(
    image: AnyImage, size: int, fit: int, interpolation: Interpolation = "bilinear"
) -> np.ndarray:
    """Returns the (size, size, 3) test view that goes with `BorderCrop`: its centre crop."""
    edge = (fit - size) // 2
    return _without_border(image, fit, interpolation)[edge : edge + size, edge : edge + size]


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random window of the image, resized to a square, mirrored half of the time.

    As torchvision's, of the image or of the image resized to a square, but in one resize. Where no
    window of the drawn aspect fits, it gets the nearest that does. Of an `images.EncodedImage` the
    edges of the window are moved to whole pixels where the interpolation is bilinear. The window of
    the 2020 recipes is `ScaledCrop`.

    Args:
      size: side of the result, pixels.
      scale: range of the window's share of the area.
      ratio: range of the window's aspect (width / height); its logarithm is drawn uniformly.
      flip: mirror half of the time.
      interpolation: "bilinear" or "bicubic".
      square: whether the window is one of the image resized to a square, whatever its aspect.
    """

    size: int
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    interpolation: Interpolation = "bilinear"
    square: bool = True

    def __call__(self, image: AnyImage, rng: np.random.Generator) -> np.ndarray:
        """Returns (size, size, 3) uint8."""
        area = rng.uniform(*self.scale)
        smallest, largest = self.ratio
        aspect = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
        if not self.square:
            aspect *= image.height / image.width  # of the shares of the sides
        # At an area near 1 no window of another aspect fits.
        aspect = min(max(aspect, area), 1 / area)
        width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        right, bottom = min(left + width, 1), min(top + height, 1)
        box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
        # The window that is moved to whole pixels is as random, and faster.
        pixels = _resized(image, self.size, box, self.interpolation, nearest=True)
        return _randomly_mirrored(pixels, rng) if self.flip else pixels


@dataclasses.dataclass(frozen=True)
class ScaledCrop:
    """A random window of the image resized to a square, resized again, mirrored half of the time.

    The training view of the authors' 2020 recipes. The window is `resize` s wide and `resize` s r
    high, with s and r drawn uniformly. Where a side would be longer than `resize` - 1, both sides
    shrink until it is not. The window then has a random place, in whole pixels.

    Args:
      size: side of the result, pixels.
      resize: side of the square that the full image is resized to, whatever its aspect.
      scale: range of s.
      ratio: range of r, the window's height / width.
      interpolation: "bilinear" or "bicubic", of both resizes.
    """

    size: int
    resize: int
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"

    def __call__(self, image: AnyImage, rng: np.random.Generator) -> np.ndarray:
        """Returns (size, size, 3) uint8."""
        left, top, width, height = self.window(rng)
        square = _resized(image, self.resize, interpolation=self.interpolation)
        window = Image.fromarray(square[top : top + height, left : left + width])
        return _randomly_mirrored(
            _resized(window, self.size, interpolation=self.interpolation), rng
        )

    def window(self, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draws the left, top, width and height of a window, in pixels of the square."""
        width = self.resize * rng.uniform(*self.scale)
        height = width * rng.uniform(*self.ratio)
        shrink = min(1.0, (self.resize - 1) / max(width, height))
        width, height = max(1, round(width * shrink)), max(1, round(height * shrink))
        left = int(rng.integers(0, self.resize - width + 1))
        top = int(rng.integers(0, self.resize - height + 1))
        return left, top, width, height


@dataclasses.dataclass(frozen=True)
class ResizeCrop:
    """A random crop of the image resized to a square, mirrored half of the time.

    Args:
      size: side of the result, pixels.
      resize: side of the square that the full image is resized to, whatever its aspect.
      interpolation: "bilinear" or "bicubic".
    """

    size: int
    resize: int
    interpolation: Interpolation = "bilinear"

    def __call__(self, image: AnyImage, rng: np.random.Generator) -> np.ndarray:
        """Returns (size, size, 3) uint8."""
        left, top = rng.integers(0, self.resize - self.size + 1, 2)
        pixels = _resized(image, self.resize, interpolation=self.interpolation)
        return _randomly_mirrored(pixels[top : top + self.size, left : left + self.size], rng)


@dataclasses.dataclass(frozen=True)
class BorderCrop:
    """A random crop of the image without its white border, mirrored half of the time.

    The training view of the 2019 recipes. A row or column at an edge is border where all of it is
    of grey 250 or more; 15 pixels of the border stay. The remaining image is fitted into a white
    square, which keeps its aspect.

    Args:
      size: side of the result, pixels.
      fit: side of the white square, pixels.
      interpolation: "bilinear" or "bicubic".
    """

    size: int
    fit: int
    interpolation: Interpolation = "bilinear"

    def __call__(self, image: AnyImage, rng: np.random.Generator) -> np.ndarray:
        """Returns (size, size, 3) uint8."""
        left, top = rng.integers(0, self.fit - self.size + 1, 2)
        pixels = _without_border(image, self.fit, self.interpolation)
        return _randomly_mirrored(pixels[top : top + self.size, left : left + self.size], rng)


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """A drawing that is turned, zoomed, stretched, shifted and recoloured a little.

    Pixels outside the drawing are white. It is never mirrored.

    Args:
      size: side of the result, pixels.
      rotate: largest angle, degrees, either way.
      zoom: range of the scale, whose logarithm is drawn uniformly; below 1 the drawing shrinks.
      stretch: largest log ratio of the two sides' scales.
      shift: largest shift, as a share of the side.
      colour: standard deviation of the colour matrix's change from the identity, and of the
        logarithm of a common factor (0: colours are kept).
      grey: probability of losing all colour.
    """

    size: int
    rotate: float = 10.0
    zoom: tuple[float, float] = (0.8, 1.15)
    stretch: float = 0.1
    shift: float = 0.08
    colour: float = 0.1
    grey: float = 0.0

    def __call__(self, image: AnyImage, rng: np.random.Generator) -> np.ndarray:
        """Returns (size, size, 3) uint8."""
        moved = _pillow(image).transform(
            (self.size, self.size),
            Image.Transform.AFFINE,
            self._coefficients(image, rng),
            Image.Resampling.BICUBIC,
            fillcolor=_WHITE,
        )
        pixels = np.asarray(moved)
        return self._recoloured(pixels, rng) if self.colour or self.grey else pixels

    def _coefficients(self, image: AnyImage, rng: np.random.Generator) -> tuple[float, ...]:
        """Draws Pillow's six, which map the pixels of the result to those of the image."""
        angle = np.deg2rad(rng.uniform(-self.rotate, self.rotate))
        zoom = np.exp(rng.uniform(*np.log(self.zoom)))
        stretch = np.exp(rng.uniform(-self.stretch, self.stretch) / 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        scale = np.diag([image.width / (zoom * stretch), image.height * stretch / zoom])
        matrix = turn @ scale / self.size
        shift = rng.uniform(-self.shift, self.shift, 2)
        centre = np.array([image.width, image.height]) * (0.5 + shift)
        offset = centre - matrix @ [self.size / 2, self.size / 2]
        return (*matrix[0], offset[0], *matrix[1], offset[1])

    def _recoloured(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        mix = np.eye(3, dtype=np.float32) + rng.normal(0, self.colour, (3, 3)).astype(np.float32)
        if rng.random() < self.grey:
            mix = np.outer(mix @ np.ones(3, np.float32), _LUMA)
        factor = np.float32(np.exp(rng.normal(0, self.colour)))
        # Colours change around white, so that the paper stays white.
        changed = (pixels.astype(np.float32) - 255) @ mix.T * factor + 255
        return np.clip(changed, 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class ClassTransform:
    """Makes a new class of a class: all its images are mirrored, turned or recoloured alike.

    A ranked list knows a class only by the other classes of the batch. A class that looks different
    in another batch is therefore one more class to learn from. Give each image of the class a
    generator in the same state, as `pipeline.train_batches` does.

    Args:
      mirror: probability of mirroring left and right.
      turn: probability of a turn by 90, 180 or 270 degrees.
      exchange: probability of a random permutation of red, green and blue.
    """

    mirror: float = 0.5
    turn: float = 0.3
    exchange: float = 0.5

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the pixels, (H, W, 3) or turned (W, H, 3), changed."""
        if rng.random() < self.mirror:
            pixels = pixels[:, ::-1]
        if rng.random() < self.turn:
            pixels = np.rot90(pixels, int(rng.integers(1, 4)))
        if rng.random() < self.exchange:
            pixels = pixels[..., rng.permutation(3)]
        return np.ascontiguousarray(pixels)


@dataclasses.dataclass(frozen=True)
class Jittered:
    """A view whose pixels are then changed by albumentations, which is an optional package.

    Args:
      view: the view.
      strong: two of eight changes of colour and shape, as RandAugment (Cubuk et al. 2020) draws
        them. Otherwise the colours change a little.

    Raises:
      ValueError: albumentations is not installed.
    """

    view: View
    strong: bool

    def __post_init__(self) -> None:
        try:
            _jitter(self.strong, 0)
        except ImportError:
            raise ValueError(
                "this augmentation needs albumentations: pip install albumentations==2.0.8"
            ) from None

    def __call__(self, image: AnyImage, rng: np.random.Generator) -> np.ndarray:
        """Returns what `view` returns, with other colours or shapes."""
        pixels = np.ascontiguousarray(self.view(image, rng))
        # The transforms keep a random state, so each thread has its own.
        jitter = _jitter(self.strong, threading.get_ident())
        jitter.set_random_seed(int(rng.integers(2**31)))
        return jitter(image=pixels)["image"]


@functools.lru_cache(maxsize=256)
def _jitter(strong: bool, thread: int) -> Any:
    """Returns the transforms of albumentations that a thread uses."""
    # Without this variable the import asks the network for a newer version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A  # pyright: ignore[reportMissingImports]  # optional

    if not strong:
        weak = A.ColorJitter(
            brightness=(0.75, 1.25),
            contrast=(0.75, 1.25),
            saturation=(0.75, 1.25),
            hue=(-0.05, 0.05),
            p=0.8,
        )
        return A.Compose([weak])
    changes = [
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
    return A.Compose([A.SomeOf(changes, n=2, replace=False)])


def _pillow(image: AnyImage) -> Image.Image:
    return image.rgb() if isinstance(image, images.EncodedImage) else image


def _resized(
    image: AnyImage,
    side: int,
    box: images.Box | None = None,
    interpolation: Interpolation = "bilinear",
    *,
    nearest: bool = False,
) -> np.ndarray:
    """Returns the image, or a box of it, resized to (side, side, 3); see `EncodedImage.resized`."""
    if isinstance(image, images.EncodedImage):
        return image.resized((side, side), box, nearest=nearest, interpolation=interpolation)
    gap = 2.0 if interpolation == "bilinear" else None
    resample = images.RESAMPLING[interpolation]
    return np.asarray(image.resize((side, side), resample, box=box, reducing_gap=gap))


def _randomly_mirrored(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Not `pixels[:, ::-1]`: an array with steps backwards is slow to stack.
    return cv2.flip(pixels, 1) if rng.random() < 0.5 else pixels


def _without_border(image: AnyImage, fit: int, interpolation: Interpolation) -> np.ndarray:
    """Returns the image without its white border, fitted into a white (fit, fit, 3)."""
    image = _pillow(image)
    drawn = np.asarray(image.convert("L")) < _BORDER_GREY
    if drawn.any():
        rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
        image = image.crop(
            (
                max(int(columns[0]) - _BORDER_KEPT, 0),
                max(int(rows[0]) - _BORDER_KEPT, 0),
                min(int(columns[-1]) + 1 + _BORDER_KEPT, image.width),
                min(int(rows[-1]) + 1 + _BORDER_KEPT, image.height),
            )
        )
    return np.asarray(
        ImageOps.pad(image, (fit, fit), images.RESAMPLING[interpolation], color=_WHITE)
    )
