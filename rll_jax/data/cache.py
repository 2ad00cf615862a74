"""Decoded and shrunk images, cached in memory or in an ArrayRecord file: decoded once, read often.

An image that does not decode is cached as it is, so that its error is raised where it is used.
"""

import contextlib
import dataclasses
import hashlib
import io
import pathlib
import shutil

import numpy as np
import tqdm

from rll_jax.data import files, images, paths
from rll_jax.data.image_dataset import EncodedImageDataset

_SAMPLE = 100  # the number of images whose sizes estimate the size of all
_CGROUP = pathlib.Path("/sys/fs/cgroup")


def estimated_bytes(data: EncodedImageDataset, short_side: int) -> int:
    """Estimates the bytes of a dataset's shrunk images, from the sizes of some of them.

    Args:
      data: the dataset. Bad images in the sample do not count.
      short_side: the shorter side that larger images are shrunk to, pixels.
    """
    rows = np.unique(np.linspace(0, len(data) - 1, min(_SAMPLE, len(data))).astype(int))
    sizes = []
    for row in rows:
        try:
            width, height = data.image(row).size
        except images.BadImageError:
            continue
        scale = min(1.0, short_side / min(width, height))
        sizes.append(3 * round(width * scale) * round(height * scale))
    return int(np.mean(sizes or [0]) * len(data))


def free_memory() -> int:
    """Returns the bytes that this process may still take; 2**62 where that is not known.

    It is the least of what the machine and the process's control group have left.
    """
    try:
        left = [_free_in_machine()]
    except (OSError, ValueError, StopIteration):  # not Linux
        return 2**62
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit
        left.append(_free_in_control_group())
    return max(min(left), 0)


def in_memory(
    data: EncodedImageDataset, short_side: int, interpolation: images.Interpolation = "bilinear"
) -> EncodedImageDataset:
    """Returns the dataset with images that are shrunk and cached in memory at their first use.

    Args:
      data: the dataset.
      short_side: the shorter side that larger images are shrunk to, pixels.
      interpolation: how images are shrunk, see `images.shrink`.
    """
    reader = _MemoryReader(data, short_side, interpolation)
    return dataclasses.replace(data, read=reader, boxes=None)


def on_disk(
    data: EncodedImageDataset,
    short_side: int,
    directory: paths.AnyPath,
    name: str,
    interpolation: images.Interpolation = "bilinear",
) -> EncodedImageDataset:
    """Returns the dataset with shrunk images that are read from an ArrayRecord file.

    The file is written at first use. Its name has the digest of the dataset, so another dataset, or
    one whose files have changed, has another file.

    Args:
      data: the dataset.
      short_side: the shorter side that larger images are shrunk to, pixels.
      directory: the folder of the file, a local one.
      name: a part of the file's name, such as the split.
      interpolation: how images are shrunk, see `images.shrink`.

    Raises:
      ValueError: the images would take more than is free in the folder (how much), or its name is
        not UTF-8.
      OSError: the file cannot be written.
    """
    from array_record.python import array_record_data_source

    paths.check_utf8(directory)
    how = "" if interpolation == "bilinear" else f"_{interpolation}"
    path = pathlib.Path(directory, f"cache_{name}_{short_side}{how}_{digest(data)}.arrayrecord")
    if not path.exists():
        try:
            _write(data, short_side, path, interpolation)
        except RuntimeError as error:  # raised by array_record
            raise OSError(f"cannot write the cache {path}: {files.first_line(error)}") from error
    records = array_record_data_source.ArrayRecordDataSource(str(path))
    return dataclasses.replace(
        data, read=records.__getitem__, positions=np.arange(len(data)), boxes=None
    )


def digest(data: EncodedImageDataset) -> str:
    """Returns 16 hex digits that tell datasets apart by their files and the order of these.

    A file is told by its path, and its size and time as far as they are known.
    """
    sha = hashlib.sha256("\n".join(data.paths.tolist()).encode(errors="surrogateescape"))
    for column in (data.sizes, data.changed):
        if column is not None:
            sha.update(np.ascontiguousarray(column).tobytes())
    return sha.hexdigest()[:16]


def _free_in_machine() -> int:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024


def _free_in_control_group() -> int:
    lines = (_CGROUP / "memory.stat").read_text().splitlines()
    # The system takes back this part of the files that it has cached.
    reclaimable = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    limit = int((_CGROUP / "memory.max").read_text())
    return limit - int((_CGROUP / "memory.current").read_text()) + reclaimable


def _write(
    data: EncodedImageDataset,
    short_side: int,
    path: pathlib.Path,
    interpolation: images.Interpolation,
) -> None:
    from array_record.python import (
        array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  # compiled
    )

    need, free = estimated_bytes(data, short_side), shutil.disk_usage(path.parent).free
    if need > free:
        raise ValueError(
            f"--cache=disk would take {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free in "
            f"{path.parent}"
        )
    with files.atomic_write(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        rows = tqdm.tqdm(range(len(data)), desc=f"writing {path.name}", unit="image", mininterval=1)
        for row in rows:
            name = str(data.paths[row])
            encoded = data.image_bytes(row) if data.sizes[row] else b""  # missing files too
            writer.write(_shrunk(encoded, name, data.box(row), short_side, interpolation))
        writer.close()


def _shrunk(
    encoded: bytes,
    name: str,
    box: images.Box | None,
    short_side: int,
    interpolation: images.Interpolation,
) -> bytes:
    """Returns the shrunk image as uncompressed PPM, which is read as fast as memory.

    An image that does not decode is returned as it is; of a box, as an empty one.
    """
    try:
        image = images.shrink(encoded, name, short_side, interpolation, box)
    except images.BadImageError:
        return encoded if box is None else b""  # the box is not kept beside it
    out = io.BytesIO()
    image.save(out, "PPM")
    return out.getvalue()


class _MemoryReader:
    """Reads the shrunk image at a position, from memory after its first use."""

    def __init__(
        self, data: EncodedImageDataset, short_side: int, interpolation: images.Interpolation
    ) -> None:
        self._read, self._short_side = data.read, short_side
        self._interpolation: images.Interpolation = interpolation
        self._row_at = {position: row for row, position in enumerate(data.positions.tolist())}
        self._name_of, self._box_of = data.paths.tolist(), data.box
        self._cached: dict[int, bytes] = {}

    def __call__(self, position: int) -> bytes:
        if position not in self._cached:
            encoded, row = self._read(position), self._row_at[position]
            self._cached[position] = _shrunk(
                encoded,
                self._name_of[row],
                self._box_of(row),
                self._short_side,
                self._interpolation,
            )
        return self._cached[position]
