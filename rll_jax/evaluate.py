"""Embeddings of a whole set, each image exactly once whatever the batch size and the number of devices."""
import itertools
from typing import Callable

import numpy as np

from rll_jax import models, parallel, pipeline


def embed_images(
    state, data, view: Callable, embed: Callable, runner: parallel.Runner, *, batch_size: int, threads: int = 2, processes: int = 0,
    on_bad: Callable | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """{level: (N, D) float32}, rows in the order of the set.

    Args:
      data: has a length and `picture(row)`, such as `datasets.ImageSet`.
      view: image -> (H, W, 3) uint8.
      embed: `runner.embed(train.embed_step)`, compiled once for all evaluations.
      batch_size: about as many images at a time; rounded up to a multiple of the devices.
      on_bad: called with the row of a picture that does not decode, whose embedding then means nothing; None: it is raised.
    """
    batch_size = -(-batch_size // runner.num_devices) * runner.num_devices
    batches = pipeline.test_batches(data, view, batch_size=batch_size, threads=threads, processes=processes, on_bad=on_bad)
    parts = [
        {level: np.asarray(e) for level, e in embed(state, images).items()}
        for images in pipeline.prefetch(batches, runner.place)
    ]
    return {level: np.concatenate([part[level] for part in parts])[: len(data)] for level in parts[0]}


def combinations(embeddings: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{"L": ..., "M": ..., "L,M": ..., ...}: each level, each pair and all together, concatenated and of unit length."""
    levels = [level for level in models.LEVELS if level in embeddings]
    return {
        ",".join(some): np.asarray(models.concatenated({level: embeddings[level] for level in some}))
        for size in range(1, len(levels) + 1)
        for some in itertools.combinations(levels, size)
    }


def by_role(embeddings: np.ndarray, data) -> tuple:
    """The arguments of `metrics.retrieval_metrics`: embeddings and labels, of queries and gallery apart where a set has both."""
    if data.in_gallery is None:
        return embeddings, data.labels
    queries, gallery = ~data.in_gallery, data.in_gallery
    return embeddings[queries], data.labels[queries], embeddings[gallery], data.labels[gallery]
