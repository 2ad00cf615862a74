"""Pictures for a browser: decoded as everywhere, and encoded anew, whatever the file was."""

import base64
import functools
import io
import pathlib
from typing import NamedTuple

from PIL import Image

from rll_jax.data import images

_THUMBNAIL, _PICTURE = 256, 2048  # pixels of the longer side
_KEPT = 4096  # thumbnails in memory, of about 10 kB
_LOSSLESS = 128  # pixels of the longer side up to which an image is sent as PNG


class Encoded(NamedTuple):
    """An image as PNG or JPEG.

    Attributes:
      data: the encoded image.
      media_type: image/png or image/jpeg.
    """

    data: bytes
    media_type: str

    def as_url(self) -> str:
        """Returns the image as a data: URL."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode()}"


def thumbnail_of(image: images.EncodedImage) -> Encoded:
    """Returns an image of at most 256 pixels a side; raises BadImageError."""
    return _encode(_shrunk(image, _THUMBNAIL))


@functools.lru_cache(_KEPT)
def thumbnail(path: pathlib.Path, stamp: str) -> Encoded:
    """Returns the image in a file, of at most 256 pixels a side; the last 4096 stay in memory.

    Args:
      path: the file.
      stamp: changes when the file changes.

    Raises:
      BadImageError: it cannot be decoded.
      OSError: the file cannot be read.
    """
    del stamp  # it is of the cache's key
    return thumbnail_of(_open(path))


def picture(path: pathlib.Path) -> Encoded:
    """Returns the image in a file, of at most 2048 pixels a side; raises as `thumbnail`."""
    return _encode(_shrunk(_open(path), _PICTURE))


def _open(path: pathlib.Path) -> images.EncodedImage:
    return images.EncodedImage(path.read_bytes(), path.name)


def _shrunk(image: images.EncodedImage, side: int) -> Image.Image:
    scale = side / max(image.size)
    if scale >= 1:
        return image.rgb()
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _encode(image: Image.Image) -> Encoded:
    buffer = io.BytesIO()
    if max(image.size) <= _LOSSLESS:
        image.save(buffer, "PNG")
        return Encoded(buffer.getvalue(), "image/png")
    image.save(buffer, "JPEG", quality=88)
    return Encoded(buffer.getvalue(), "image/jpeg")
