"""What reading each image of a dataset once tells: kinds, sizes, digests, hashes, and faults."""

from concurrent import futures
import functools
import hashlib
from typing import NamedTuple

import numpy as np
import tqdm

from rll_jax.data import copies, images
from rll_jax.data.image_dataset import EncodedImageDataset

_SHORT_SIDE = 128  # pixels of the shrunk image that is hashed
_DIGEST = 16  # bytes


class Facts(NamedTuple):
    """What is known of N images that can be read.

    Attributes:
      sizes: (N, 2) width and height, pixels.
      kinds: (N,) str, see `images.EncodedImage`.
      contents: (N,) integers, equal where two images are the same bytes, and box.
      hashes: (N, 256) int8, 1 or -1, see `copies.perceptual_hash`. An image of one colour has
        numbers drawn by its bytes: it is near images of the same bytes alone.
      colours: (N, 48) uint8, see `copies.mean_colours`.
      is_flat: (N,) bool, whether an image is of one colour.
    """

    sizes: np.ndarray
    kinds: np.ndarray
    contents: np.ndarray
    hashes: np.ndarray
    colours: np.ndarray
    is_flat: np.ndarray


class _Read(NamedTuple):
    """An image that was read; see `Facts`."""

    size: tuple[int, int]
    kind: str
    digest: bytes
    hash: np.ndarray | None
    colours: np.ndarray


def read(data: EncodedImageDataset, threads: int) -> tuple[np.ndarray, Facts, list[str]]:
    """Reads and decodes each image of a dataset.

    Args:
      data: the dataset.
      threads: the number of threads that read.

    Returns:
      The (N,) rows of the images that can be read, what is known of these, and a line for each
      image that cannot be read.

    Raises:
      ValueError: no image can be read.
    """
    with futures.ThreadPoolExecutor(threads) as pool:
        found = list(
            tqdm.tqdm(
                pool.map(functools.partial(_read, data), range(len(data))),
                total=len(data),
                desc="reading the images",
                unit="image",
                delay=2,
                leave=False,
                mininterval=1,
            )
        )
    faults = [one for one in found if isinstance(one, str)]
    rows = np.array([row for row, one in enumerate(found) if not isinstance(one, str)], np.int64)
    if not len(rows):
        example = f", such as {faults[0]}" if faults else ""
        raise ValueError(f"none of the {len(data)} images can be read{example}")
    good = [one for one in found if not isinstance(one, str)]
    return rows, _facts(good), faults


def _read(data: EncodedImageDataset, row: int) -> _Read | str:
    """Returns what is known of an image, or why it cannot be read."""
    if not data.sizes[row]:
        return f"{data.paths[row]}: missing or empty"
    try:
        image, box = data.image(row), data.box(row)
        shrunk = images.shrink(image.encoded, str(data.paths[row]), _SHORT_SIDE, crop=box)
    except images.BadImageError as error:
        return " ".join(str(error).split())
    whole = image.encoded if box is None else image.encoded + repr(box).encode()
    digest = hashlib.blake2b(whole, digest_size=_DIGEST).digest()
    looks = copies.perceptual_hash(shrunk), copies.mean_colours(shrunk)
    return _Read(image.size, image.kind, digest, *looks)


def _facts(found: list[_Read]) -> Facts:
    digests = np.frombuffer(b"".join(one.digest for one in found), f"V{_DIGEST}")
    _, contents = np.unique(digests.view(np.uint64).reshape(-1, 2), axis=0, return_inverse=True)
    return Facts(
        sizes=np.array([one.size for one in found], np.int64),
        kinds=np.array([one.kind for one in found]),
        contents=contents.reshape(-1),
        hashes=np.stack([_drawn(one.digest) if one.hash is None else one.hash for one in found]),
        colours=np.stack([one.colours for one in found]),
        is_flat=np.array([one.hash is None for one in found]),
    )


def _drawn(digest: bytes) -> np.ndarray:
    rng = np.random.default_rng(int.from_bytes(digest))
    return (2 * rng.integers(0, 2, copies.HASH_BITS) - 1).astype(np.int8)
