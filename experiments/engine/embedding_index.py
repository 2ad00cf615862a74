"""The embeddings of a folder of images, kept beside the run that made them and brought up to date on every use.

Parts of some hundred images are written as they are ready, so that an interrupted embedding goes on where it stopped; files that
changed (size or time) are embedded again, and those that are gone are left out. Nothing is remembered of unreadable files.
"""

import hashlib
import os
import pathlib
import stat
import tempfile
from typing import Callable, NamedTuple
import uuid
import zipfile

import numpy as np
import tqdm

from experiments.engine import build
from rll_jax.data import folders, images
from rll_jax.networks import embedding_net

_PART = 512  # images


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


class _ImageFiles:
    """Image files as a set."""

    def __init__(self, paths):
        self._paths = list(paths)

    def __len__(self):
        return len(self._paths)

    def image(self, row):
        path = self._paths[row]
        try:
            return images.EncodedImage(path.read_bytes(), str(path))
        except OSError as error:
            raise images.BadImageError(f"cannot read the image {str(path)!r}: {error}") from error


def update(workdir: str, trained, folder: str) -> Index:
    """The index of the folder's images by this network, kept in `workdir`/index.

    Raises:
      ValueError: no such folder, no images in it, or none that can be read.
    """
    root = pathlib.Path(folder)
    stamps = _scan(root)
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    directory = pathlib.Path(workdir) / "index" / f"{name}-{build.identity(trained.variables)}"
    directory.mkdir(parents=True, exist_ok=True)
    known = {}
    for path in directory.glob("*.npz"):
        known.update(_known(path, stamps))
    before = len(known)
    todo = [file for file in stamps if file not in known]
    with tqdm.tqdm(total=len(todo), unit="image", desc="embedding", disable=not todo) as progress:
        for first in range(0, len(todo), _PART):
            files = todo[first : first + _PART]
            embeddings, readable = embed_files([root / file for file in files], trained.embed)
            part = {
                file: embedding for file, embedding, ok in zip(files, embeddings, readable) if ok
            }
            if part:
                arrays = dict(
                    files=list(part),
                    stamps=[stamps[file] for file in part],
                    embeddings=list(part.values()),
                )
                _write(directory, arrays)
            known |= part
            progress.update(len(files))
    unreadable = [file for file in stamps if file not in known]
    if not known:
        raise ValueError(
            f"{root}: none of its {len(unreadable)} images can be read, such as {unreadable[:3]}"
        )
    files = [file for file in stamps if file in known]
    return Index(
        np.array(files),
        np.array([known[file] for file in files], np.float32),
        unreadable,
        len(known) - before,
    )


def _known(path: pathlib.Path, stamps: dict) -> dict:
    """{name: embedding} of a part's files that are there unchanged; a part that was damaged is done away with."""
    try:
        with np.load(path, allow_pickle=False) as part:
            columns = [part[name] for name in ("files", "stamps", "embeddings")]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        path.unlink(missing_ok=True)
        return {}
    rows = zip(columns[0].tolist(), columns[1].tolist(), columns[2])
    return {file: embedding for file, stamp, embedding in rows if stamps.get(file) == tuple(stamp)}


def embed_files(paths: list, embed: Callable) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) embeddings, all levels concatenated, and (N,) which of the files were readable."""
    readable = np.ones(len(paths), bool)

    def on_bad(row):
        readable[row] = False

    return np.asarray(
        embedding_net.concatenate_levels(embed(_ImageFiles(paths), on_bad=on_bad))
    ), readable


def names(folder: pathlib.Path) -> list[str]:
    """The images under a folder; raises as `update`."""
    return list(_scan(folder))


def _scan(root: pathlib.Path) -> dict:
    """{name: (bytes, time of the last change in ns)} of the images under the folder, by name."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found, seen = {}, set()
    for directory, inner, files in os.walk(root, followlinks=True, onerror=_raise):
        if os.path.realpath(directory) in seen:  # a link to where we have been
            inner.clear()
            continue
        seen.add(os.path.realpath(directory))
        for path in (
            pathlib.Path(directory, name)
            for name in files
            if name.lower().endswith(folders.SUFFIXES)
        ):
            try:
                information = path.stat()
            except OSError:
                information = None  # a broken link: unreadable, and listed so
            if information is None or stat.S_ISREG(information.st_mode):
                stamp = (information.st_size, information.st_mtime_ns) if information else (0, 0)
                found[path.relative_to(root).as_posix()] = stamp
    if not found:
        raise ValueError(
            f"{root}: no images in it (looked for {', '.join(folders.SUFFIXES)}, in its folders too)"
        )
    return dict(sorted(found.items()))


def _raise(error):
    raise error


def _write(directory: pathlib.Path, arrays: dict) -> None:
    """A part of a name of its own, whole or not at all, whatever other process writes there."""
    with tempfile.NamedTemporaryFile(dir=directory, suffix=".tmp", delete=False) as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    pathlib.Path(file.name).replace(directory / f"{uuid.uuid4().hex}.npz")
