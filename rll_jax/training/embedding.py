"""Embeddings of a whole set, each image exactly once whatever the batch size and the number of devices."""

import itertools
from typing import Callable

import jax
from jax.experimental import multihost_utils
import numpy as np

from rll_jax.data import pipeline
from rll_jax.networks import embedding_net
from rll_jax.training import devices as devices_lib


def embed_images(
    state,
    data,
    view: Callable,
    embed: Callable,
    runner: devices_lib.Runner,
    *,
    batch_size: int,
    threads: int = 2,
    processes: int = 0,
    on_bad: Callable | None = None,
) -> dict[str, np.ndarray]:
    """{level: (N, D) float32}, rows in the order of the set, the same in every process; each embeds its share.

    Args:
      state: on the devices of this process, as `runner.to_local` gives it.
      data: has a length and `image(row)`, such as `datasets.EncodedImageDataset`.
      view: image -> (H, W, 3) uint8.
      embed: `runner.embed(train.embed_step)`, compiled once for all evaluations.
      batch_size: about as many images at a time; rounded up to a multiple of the devices.
      on_bad: called with the row of a picture that does not decode, whose embedding then means nothing; None: it is raised.
    """
    devices = runner.num_devices // jax.process_count()
    batch_size = -(-batch_size // devices) * devices
    bounds = [
        len(data) * i // jax.process_count() for i in range(jax.process_count() + 1)
    ]  # of the processes' rows
    first, stop = bounds[jax.process_index() :][:2]
    each = max(np.diff(bounds))
    bad = np.zeros(each, bool)
    batches = pipeline.test_batches(
        _Part(data, first, stop),
        view,
        batch_size=batch_size,
        threads=threads,
        processes=processes,
        on_bad=None if on_bad is None else lambda row: bad.__setitem__(row, True),
    )
    parts = [
        {level: np.asarray(e) for level, e in embed(state, images).items()}
        for images in pipeline.prefetch(batches, runner.shard_local)
    ]
    found = {level: np.concatenate([part[level] for part in parts])[:each] for level in parts[0]}
    found = {level: e[: stop - first] for level, e in found.items()}
    if jax.process_count() > 1:
        padded = {level: np.pad(e, ((0, each - len(e)), (0, 0))) for level, e in found.items()}
        padded, bad = multihost_utils.process_allgather((padded, bad), tiled=True)
        of_all = np.concatenate([each * i + np.arange(n) for i, n in enumerate(np.diff(bounds))])
        found, bad = {level: e[of_all] for level, e in padded.items()}, bad[of_all]
    for row in np.flatnonzero(bad):
        on_bad(int(row))
    return found


class _Part:
    """Some rows of a set, side by side."""

    def __init__(self, data, start, stop):
        self._data, self._start, self._stop = data, start, stop

    def __len__(self):
        return self._stop - self._start

    def image(self, row):
        return self._data.image(self._start + row)


def combinations(embeddings: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{"L": ..., "M": ..., "L,M": ..., ...}: each level, each pair and all together, concatenated and of unit length."""
    levels = [level for level in embedding_net.LEVELS if level in embeddings]
    return {
        ",".join(some): np.asarray(
            embedding_net.concatenate_levels({level: embeddings[level] for level in some})
        )
        for size in range(1, len(levels) + 1)
        for some in itertools.combinations(levels, size)
    }


def queries_and_gallery(embeddings: np.ndarray, data) -> tuple:
    """The arguments of `metrics.retrieval_metrics`: embeddings and labels, of queries and gallery apart where a set has both."""
    if data.in_gallery is None:
        return embeddings, data.labels
    queries, gallery = ~data.in_gallery, data.in_gallery
    return embeddings[queries], data.labels[queries], embeddings[gallery], data.labels[gallery]
