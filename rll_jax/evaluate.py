"""Embeddings of a whole set, each image exactly once whatever the batch size and the number of devices."""
from typing import Callable

import numpy as np

from rll_jax import models, parallel, pipeline
from rll_jax.datasets import ImageSet


def embed_images(
    state, data: ImageSet, view: Callable, embed: Callable, runner: parallel.Runner, *, batch_size: int, threads: int = 2
) -> np.ndarray:
    """(N, levels * D) float32, the levels' concatenation, rows in the order of the set.

    Args:
      embed: `runner.embed(train.embed_step)`, compiled once for all evaluations.
      batch_size: about as many images at a time; rounded up to a multiple of the devices.
    """
    batch_size = -(-batch_size // runner.num_devices) * runner.num_devices
    batches = pipeline.test_batches(data, view, batch_size=batch_size, threads=threads)
    parts = [
        np.asarray(models.concatenated(embed(state, images))) for images in pipeline.prefetch(batches, runner.place)
    ]
    return np.concatenate(parts)[: len(data)]
