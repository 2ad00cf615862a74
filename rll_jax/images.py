"""Pixels on the host: decode, resize, augment. uint8 RGB arrays in and out; the only file that knows Pillow."""
import dataclasses
import io
import warnings

import numpy as np
from PIL import Image, ImageOps

_WHITE = (255, 255, 255)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class BadImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


def decode(data: bytes, name: str) -> Image.Image:
    """The RGB picture in `data` (PNG, JPEG, WebP, ...), upright by its EXIF tag, transparency on white.

    Raises:
      BadImageError: empty, truncated, broken or not an image; `name` is in the message.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
            if image.mode in ("F", "I"):  # of no range that all agree on
                raise ValueError(f"its pixels are of mode {image.mode}, expected 8 or 16 bits")
            image = ImageOps.exif_transpose(image)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE + (255,)), image)
            elif image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # damaged pictures raise anything in Pillow, struct.error and TypeError among it
        raise BadImageError(f"cannot decode the image {name!r} ({len(data)} bytes): {error}") from error


def blank(size: int = 8) -> Image.Image:
    """A white picture, to stand for one that cannot be read."""
    return Image.new("RGB", (size, size), _WHITE)


def resize_center_crop(image: Image.Image, size: int, resize: int) -> np.ndarray:
    """(size, size, 3): the whole picture squeezed to resize x resize, its centre kept: the test view of the recipes."""
    edge = (resize - size) / 2
    scale = (image.width / resize, image.height / resize)
    box = (edge * scale[0], edge * scale[1], (edge + size) * scale[0], (edge + size) * scale[1])
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0))


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random window of area share `scale` and aspect `ratio`, resized to size x size; mirrored half of the time.

    The train view of the 2020 recipes (scale 0.5-1, aspect 3/4-4/3).
    """

    size: int
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        area = image.width * image.height * rng.uniform(*self.scale)
        aspect = np.exp(rng.uniform(*np.log(self.ratio)))
        width = min(np.sqrt(area * aspect), image.width)
        height = min(np.sqrt(area / aspect), image.height)
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        view = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        pixels = np.asarray(view)
        return pixels[:, ::-1] if self.flip and rng.random() < 0.5 else pixels


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

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        angle = np.deg2rad(rng.uniform(-self.rotate, self.rotate))
        zoom = np.exp(rng.uniform(*np.log(self.zoom)))
        stretch = np.exp(rng.uniform(-self.stretch, self.stretch) / 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        # Pillow's matrix maps the result's pixels to the source's
        matrix = turn @ np.diag([image.width / (zoom * stretch), image.height * stretch / zoom]) / self.size
        centre = np.array([image.width, image.height]) * (0.5 + rng.uniform(-self.shift, self.shift, 2))
        offset = centre - matrix @ [self.size / 2, self.size / 2]
        coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
        view = image.transform(
            (self.size, self.size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC, fillcolor=_WHITE
        )
        pixels = np.asarray(view)
        if not self.colour and not self.grey:
            return pixels
        mix = np.eye(3, dtype=np.float32) + rng.normal(0, self.colour, (3, 3)).astype(np.float32)
        if rng.random() < self.grey:
            mix = np.outer(mix @ np.ones(3, np.float32), _LUMA)
        # colours change around white, so that the paper stays white
        moved = (pixels.astype(np.float32) - 255) @ mix.T * np.float32(np.exp(rng.normal(0, self.colour))) + 255
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
