"""The embeddings of a folder of images, kept beside the run and brought up to date at every use.

Parts of some hundred images are written as they are ready, so that an interrupted embedding
resumes. Files that changed (size or time) are embedded again. Files that are gone are left out.
Images that cannot be read are tried again at every use.
"""

from collections.abc import Callable, Mapping, Sequence
import hashlib
import os
import pathlib
import sys
from typing import NamedTuple, TextIO
import uuid
import zipfile

import numpy as np
import tqdm

from experiments.engine import build, phases
from experiments.engine.trained_network import TrainedNetwork
from rll_jax.data import files, image_files, images
from rll_jax.networks import embedding_net

_PART = 512  # images
_MOST_PARTS = 64  # beyond what a folder of this size needs; then they are joined
Stamps = dict[str, tuple[int, int]]  # {name: (bytes, time of the last change in ns)}


class Index(NamedTuple):
    """The index of a folder.

    Attributes:
      files: (N,) names of the readable images, relative to the folder, with "/", sorted.
      embeddings: (N, D) float32 of unit length.
      unreadable: names of the images that cannot be read.
      num_embedded: how many images were embedded now; the others were known.
    """

    files: np.ndarray
    embeddings: np.ndarray
    unreadable: list[str]
    num_embedded: int


class _ImageFiles:
    """Image files as `rll_jax.data.pipeline.Images`."""

    def __init__(self, paths: Sequence[pathlib.Path]) -> None:
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, row: int) -> images.EncodedImage:
        path = self._paths[row]
        try:
            return images.EncodedImage(path.read_bytes(), str(path))
        except OSError as error:
            raise images.BadImageError(f"cannot read the image {str(path)!r}: {error}") from error


def update(
    workdir: str, trained: TrainedNetwork, folder: str, stream: TextIO | None = None
) -> Index:
    """Returns the index of a folder's images, which is kept in `workdir`/index.

    Args:
      workdir: the folder of the run.
      trained: the network.
      folder: the folder of images.
      stream: where to say that it takes long, see `phases.told`.

    Raises:
      ValueError: no such folder, no images in it, or none that can be read.
    """
    root = pathlib.Path(folder)
    with phases.told(f"listing the images of {root}", stream):
        stamps = stamps_of(root, image_names(root))
    directory = _index_folder(pathlib.Path(workdir), trained, root)
    known: dict[str, np.ndarray] = {}
    parts = list(directory.glob("*.npz"))
    for path in parts:
        known |= _read_part(path, stamps)
    if len(parts) > _MOST_PARTS + 2 * len(known) // _PART:
        _write_part(directory, known, stamps)
        for path in parts:
            path.unlink(missing_ok=True)
    num_known = len(known)
    todo = [name for name in stamps if name not in known]
    with tqdm.tqdm(total=len(todo), unit="image", desc="embedding", disable=not todo) as progress:
        for first in range(0, len(todo), _PART):
            names = todo[first : first + _PART]
            known |= _embed_part(directory, root, names, stamps, trained)
            progress.update(len(names))
    unreadable = [name for name in stamps if name not in known]
    if not known:
        raise ValueError(
            f"{root}: none of its {len(unreadable)} images can be read, such as {unreadable[:3]}"
        )
    names = [name for name in stamps if name in known]
    embeddings = np.array([known[name] for name in names], np.float32)
    return Index(np.array(names), embeddings, unreadable, len(known) - num_known)


def _index_folder(
    workdir: pathlib.Path, trained: TrainedNetwork, root: pathlib.Path
) -> pathlib.Path:
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    directory = workdir / "index" / f"{name}-{build.weights_digest(trained.variables)}"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _embed_part(
    directory: pathlib.Path,
    root: pathlib.Path,
    names: list[str],
    stamps: Stamps,
    trained: TrainedNetwork,
) -> dict[str, np.ndarray]:
    """Embeds some images and writes a part of the index; returns {name: embedding}."""
    embeddings, readable = embed_files([root / name for name in names], trained.embed)
    part = {
        name: embedding
        for name, embedding, ok in zip(names, embeddings, readable, strict=True)
        if ok
    }
    _write_part(directory, part, stamps)
    return part


def _write_part(directory: pathlib.Path, part: Mapping[str, np.ndarray], stamps: Stamps) -> None:
    """Writes a part of the index, unless it is empty."""
    if part:
        # A part has a name of its own, whatever other processes write there.
        target = directory / f"{uuid.uuid4().hex}.npz"
        with files.atomic_write(target) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                files=list(part),
                stamps=[stamps[name] for name in part],
                embeddings=list(part.values()),
            )
            file.flush()
            os.fsync(file.fileno())


def _read_part(path: pathlib.Path, stamps: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Returns {name: embedding} of a part's unchanged files. A damaged part is removed."""
    try:
        with np.load(path, allow_pickle=False) as part:
            names, known_stamps, embeddings = (
                part[column] for column in ("files", "stamps", "embeddings")
            )
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        path.unlink(missing_ok=True)
        return {}
    rows = zip(names.tolist(), known_stamps.tolist(), embeddings, strict=True)
    return {name: embedding for name, stamp, embedding in rows if stamps.get(name) == tuple(stamp)}


def embed_files(
    paths: Sequence[pathlib.Path], embed: Callable[..., dict[str, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds image files.

    Returns:
      (N, D) embeddings, all levels concatenated, and (N,) bool: which files could be read.
    """
    readable = np.ones(len(paths), bool)

    def on_bad(row: int) -> None:
        readable[row] = False

    levels = embed(data=_ImageFiles(paths), on_bad=on_bad)
    return np.asarray(embedding_net.concatenate_levels(levels)), readable


def image_names(folder: pathlib.Path) -> list[str]:
    """Returns the names of the images under a folder, as `image_files.find`.

    What is left out is told on stderr.

    Raises:
      ValueError: no such folder, or no images in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found = image_files.find(folder)
    left_out = image_files.describe(found.left_out)
    if not found.names:
        raise ValueError(
            f"{folder}: no images in it, or in the folders below"
            + (f" ({left_out})" if left_out else "")
        )
    if left_out:
        print(f"{folder}: {left_out}", file=sys.stderr)
    return found.names


def stamps_of(folder: pathlib.Path, names: Sequence[str]) -> Stamps:
    """Returns the sizes and times of files, which tell whether they changed."""
    return {name: _stamp(folder / name) for name in names}


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    """Returns a file's size and time; (0, 0) for a broken link."""
    try:
        information = path.stat()
    except OSError:
        return 0, 0
    return information.st_size, information.st_mtime_ns


def print_unreadable(names: Sequence[str]) -> int:
    """Lists images that could not be read on stderr; returns the exit code of the command."""
    for name in names:
        print(f"unreadable: {name}", file=sys.stderr)
    return 1 if names else 0
