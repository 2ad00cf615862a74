"""From row numbers to batches on the devices: read, decode and augment in parallel (grain), ahead of the training."""

import collections
from typing import Callable, Iterable, Iterator

import cv2
import grain
import numpy as np

from rll_jax.data import images
from rll_jax.data.image_dataset import EncodedImageDataset

_AUGMENT, _CLASS = 2, 3  # streams of random numbers of their own, beside the samplers'
OnBad = Callable[[int], None]


def train_batches(
    data: EncodedImageDataset,
    sampler,
    augment: Callable,
    class_transform: Callable | None = None,
    *,
    start: int,
    stop: int,
    spread: bool = True,
    share: tuple[int, int] = (0, 1),
    threads: int = 2,
    processes: int = 0,
    on_bad: OnBad | None = None,
) -> Iterator[dict]:
    """The batches of steps start to stop - 1, each a pure function of (the sampler's seed, step).

    Args:
      sampler: of `rll_jax.data.sampler`.
      augment: (image, rng) -> (H, W, 3) uint8, each image with random numbers of its own.
      class_transform: (pixels, rng) -> pixels, after it, all images of a class in the batch with the same random numbers; or None.
      spread: order the rows so that devices, which take equal shares of them, each have images of as many classes as can be; otherwise
        the sampler's order, a class's images side by side.
      share: (i, n): only the i-th of n equal parts of the rows, for one host of many.
      threads: that load batches, in each process.
      processes: beside this one, which then only places batches (their arrays come by shared memory); 0: threads here.
      on_bad: called with the row of a picture that does not decode, in this process, each time it is drawn; another of its class takes
        its place, one that the batch has not if there is any; where none of its class can be read, one of another class.
        None: it is raised instead.

    Yields {"image": (B, H, W, 3) uint8, "label": (B,) int32}. Raises `images.BadImageError` where one does not decode and `on_bad` is
    None, or none of the set does.
    """

    def load(step):
        cv2.setNumThreads(1)  # the parallelism is ours
        rows, bad = sampler.batch(int(step)), []
        order = _spread(len(rows), sampler.images_per_class) if spread else np.arange(len(rows))
        part, parts = share
        pixels, labels = [], []
        for i in order[len(rows) * part // parts : len(rows) * (part + 1) // parts]:
            seed = (sampler.seed, _AUGMENT, int(step), int(i))
            x, row = _view(data, rows, rows[i], augment, seed, None if on_bad is None else bad)
            if class_transform is not None:
                x = class_transform(
                    x,
                    np.random.default_rng((sampler.seed, _CLASS, int(step), int(data.labels[row]))),
                )
            pixels.append(x)
            labels.append(data.labels[row])
        return {
            "image": np.stack(pixels),
            "label": np.array(labels, np.int32),
            "bad": np.array(bad, np.int64),
        }

    for batch in _parallel(grain.MapDataset.range(start, stop).map(load), threads, processes):
        for row in batch.pop("bad"):
            on_bad(int(row))
        yield batch


def test_batches(
    data: EncodedImageDataset,
    view: Callable,
    *,
    batch_size: int,
    threads: int = 2,
    processes: int = 0,
    on_bad: OnBad | None = None,
) -> Iterator[np.ndarray]:
    """(batch_size, H, W, 3) uint8: every row once, in order; the last batch is filled up with zeros.

    `on_bad` is called with the row of a picture that does not decode, which is then white; None: `images.BadImageError` is raised.
    """

    def seen(row, bad):
        try:
            return view(data.image(row))
        except images.BadImageError:
            if on_bad is None:
                raise
            bad.append(row)
            return view(images.blank())

    def load(number):
        cv2.setNumThreads(1)
        rows, bad = range(number * batch_size, min((number + 1) * batch_size, len(data))), []
        pixels = np.stack([seen(row, bad) for row in rows])
        pixels = np.pad(pixels, [(0, batch_size - len(pixels))] + [(0, 0)] * (pixels.ndim - 1))
        return {"image": pixels, "bad": np.array(bad, np.int64)}

    for batch in _parallel(
        grain.MapDataset.range(-(-len(data) // batch_size)).map(load), threads, processes
    ):
        for row in batch["bad"]:
            on_bad(int(row))
        yield batch["image"]


def _view(data, batch, row, augment, seed, bad):
    """The augmented picture of a row and the row; or those of another that can be read. Those that cannot go into `bad`."""
    for at in _candidates(data, batch, row):
        try:
            return augment(data.image(at), np.random.default_rng(seed)), at
        except images.BadImageError as error:
            if bad is None:
                raise
            bad.append(at)
            last = error
    raise last


def _candidates(data, batch, row) -> Iterator[int]:
    """The row; the others of its class after it, those that the batch has last; all others after it."""
    yield row
    after = np.roll(np.arange(len(data)), -row - 1)[:-1]
    same = data.labels[after] == data.labels[row]
    fresh = ~np.isin(after, batch)
    for chosen in (same & fresh, same & ~fresh, ~same):
        yield from after[chosen].tolist()


def _spread(rows: int, images_per_class: int) -> np.ndarray:
    """First one image of each class, then the second of each, and so on."""
    return np.arange(rows).reshape(-1, images_per_class).T.ravel()


def _parallel(dataset, threads: int, processes: int) -> Iterator:
    batches = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )
    if not processes:
        yield from batches
        return
    iterator = iter(batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=processes)))
    try:
        yield from iterator
    finally:
        iterator.close()  # ends the processes and frees their shared memory


def prefetch(batches: Iterable, place: Callable, ahead: int = 2) -> Iterator:
    """`place(batch)` of each, begun `ahead` batches before it is asked for, so that copies overlap with computing."""
    waiting = collections.deque()
    for batch in batches:
        waiting.append(place(batch))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
