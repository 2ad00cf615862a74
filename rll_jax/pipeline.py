"""From row numbers to batches on the devices: read, decode and augment in parallel (grain), ahead of the training."""
import collections
from typing import Callable, Iterable, Iterator

import grain
import numpy as np

from rll_jax.datasets import ImageSet
from rll_jax.sampler import ClassSampler

_AUGMENT, _CLASS = 2, 3  # streams of random numbers of their own, beside the sampler's


def train_batches(
    data: ImageSet, sampler: ClassSampler, augment: Callable, of_class: Callable | None = None, *, start: int, stop: int, threads: int = 2
) -> Iterator[dict]:
    """The batches of steps start to stop - 1, each a pure function of (the sampler's seed, step).

    Args:
      augment: (image, rng) -> (H, W, 3) uint8, each image with random numbers of its own.
      of_class: (pixels, rng) -> pixels, after it, all images of a class in the batch with the same random numbers; or None.

    Yields {"image": (P * K, H, W, 3) uint8, "label": (P * K,) int32}. Raises `images.BadImageError` where one does not
    decode.
    """

    def load(step):
        rows = sampler.batch(int(step))
        rngs = (np.random.default_rng((sampler.seed, _AUGMENT, int(step), i)) for i in range(len(rows)))
        pixels = [augment(data.image(row), rng) for row, rng in zip(rows, rngs)]
        if of_class is not None:
            classes = data.labels[rows].tolist()
            pixels = [of_class(x, np.random.default_rng((sampler.seed, _CLASS, int(step), c))) for x, c in zip(pixels, classes)]
        return {"image": np.stack(pixels), "label": data.labels[rows].astype(np.int32)}

    return iter(_parallel(grain.MapDataset.range(start, stop).map(load), threads))


def test_batches(data: ImageSet, view: Callable, *, batch_size: int, threads: int = 2) -> Iterator[np.ndarray]:
    """(batch_size, H, W, 3) uint8: every row once, in order; the last batch is filled up with zeros."""

    def load(number):
        rows = range(number * batch_size, min((number + 1) * batch_size, len(data)))
        pixels = np.stack([view(data.image(row)) for row in rows])
        return np.pad(pixels, [(0, batch_size - len(pixels))] + [(0, 0)] * 3)

    return iter(_parallel(grain.MapDataset.range(-(-len(data) // batch_size)).map(load), threads))


def _parallel(dataset, threads: int):
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))


def prefetch(batches: Iterable, place: Callable, ahead: int = 2) -> Iterator:
    """`place(batch)` of each, begun `ahead` batches before it is asked for, so that copies overlap with computing."""
    waiting = collections.deque()
    for batch in batches:
        waiting.append(place(batch))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
