"""From row numbers to batches: images are read, decoded and augmented in parallel, ahead of use.

Bad images (see `rll_jax.data.image_dataset` for the other places that deal with them):
  - `train_batches` replaces an image that cannot be read or decoded by another of its class that
    the batch does not have; by one that the batch has, where there is no such image; and by one of
    another class, where no image of its class can be read. The replacement takes the place in the
    batch, the random numbers and, where it differs, the label.
  - `test_batches` yields a white image in its place.
Both report the row of each bad image to `on_bad`, in the calling process, every time it is drawn.
Without `on_bad` they raise `images.BadImageError` instead.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
import dataclasses
import errno
import functools
import os
from typing import Any, Protocol, TypeVar

import cv2
import grain
import jax
import numpy as np

from rll_jax.data import images
from rll_jax.data.random_streams import Stream
from rll_jax.typing import ImageDataset, Sampler, View

OnBad = Callable[[int], None]
ClassTransform = Callable[[np.ndarray, np.random.Generator], np.ndarray]
_Batch = TypeVar("_Batch")
_Placed = TypeVar("_Placed")


class Images(Protocol):
    """Images by row number, labelled or not; a `rll_jax.typing.ImageDataset` is one."""

    def __len__(self) -> int:
        """Returns the number of images."""
        ...

    def image(self, row: int) -> Any:
        """Returns what a view takes; raises `images.BadImageError` where it cannot be read."""
        ...


def train_batches(
    data: ImageDataset,
    sampler: Sampler,
    augment: View,
    class_transform: ClassTransform | None = None,
    *,
    start: int,
    stop: int,
    spread: bool = True,
    share: tuple[int, int] = (0, 1),
    threads: int = 2,
    processes: int = 0,
    on_bad: OnBad | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of steps start to stop - 1, each a pure function of (seed, step).

    Args:
      data: the training dataset.
      sampler: draws the rows of each step; its seed is the seed.
      augment: the view, which gets random numbers of its own for each image.
      class_transform: optional second augmentation, (pixels, rng) -> pixels. All images of one
        class in a batch get the same random state.
      start: the first step.
      stop: the step after the last one.
      spread: order the rows of a batch so that devices, which take equal shares of them, each have
        images of as many classes as possible. Otherwise the rows have the sampler's order, in which
        the images of a class are side by side.
      share: (i, n): yield only the i-th of n equal parts of each batch, for one host of many.
      threads: the number of threads, in each process, that load batches.
      processes: the number of worker processes. This process then only receives their arrays, by
        shared memory. 0: this process loads the batches.
      on_bad: called with the row of each bad image that was replaced; see the module's docstring.

    Yields:
      {"image": (B, H, W, 3) uint8, "label": (B,) int32}.

    Raises:
      images.BadImageError: an image is bad and `on_bad` is None, or no image can be read.
    """
    load = _TrainLoader(
        data, sampler, augment, class_transform, spread, share, replace=on_bad is not None
    )
    for batch, bad in _load_in_parallel(load, range(start, stop), threads, processes):
        if on_bad is not None:
            for row in bad:
                on_bad(int(row))
        yield batch


def test_batches(
    data: Images,
    view: Callable[[Any], np.ndarray],
    *,
    batch_size: int,
    threads: int = 2,
    processes: int = 0,
    on_bad: OnBad | None = None,
) -> Iterator[np.ndarray]:
    """Yields every row once, in order.

    Args:
      data: the images.
      view: from what `data.image(row)` returns to (H, W, 3) uint8.
      batch_size: the number of rows in a batch. The last batch is filled up with zeros.
      threads: the number of threads, in each process, that load batches.
      processes: the number of worker processes, as for `train_batches`.
      on_bad: called with the row of each bad image, which is white then.

    Yields:
      (batch_size, H, W, 3) uint8.

    Raises:
      images.BadImageError: an image is bad and `on_bad` is None.
    """
    load = _TestLoader(data, view, batch_size, replace=on_bad is not None)
    numbers = range(-(-len(data) // batch_size))
    for batch, bad in _load_in_parallel(load, numbers, threads, processes):
        if on_bad is not None:
            for row in bad:
                on_bad(int(row))
        yield batch


def prefetch(
    batches: Iterable[_Batch], place: Callable[[_Batch], _Placed], ahead: int = 2
) -> Iterator[_Placed]:
    """Yields `place(batch)` of each batch, so that copies overlap with computing.

    Args:
      batches: the batches.
      place: begins the copy of a batch to the devices.
      ahead: the number of batches whose copy is begun before they are asked for.
    """
    waiting = collections.deque()
    for batch in batches:
        waiting.append(place(batch))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


@dataclasses.dataclass(frozen=True)
class _TrainLoader:
    """Loads the batch of a step: (batch, rows of its bad images).

    Its fields are the arguments of `train_batches`. It is sent to the worker processes.

    Attributes:
      replace: replace bad images; otherwise their error is raised.
    """

    data: ImageDataset
    sampler: Sampler
    augment: View
    class_transform: ClassTransform | None
    spread: bool
    share: tuple[int, int]
    replace: bool

    def __call__(self, step: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        cv2.setNumThreads(1)  # batches are parallel already
        step = int(step)
        rows = self.sampler.batch(step)
        pixels, labels, bad = [], [], []
        for index in self._indices_of_share(len(rows)):
            key = (self.sampler.seed, Stream.AUGMENT, step, int(index))
            image, row = self._view_row(int(rows[index]), rows, key, bad)
            label = self.data.labels[row]
            if self.class_transform is not None:
                class_key = (self.sampler.seed, Stream.CLASS_TRANSFORM, step, int(label))
                image = self.class_transform(image, np.random.default_rng(class_key))
            pixels.append(image)
            labels.append(label)
        batch = {"image": np.stack(pixels), "label": np.array(labels, np.int32)}
        return batch, np.array(bad, np.int64)

    def _indices_of_share(self, batch_size: int) -> np.ndarray:
        """Returns the indices into the sampler's batch that this host loads, in their order."""
        order = np.arange(batch_size)
        if self.spread:  # first one image of each class, then the second of each, and so on
            order = order.reshape(-1, self.sampler.images_per_class).T.ravel()
        part, parts = self.share
        return order[batch_size * part // parts : batch_size * (part + 1) // parts]

    def _view_row(
        self, row: int, batch_rows: np.ndarray, key: tuple[int, ...], bad: list[int]
    ) -> tuple[np.ndarray, int]:
        """Returns the augmented image of a row, and the row; or those of its replacement.

        Args:
          row: the row that was drawn.
          batch_rows: all rows of the batch.
          key: the key of the random numbers.
          bad: gets the rows that cannot be read.
        """
        last_error = None
        for candidate in _candidates(self.data.labels, row, batch_rows):
            try:
                image = self.data.image(candidate)
                return self.augment(image, np.random.default_rng(key)), candidate
            except images.BadImageError as error:
                if not self.replace:
                    raise
                bad.append(candidate)
                last_error = error
        assert last_error is not None  # the row itself is a candidate
        raise last_error


@dataclasses.dataclass(frozen=True)
class _TestLoader:
    """Loads the batch of a number: (pixels, rows of its bad images).

    Its fields are the arguments of `test_batches`. It is sent to the worker processes.

    Attributes:
      replace: bad images are white; otherwise their error is raised.
    """

    data: Images
    view: Callable[[Any], np.ndarray]
    batch_size: int
    replace: bool

    def __call__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        cv2.setNumThreads(1)  # batches are parallel already
        first = int(number) * self.batch_size
        rows = range(first, min(first + self.batch_size, len(self.data)))
        bad: list[int] = []
        pixels = np.stack([self._view_row(row, bad) for row in rows])
        padding = [(0, self.batch_size - len(pixels))] + [(0, 0)] * (pixels.ndim - 1)
        return np.pad(pixels, padding), np.array(bad, np.int64)

    def _view_row(self, row: int, bad: list[int]) -> np.ndarray:
        try:
            return self.view(self.data.image(row))
        except images.BadImageError:
            if not self.replace:
                raise
            bad.append(row)
            return self.view(images.blank())


def _candidates(labels: np.ndarray, row: int, batch_rows: np.ndarray) -> Iterator[int]:
    """Yields the row, and then the rows that may replace it, the best first.

    These are the other rows of its class, those in the batch last; then the rows of other classes.
    All are in the order in which they follow the row, and go on with row 0 at the end.
    """
    yield row
    others = np.roll(np.arange(len(labels)), -row - 1)[:-1]
    is_same_class = labels[others] == labels[row]
    is_new = ~np.isin(others, batch_rows)
    for chosen in (is_same_class & is_new, is_same_class & ~is_new, ~is_same_class):
        yield from others[chosen].tolist()


def _load_in_parallel(
    load: Callable[[int], Any], numbers: range, threads: int, processes: int
) -> Iterator[Any]:
    """Yields `load(number)` of each number, loaded ahead.

    Python's garbage collector and a thread of grain's both close the shared memory of an array in
    a reference cycle, and with it any file that was opened in between. So the arrays are copied;
    and each worker ends with no array, because the last element is in a cycle of grain's. (The
    workers take numbers in turn, so that each gets one of those from `numbers.stop` on.)
    """
    stop = numbers.stop
    dataset = grain.MapDataset.range(numbers.start, stop + processes)
    batches = dataset.map(functools.partial(_load_below, load, stop)).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )
    if not processes:
        yield from batches
        return
    iterator = iter(batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=processes)))
    try:
        yield from filter(None, map(functools.partial(jax.tree.map, np.array), iterator))
    except Exception as error:  # a worker's error comes as grain passes it on
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(
            "/dev/shm is full: no room for the batches of the worker processes; make it larger, "
            "take fewer of them, or threads alone"
        ) from error
    finally:
        iterator.close()  # ends the processes and frees their shared memory


def _load_below(load: Callable[[int], Any], stop: int, number: int) -> Any:
    return load(number) if number < stop else ()
