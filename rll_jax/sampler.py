"""Batches of P classes x K images, each a pure function of (seed, step).

The sampling of Ranked List Loss (Wang et al. 2019): an epoch is a random permutation of the classes, cut to a multiple of
the classes of a batch; each class of the batch gives K distinct images. Nothing is remembered between steps, so that any
step's batch can be made again and a restart at step s goes on with the very batch.
"""
import dataclasses

import numpy as np

_EPOCH, _STEP = 0, 1  # streams of random numbers that must not meet


@dataclasses.dataclass(frozen=True)
class ClassSampler:
    """Row numbers of the images of any step's batch.

    Args:
      labels: (N,) integers, the class of each image.
      classes_per_batch: P, at most the number of classes.
      images_per_class: K. Images repeat only in a class that has fewer than K.
      seed: any integer >= 0.

    Raises:
      ValueError: fewer classes than P, or P, K or the seed out of range.
    """

    labels: np.ndarray
    classes_per_batch: int
    images_per_class: int
    seed: int = 0

    def __post_init__(self):
        if self.classes_per_batch < 1 or self.images_per_class < 1 or self.seed < 0:
            raise ValueError(
                "classes_per_batch and images_per_class must be at least 1 and seed at least 0, "
                f"got {self.classes_per_batch}, {self.images_per_class} and {self.seed}"
            )
        order = np.argsort(self.labels, kind="stable")
        _, starts = np.unique(np.asarray(self.labels)[order], return_index=True)
        object.__setattr__(self, "_rows_of_class", np.split(order, starts[1:]))
        if self.classes_per_batch > len(starts):
            raise ValueError(
                f"classes_per_batch is {self.classes_per_batch}, but the training set has only {len(starts)} classes: "
                "lower --classes_per_batch"
            )

    @property
    def batch_size(self) -> int:
        return self.classes_per_batch * self.images_per_class

    @property
    def steps_per_epoch(self) -> int:
        return len(self._rows_of_class) // self.classes_per_batch

    def batch(self, step: int) -> np.ndarray:
        """(P * K,) row numbers of the batch of `step` (from 0), the images of a class side by side."""
        epoch, position = divmod(step, self.steps_per_epoch)
        classes = np.random.default_rng((self.seed, _EPOCH, epoch)).permutation(len(self._rows_of_class))
        chosen = classes[position * self.classes_per_batch :][: self.classes_per_batch]
        rng = np.random.default_rng((self.seed, _STEP, step))
        # np.resize repeats a short class's permutation, so that each image comes once before any comes twice
        return np.concatenate(
            [np.resize(rng.permutation(self._rows_of_class[c]), self.images_per_class) for c in chosen]
        )
