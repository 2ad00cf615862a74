"""Encoded pictures, decoded: RGB, upright, no more pixels than are needed."""

import collections
import contextlib
import io

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
import simplejpeg

_WHITE = (255, 255, 255)
_ORIENTATION = 0x0112  # of EXIF
_UPRIGHT = collections.defaultdict(
    lambda: lambda x: x,
    {
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: x.swapaxes(0, 1)[:, ::-1],
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: x.swapaxes(0, 1)[::-1],
    },
)


class BadImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


class EncodedImage:
    """An encoded picture (PNG, JPEG, WebP, ...): its size from the header, its pixels when asked for, no more of them than needed.

    Upright by its EXIF tag, in RGB, transparency on white, 16 bits as 8. Takes the place of a Pillow image in the views.

    Attributes:
      size: (width, height), upright.

    Raises, here and below:
      BadImageError: empty, truncated, broken or not an image; `name` is in the message.
    """

    def __init__(self, data: bytes, name: str):
        self._data, self._name = data, name
        with self._named():
            image = self._open()
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels are more than is safe to decode"
                )
            self._is_jpeg, self._stored = (
                image.format == "JPEG" and image.mode in ("RGB", "L"),
                image.size,
            )
            # Pillow turns a TIFF by itself
            self._orientation = (
                1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
            )
            self.size = image.size[::-1] if self._orientation in (5, 6, 7, 8) else image.size

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    def rgb(self) -> Image.Image:
        """The whole picture."""
        with self._named():
            if (pixels := self._jpeg(1)) is not None:
                return Image.fromarray(pixels)
            image = self._open()
            image.load()
            if image.mode in ("F", "I"):  # of no range that all agree on
                raise ValueError(f"its pixels are of mode {image.mode}, expected 8 or 16 bits")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE + (255,)), image)
            return image.convert("RGB")

    def resize(self, size: tuple[int, int], resample, box=None, reducing_gap=None) -> Image.Image:
        """As Pillow's `Image.resize`, to a few grey levels; see `resized`."""
        with self._named():
            return Image.fromarray(self._resized(size, resample, box, reducing_gap, False))

    def resized(self, size: tuple[int, int], box=None, *, nearest: bool = False) -> np.ndarray:
        """(height, width, 3) uint8: the box (left, top, right, bottom), by default all, resized to (width, height), bilinear.

        A JPEG is read at the smallest scale (1, 1/2, 1/4, 1/8) at which the box has seven eighths of `size` still, from its coefficients;
        where less than half of those go, each is then interpolated from its four neighbours. All else is as Pillow does it.

        Args:
          nearest: move the box to the nearest pixels, of the scale that a JPEG is read at, and interpolate all kinds as a JPEG: faster.
        """
        with self._named():
            return self._resized(size, Image.Resampling.BILINEAR, box, 2.0, nearest)

    def _resized(self, size, resample, box, reducing_gap, nearest):
        edges = np.array(box or (0, 0, *self.size), float)
        across, down = (edges[2:] - edges[:2]) / size
        shrink = next((s for s in (8, 4, 2) if s * 7 / 8 <= min(across, down)), 1)
        pixels = self._jpeg(shrink)
        if pixels is None and not nearest:
            return np.asarray(self.rgb().resize(size, resample, box=box, reducing_gap=reducing_gap))
        if pixels is None:
            pixels, shrink = np.asarray(self.rgb()), 1
        edges /= shrink
        if max(across, down) > 2 * shrink:
            box = (*edges[:2], *np.minimum(edges[2:], pixels.shape[1::-1]))
            return np.asarray(
                Image.fromarray(pixels).resize(size, resample, box=box, reducing_gap=reducing_gap)
            )
        left, top, right, bottom = whole = edges.round().astype(int)
        if right > left and bottom > top and (nearest or (edges == whole).all()):
            return cv2.resize(pixels[top:bottom, left:right], size, interpolation=cv2.INTER_LINEAR)
        # centres of pixels: at half ones
        scale = (edges[2:] - edges[:2]) / size
        to_source = np.column_stack([np.diag(scale), edges[:2] + scale / 2 - 0.5])
        how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(pixels, to_source, size, flags=how, borderMode=cv2.BORDER_REPLICATE)

    def _jpeg(self, shrink: int) -> np.ndarray | None:
        """The pixels of a grey or colour JPEG at 1/shrink, upright; None where it is something else, or not as it should be."""
        if not self._is_jpeg:
            return None
        low = {
            "min_width": -(-self._stored[0] // shrink),
            "min_height": -(-self._stored[1] // shrink),
            "min_factor": shrink,
        }
        try:
            pixels = simplejpeg.decode_jpeg(self._data, "RGB", **low)
        except ValueError:  # it refuses what Pillow mends, too
            return None
        return (
            pixels
            if self._orientation == 1
            else np.ascontiguousarray(_UPRIGHT[self._orientation](pixels))
        )

    def _open(self) -> Image.Image:
        return Image.open(io.BytesIO(self._data))

    @contextlib.contextmanager
    def _named(self):
        try:
            yield
        except BadImageError:
            raise
        except Exception as error:  # damaged pictures raise anything in Pillow, struct.error and TypeError among it
            reason = (
                "it is of no kind that Pillow knows"
                if isinstance(error, UnidentifiedImageError)
                else error
            )
            raise BadImageError(
                f"cannot decode the image {self._name!r} ({len(self._data)} bytes): {reason}"
            ) from error


def decode(data: bytes, name: str) -> Image.Image:
    """The whole picture in `data`; see `EncodedImage`."""
    return EncodedImage(data, name).rgb()


def shrink(data: bytes, name: str, short_side: int) -> Image.Image:
    """The whole picture, made smaller to a short side of so many pixels where it is larger; raises as `EncodedImage`."""
    picture = EncodedImage(data, name)
    scale = short_side / min(picture.size)
    if scale >= 1:
        return picture.rgb()
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def blank(size: int = 8) -> Image.Image:
    """A white picture, to stand for one that cannot be read."""
    return Image.new("RGB", (size, size), _WHITE)
