"""Searching a folder of images by one run or two, while its files change."""

from collections.abc import Callable, Sequence
import hashlib
import pathlib
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.engine import collection as collection_lib
from experiments.engine import embedding_index
from experiments.engine.collection import Collection
from experiments.engine.embedding_index import Stamps
from experiments.engine.trained_network import TrainedNetwork
from rll_jax.data import files, image_files, images
from rll_jax.networks import embedding_net

_SCAN_SHARE = 20  # a scan for changed files is followed by a pause of so many times its time


class SearchedRun(NamedTuple):
    """A run whose network searches.

    Attributes:
      name: what the page calls it.
      workdir: its folder.
      trained: its network.
    """

    name: str
    workdir: str
    trained: TrainedNetwork


class Snapshot(NamedTuple):
    """The collection at a time.

    Attributes:
      collection: the images.
      version: grows with each change.
      stamps: the sizes and times of the files.
      num_unreadable: how many images of the folder cannot be read.
    """

    collection: Collection
    version: int
    stamps: Stamps
    num_unreadable: int


class SearchService:
    """Searches a folder of images by one run or two, and follows its files.

    Args:
      runs: the runs.
      folder: the folder of images, which is embedded now as far as the index does not know it.

    Attributes:
      folder: the folder.
      runs: the runs.
      id: of the numbers: the same when the same files are served again.
      snapshot: the collection.
      is_updating: whether changed files are being embedded.
      looks: how often `follow` has looked for changed files.
      problem: why the last update failed, or "".

    Raises:
      ValueError: as `embedding_index.update` and `collection.make`.
    """

    def __init__(self, runs: Sequence[SearchedRun], folder: pathlib.Path) -> None:
        self.folder, self.runs = folder, runs
        self.is_updating, self.problem = False, ""
        self.looks = self._looks_begun = 0
        self._known: dict[str, int] = {}
        self._network_lock, self._differences_lock = threading.Lock(), threading.Lock()
        self._look_now = threading.Event()
        self._differences: _Differences | None = None
        self.snapshot = self._read(self._scan(), 0)
        names = [str(folder.resolve()), *self.snapshot.collection.files]
        joined = "\0".join(names).encode(errors="surrogateescape")
        self.id = hashlib.sha256(joined).hexdigest()[:8]
        self.embed(images.blank())  # compiles, so that the first picture is not slow

    def _scan(self) -> Stamps:
        return embedding_index.stamps_of(self.folder, image_files.find(self.folder).names)

    def _read(self, stamps: Stamps, version: int) -> Snapshot:
        """Returns the collection as the index has it; a file that changes now is seen next time."""
        indices = [
            embedding_index.update(run.workdir, run.trained, str(self.folder), sys.stderr)
            for run in self.runs
        ]
        found = [(index.files.tolist(), index.embeddings) for index in indices]
        collection = collection_lib.make(found, self._known)
        self._known |= dict(zip(collection.files, collection.numbers.tolist(), strict=True))
        unreadable = set().union(*(index.unreadable for index in indices))
        return Snapshot(collection, version, stamps, len(unreadable))

    def update(self) -> bool:
        """Brings the collection up to date where files changed; returns whether it has changed.

        After a failure, which `problem` tells, the collection is as it was.
        """
        try:
            stamps = self._scan()
            if stamps == self.snapshot.stamps:
                self.problem = ""
                return False
            self.is_updating = True
            self.snapshot = self._read(stamps, self.snapshot.version + 1)
            self.problem = ""
            with self._differences_lock:
                self._differences = None  # it holds the embeddings of before
        except Exception as error:  # whatever it is, the page goes on with what it has
            self.problem = files.first_line(error)
            return False
        finally:
            self.is_updating = False
        return True

    def follow(self, seconds: float, stop: threading.Event) -> None:
        """Looks for changed files until `stop` is set, again and again.

        Args:
          seconds: the shortest pause between two looks; 0: only when `look_now` is called. It is
            longer where a look takes long, as in a folder far away.
          stop: is looked at when `look_now` is called, too.
        """
        pause = seconds
        while True:
            self._look_now.wait(pause or None)
            self._look_now.clear()
            if stop.is_set():
                return
            start = time.monotonic()
            self._looks_begun += 1
            changed, pause = self.update(), seconds
            self.looks = self._looks_begun
            if seconds and not changed:
                pause = max(seconds, _SCAN_SHARE * (time.monotonic() - start))

    def look_now(self) -> int:
        """Has `follow` look for changed files now; returns what `looks` will be after it."""
        look = self._looks_begun + 1
        self._look_now.set()
        return look

    def embed(self, image: Image.Image | images.EncodedImage) -> list[np.ndarray]:
        """Returns the (D,) float64 embedding of an image, of unit length, by each run.

        Raises:
          BadImageError: the image cannot be decoded.
          ValueError: an embedding is not finite.
        """
        found = []
        for run in self.runs:
            with self._network_lock:
                levels = run.trained.embed(data=_OneImage(image), batch_size=1)
            embedding = np.asarray(embedding_net.concatenate_levels(levels))[0].astype(np.float64)
            if not np.isfinite(embedding).all():
                raise ValueError("the network's embedding of this picture is not finite")
            found.append(embedding / np.linalg.norm(embedding))
        return found

    def path(self, row: int, snapshot: Snapshot) -> pathlib.Path:
        """Returns the path of an image of the collection."""
        return self.folder / snapshot.collection.files[row]

    def stamp(self, row: int, snapshot: Snapshot) -> str:
        """Returns a text that changes with the file of an image and with what numbers mean."""
        size, time_ns = snapshot.stamps.get(snapshot.collection.files[row], (0, 0))
        return f"{self.id}.{time_ns:x}.{size:x}"

    def right_only_in(self, run: int, snapshot: Snapshot) -> np.ndarray | float:
        """Returns the rows whose nearest other has their class in a run, and not in the other run.

        They are counted in the background at the first call for a collection.

        Returns:
          (M,) rows, or while they are counted the share that is done, below 1.

        Raises:
          ValueError: they cannot be counted.
        """
        with self._differences_lock:
            if self._differences is None or self._differences.snapshot is not snapshot:
                self._differences = _Differences(snapshot, lambda: self.snapshot is snapshot)
            differences = self._differences
        if differences.problem:
            raise ValueError(differences.problem)
        if differences.right is None:
            return min(differences.done, 0.99)
        return np.flatnonzero(differences.right[run] & ~differences.right[1 - run])


class _Differences:
    """Whether each run finds the right class first, counted in a thread of its own.

    Args:
      snapshot: the collection.
      is_wanted: whether to go on, asked now and then.

    Attributes:
      done: the share that is counted.
      right: for each run (N,) bool; None until all is counted.
      problem: why it ended before, or "".
    """

    def __init__(self, snapshot: Snapshot, is_wanted: Callable[[], bool]) -> None:
        self.snapshot, self._is_wanted = snapshot, is_wanted
        self.done, self.problem = 0.0, ""
        self.right: list[np.ndarray] | None = None
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        try:
            self._count_all()
        except Exception as error:  # such as a lack of memory: the page tells it
            self.problem = files.first_line(error)

    def _count_all(self) -> None:
        collection = self.snapshot.collection
        runs, right = len(collection.embeddings), []
        for run in range(runs):
            parts = []
            for part in collection_lib.right_at_one(collection, run):
                if not self._is_wanted():
                    return
                parts.append(part)
                self.done += len(part) / (runs * len(collection.files))
            right.append(np.concatenate(parts))
        self.right = right


class _OneImage:
    """An image as a dataset."""

    def __init__(self, image: Image.Image | images.EncodedImage) -> None:
        self._image = image
        self.labels = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return 1

    def image(self, row: int) -> Image.Image | images.EncodedImage:
        return self._image
