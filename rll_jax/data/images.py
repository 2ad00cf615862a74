"""Encoded images, decoded to RGB: upright, and with no more pixels than are needed."""

from collections.abc import Iterator
import contextlib
import io
from typing import Literal, get_args

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
import simplejpeg

_WHITE = (255, 255, 255)
_EXIF_ORIENTATION = 0x0112
_SIDES_SWAPPED = (5, 6, 7, 8)  # orientations whose stored rows are columns

Interpolation = Literal["bilinear", "bicubic"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
RESAMPLING: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

Box = tuple[float, float, float, float]  # left, top, right, bottom


class BadImageError(ValueError):
    """An image that cannot be read or decoded; the message names the image."""


_PROGRAMS = ("EPS", "WMF")  # Pillow would start Ghostscript, or Windows' player


class EncodedImage:
    """An encoded image (PNG, JPEG, WebP, ...) that is decoded when its pixels are asked for.

    Only its header is read at first. Pixels are upright by the EXIF tag, RGB, transparency on
    white, 16 bits as 8. A view takes it in place of a Pillow image.

    Args:
      data: the encoded image.
      name: what errors call the image.
      crop: take this box of the upright picture for the image, in whole pixels; what lies outside
        of the picture is cut off. None: all of it.

    Attributes:
      encoded: the encoded image.
      size: (width, height), upright.
      kind: its format and Pillow's mode of its pixels: "JPEG RGB".

    Raises:
      BadImageError: the image is empty, truncated, broken, too large to be safe, or not an image;
        or the box lies outside of it. The methods raise it too, as most damage shows only in
        decoding.
    """

    def __init__(self, data: bytes, name: str, crop: Box | None = None) -> None:
        self.encoded, self._name = data, name
        with self._errors_named():
            image = self._open()
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise ValueError(
                    f"{image.width} x {image.height} pixels are more than is safe to decode"
                )
            if image.format in _PROGRAMS:
                raise ValueError(f"{image.format} is a program, which is not run")
            self.kind = f"{image.format} {image.mode}"
            self._is_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L")
            self._stored_size = image.size
            # Pillow turns a TIFF by itself.
            is_turned = image.format != "TIFF"
            self._orientation = image.getexif().get(_EXIF_ORIENTATION, 1) if is_turned else 1
            width, height = image.size
            is_swapped = self._orientation in _SIDES_SWAPPED
            self.size = (height, width) if is_swapped else (width, height)
            self._crop = None if crop is None else self._inside(crop)
            if self._crop is not None:
                self.size = self._crop[2] - self._crop[0], self._crop[3] - self._crop[1]

    @property
    def width(self) -> int:
        """The upright width, pixels."""
        return self.size[0]

    @property
    def height(self) -> int:
        """The upright height, pixels."""
        return self.size[1]

    def _inside(self, crop: Box) -> tuple[int, int, int, int]:
        """Returns a box without what is outside of the picture."""
        left, top, right, bottom = map(round, crop)
        inside = max(left, 0), max(top, 0), min(right, self.width), min(bottom, self.height)
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            raise ValueError(
                f"its bounding box {left, top, right, bottom} has none of its {self.width} x "
                f"{self.height} pixels"
            )
        return inside

    def rgb(self) -> Image.Image:
        """Returns the full image."""
        picture = self._picture()
        return picture if self._crop is None else picture.crop(self._crop)

    def _picture(self) -> Image.Image:
        """Returns the picture of which the image may be a box."""
        with self._errors_named():
            pixels = self._decode_jpeg(1)
            if pixels is not None:
                return Image.fromarray(pixels)
            image = self._open()
            image.load()
            if image.mode in ("F", "I"):  # their range of values is not agreed on
                raise ValueError(f"its pixels are of mode {image.mode}, expected 8 or 16 bits")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE + (255,)), image)
            return image.convert("RGB")

    def resize(
        self,
        size: tuple[int, int],
        resample: int | None,
        box: Box | None = None,
        reducing_gap: float | None = None,
    ) -> Image.Image:
        """Resizes as Pillow's `Image.resize`, to within a few grey levels; see `resized`."""
        with self._errors_named():
            pixels = self._resized(size, resample, box, reducing_gap, nearest=False)
            return Image.fromarray(pixels)

    def resized(
        self,
        size: tuple[int, int],
        box: Box | None = None,
        *,
        nearest: bool = False,
        interpolation: Interpolation = "bilinear",
    ) -> np.ndarray:
        """Returns a box of the image, resized.

        With bilinear interpolation a JPEG is decoded at the smallest scale (1, 1/2, 1/4 or 1/8,
        from its coefficients) at which the box still has seven eighths of `size`. Where the box is
        then at most twice `size`, each pixel is interpolated from its four neighbours. All else is
        done by Pillow. With bicubic interpolation Pillow resizes the full image, antialiased.

        Args:
          size: (width, height) of the result.
          box: (left, top, right, bottom) in pixels of the image; None: the full image.
          nearest: move the edges of the box to the nearest pixels, of the scale that a JPEG is
            decoded at, and interpolate images of all formats as a JPEG. This is faster. It is of
            bilinear interpolation alone.
          interpolation: "bilinear" or "bicubic".

        Returns:
          (height, width, 3) uint8.
        """
        with self._errors_named():
            resample = RESAMPLING[interpolation]
            if resample == Image.Resampling.BICUBIC:
                return np.asarray(self.rgb().resize(size, resample, box=box))
            return self._resized(size, resample, box, 2.0, nearest=nearest)

    def _resized(
        self,
        size: tuple[int, int],
        resample: int | None,
        box: Box | None,
        reducing_gap: float | None,
        *,
        nearest: bool,
    ) -> np.ndarray:
        edges = np.array(box or (0, 0, *self.size), float)
        across, down = (edges[2:] - edges[:2]) / size
        shrink = next((s for s in (8, 4, 2) if s * 7 / 8 <= min(across, down)), 1)
        pixels = self._decode_jpeg(shrink) if self._crop is None else None
        if pixels is None and not nearest:
            return np.asarray(self.rgb().resize(size, resample, box=box, reducing_gap=reducing_gap))
        if pixels is None:
            pixels, shrink = np.asarray(self.rgb()), 1
        edges /= shrink
        if max(across, down) > 2 * shrink:
            height, width = pixels.shape[:2]
            left, top, right, bottom = edges.tolist()
            box = (left, top, min(right, width), min(bottom, height))
            image = Image.fromarray(pixels)
            return np.asarray(image.resize(size, resample, box=box, reducing_gap=reducing_gap))
        return _interpolated(pixels, edges, size, nearest=nearest)

    def _decode_jpeg(self, shrink: int) -> np.ndarray | None:
        """Returns the upright pixels of a grey or colour JPEG at the scale 1/shrink.

        None where the image is something else, or where only Pillow may be able to read it.
        """
        if not self._is_jpeg:
            return None
        width, height = self._stored_size
        try:
            pixels = simplejpeg.decode_jpeg(
                self.encoded,
                "RGB",
                min_width=-(-width // shrink),
                min_height=-(-height // shrink),
                min_factor=shrink,
            )
        except ValueError:  # it also refuses damage that Pillow mends
            return None
        return pixels if self._orientation == 1 else _upright(pixels, self._orientation)

    def _open(self) -> Image.Image:
        return Image.open(io.BytesIO(self.encoded))

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Turns every error of the block into a BadImageError that names the image."""
        try:
            yield
        except BadImageError:
            raise
        except Exception as error:  # Pillow raises anything on damage, also TypeError, struct.error
            is_unknown = isinstance(error, UnidentifiedImageError)
            reason = "it is of no kind that Pillow knows" if is_unknown else error
            raise BadImageError(
                f"cannot decode the image {self._name!r} ({len(self.encoded)} bytes): {reason}"
            ) from error


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns stored pixels upright; an EXIF orientation that is unknown changes nothing."""
    if orientation in _SIDES_SWAPPED:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _interpolated(
    pixels: np.ndarray, edges: np.ndarray, size: tuple[int, int], *, nearest: bool
) -> np.ndarray:
    """Returns a box of the pixels at `size`, each pixel interpolated from its four neighbours.

    Args:
      pixels: (H, W, 3) uint8.
      edges: (4,) left, top, right, bottom of the box.
      size: (width, height) of the result.
      nearest: move the edges to the nearest pixels.
    """
    rounded = edges.round().astype(int)
    left, top, right, bottom = rounded
    is_empty = right <= left or bottom <= top
    if not is_empty and (nearest or (edges == rounded).all()):
        return cv2.resize(pixels[top:bottom, left:right], size, interpolation=cv2.INTER_LINEAR)
    # The centre of the first pixel is at one half.
    scale = (edges[2:] - edges[:2]) / size
    to_source = np.column_stack([np.diag(scale), edges[:2] + scale / 2 - 0.5])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, to_source, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def decode(data: bytes, name: str) -> Image.Image:
    """Returns the full image in `data`; args and errors are those of `EncodedImage`."""
    return EncodedImage(data, name).rgb()


def shrink(
    data: bytes,
    name: str,
    short_side: int,
    interpolation: Interpolation = "bilinear",
    crop: Box | None = None,
) -> Image.Image:
    """Returns the full image in `data`, shrunk where its shorter side is longer than `short_side`.

    Args:
      data: the encoded image.
      name: what errors call the image.
      short_side: pixels.
      interpolation: "bilinear" or "bicubic"; both are antialiased.
      crop: as `EncodedImage`.

    Raises:
      BadImageError: as `EncodedImage`.
    """
    image = EncodedImage(data, name, crop)
    scale = short_side / min(image.size)
    if scale >= 1:
        return image.rgb()
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return Image.fromarray(image.resized(size, interpolation=interpolation))


def blank(size: int = 8) -> Image.Image:
    """Returns a white square, which stands in for a bad image in `pipeline.test_batches`."""
    return Image.new("RGB", (size, size), _WHITE)
