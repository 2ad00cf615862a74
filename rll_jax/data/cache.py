"""Pictures kept decoded and shrunk, in memory or in an ArrayRecord file: what is read twice is decoded once."""

import dataclasses
import hashlib
import io
import pathlib
import shutil
import uuid

import numpy as np
import tqdm

from rll_jax.data import images
from rll_jax.data.image_dataset import EncodedImageDataset

_SAMPLE = 100  # pictures whose sizes tell the size of all


def estimated_bytes(data: EncodedImageDataset, short_side: int) -> int:
    """What the shrunk pictures of a set would take, from the sizes of some of them."""
    rows = np.unique(np.linspace(0, len(data) - 1, min(_SAMPLE, len(data))).astype(int))
    taken = []
    for row in rows:
        try:
            width, height = data.image(row).size
        except images.BadImageError:
            continue
        scale = min(1.0, short_side / min(width, height))
        taken.append(3 * round(width * scale) * round(height * scale))
    return int(np.mean(taken or [0]) * len(data))


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group where that has a limit."""
    limits = []
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        limits.append(
            next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        )
        group = pathlib.Path("/sys/fs/cgroup")
        given_back = sum(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
        limits.append(
            int((group / "memory.max").read_text())
            - int((group / "memory.current").read_text())
            + given_back
        )
    except (OSError, ValueError, StopIteration):  # no Linux, or no limit
        pass
    return max(min(limits, default=2**62), 0)


def in_memory(data: EncodedImageDataset, short_side: int) -> EncodedImageDataset:
    """The set with its pictures shrunk to a short side and kept from their first use on."""
    return dataclasses.replace(data, read=_Memory(data, short_side))


def on_disk(
    data: EncodedImageDataset, short_side: int, directory, name: str
) -> EncodedImageDataset:
    """The set with its pictures shrunk to a short side, from a file in `directory` that is written on first use.

    Another set, or one whose files have changed, has another file.

    Raises:
      ValueError: they would take more than is free there (how much).
      OSError: it cannot be written.
    """
    from array_record.python import array_record_data_source

    path = (
        pathlib.Path(directory) / f"cache_{name}_{short_side}_{digest(data)}.arrayrecord"
    )  # another for other pictures, or another size
    if not path.exists():
        try:
            _write(data, short_side, path)
        except RuntimeError as error:  # array_record's
            raise OSError(f"cannot write the cache {path}: {str(error).splitlines()[0]}") from error
    records = array_record_data_source.ArrayRecordDataSource(str(path))
    return dataclasses.replace(data, read=_Records(records), positions=np.arange(len(data)))


def digest(data: EncodedImageDataset) -> str:
    """Of which files, as far as they are known, in which order."""
    files = hashlib.sha256("\n".join(data.paths.tolist()).encode(errors="surrogateescape"))
    for column in (data.sizes, data.changed):
        files.update(b"" if column is None else np.ascontiguousarray(column))
    return files.hexdigest()[:16]


def _write(data, short_side, path) -> None:
    from array_record.python import array_record_module

    need, free = estimated_bytes(data, short_side), shutil.disk_usage(path.parent).free
    if need > free:
        raise ValueError(
            f"--cache=disk would take {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free in {path.parent}"
        )
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        writer = array_record_module.ArrayRecordWriter(str(aside), "group_size:1")
        for row in tqdm.tqdm(
            range(len(data)), desc=f"writing {path.name}", unit="image", mininterval=1
        ):
            writer.write(_shrunk(data.image_bytes(row), str(data.paths[row]), short_side))
        writer.close()
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _shrunk(encoded: bytes, name: str, short_side: int) -> bytes:
    """As uncompressed PPM, which is read at the speed of memory; what does not decode stays as it is, to be told of when used."""
    try:
        picture = images.shrink(encoded, name, short_side)
    except images.BadImageError:
        return encoded
    out = io.BytesIO()
    picture.save(out, "PPM")
    return out.getvalue()


class _Memory:
    def __init__(self, data, short_side):
        self._data, self._short_side, self._kept = data, short_side, {}
        self._name_of = dict(zip(data.positions.tolist(), data.paths.tolist()))

    def __call__(self, position):
        if position not in self._kept:
            self._kept[position] = _shrunk(
                self._data.read(position), self._name_of[position], self._short_side
            )
        return self._kept[position]


class _Records:
    def __init__(self, records):
        self._records = records

    def __call__(self, position):
        return self._records[position]
