"""The embeddings of a folder of images, kept beside the run that made them and brought up to date on every use.

Parts of some thousand images are written as they are ready, so that an interrupted embedding goes on where it stopped; files that
changed (size or time) are embedded again, and those that are gone are left out.
"""
import hashlib
import os
import pathlib
from typing import Callable, NamedTuple

import numpy as np
import tqdm

from rll_jax import images, models

_PART = 2048  # images
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Index(NamedTuple):
    """Of a folder: its readable images, sorted by name, and the names of the others.

    Attributes:
      files: (N,) names relative to the folder, with "/".
      embeddings: (N, D) float32 of unit length.
      unreadable: names.
      embedded: how many were embedded now; the others were known.
    """

    files: np.ndarray
    embeddings: np.ndarray
    unreadable: list[str]
    embedded: int


class ImageFiles:
    """Image files as a set; one that cannot be decoded becomes a white picture and is remembered in `unreadable`."""

    def __init__(self, paths):
        self._paths = list(paths)
        self.unreadable = set()

    def __len__(self):
        return len(self._paths)

    def image(self, row):
        path = self._paths[row]
        try:
            return images.decode(path.read_bytes(), str(path))
        except (images.BadImageError, OSError):
            self.unreadable.add(row)
            return images.blank()


def update(workdir: str, trained, folder: str) -> Index:
    """The index of the folder's images by this network, kept in `workdir`/index.

    Raises:
      ValueError: no such folder, or no images in it.
    """
    root = pathlib.Path(folder)
    stamps = _scan(root)
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    directory = pathlib.Path(workdir) / "index" / f"{name}-{trained.identity}"
    directory.mkdir(parents=True, exist_ok=True)
    known = {}  # name -> (stamp, embedding, or None where unreadable)
    numbers = [0]
    for path in sorted(directory.glob("part-*.npz")):
        numbers.append(int(path.stem.removeprefix("part-")))
        with np.load(path, allow_pickle=False) as part:
            for file, stamp, readable, embedding in zip(*(part[key] for key in ("files", "stamps", "readable", "embeddings"))):
                known[str(file)] = tuple(stamp.tolist()), embedding if readable else None
    todo = [file for file, stamp in stamps.items() if known.get(file, (None,))[0] != stamp]
    with tqdm.tqdm(total=len(todo), unit="image", desc="embedding", disable=not todo) as progress:
        for first in range(0, len(todo), _PART):
            files = todo[first : first + _PART]
            embeddings, readable = embed_files([root / file for file in files], trained.embed)
            part = dict(files=files, stamps=[stamps[file] for file in files], readable=readable, embeddings=embeddings)
            _write(directory / f"part-{max(numbers) + 1 + first // _PART:06d}.npz", part)
            known.update((f, (stamps[f], e if ok else None)) for f, e, ok in zip(files, embeddings, readable))
            progress.update(len(files))
    files = [file for file in stamps if known[file][1] is not None]
    embeddings = np.array([known[file][1] for file in files], np.float32)
    return Index(np.array(files), embeddings, [file for file in stamps if known[file][1] is None], len(todo))


def embed_files(paths, embed: Callable) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) embeddings, all levels concatenated, and (N,) which of the files were readable."""
    data = ImageFiles(paths)
    embeddings = np.asarray(models.concatenated(embed(data)))
    return embeddings, np.array([row not in data.unreadable for row in range(len(data))])


def names(folder: pathlib.Path) -> list[str]:
    """The images under a folder; raises as `update`."""
    return list(_scan(folder))


def _scan(root: pathlib.Path) -> dict:
    """{name: (bytes, time of the last change in ns)} of the images under the folder, by name."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found = []
    for directory, _, names in os.walk(root, followlinks=True):
        for path in (pathlib.Path(directory, name) for name in names if name.lower().endswith(_SUFFIXES)):
            try:
                stat = path.stat()
            except OSError:
                stat = os.stat_result((0,) * 10)  # a broken link: unreadable, and listed so
            found.append((path.relative_to(root).as_posix(), (stat.st_size, stat.st_mtime_ns)))
    if not found:
        raise ValueError(f"{root}: no images in it (looked for {', '.join(_SUFFIXES)}, in its folders too)")
    return dict(sorted(found))


def _write(path: pathlib.Path, arrays: dict) -> None:
    """Whole or not at all."""
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file:
        np.savez(file, **arrays)
    aside.replace(path)
