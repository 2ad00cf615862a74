"""Batches of row numbers, each a pure function of (seed, step).

Nothing is remembered between steps, so that any step's batch can be made again and a restart at step s goes on with the very batch.
`ClassSampler` is the sampling of Ranked List Loss (Wang et al. 2019): an epoch is a random permutation of the classes, cut to a
multiple of the classes of a batch; each class of the batch gives K distinct images. The others are what else the field uses.
"""

import dataclasses

import numpy as np

_EPOCH, _STEP, _GROUPS = (
    0,
    1,
    4,
)  # streams of random numbers that must not meet; 2 and 3 are the pipeline's


@dataclasses.dataclass(frozen=True)
class ClassSampler:
    """Row numbers of the images of any step's batch: P classes x K images.

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
        _check_counts(self)
        object.__setattr__(self, "_rows_of_class", _rows_of(self.labels))
        if self.classes_per_batch > len(self._rows_of_class):
            raise ValueError(
                f"classes_per_batch is {self.classes_per_batch}, but the training set has only {len(self._rows_of_class)} classes: "
                "lower it"
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
        classes = np.random.default_rng((self.seed, _EPOCH, epoch)).permutation(
            len(self._rows_of_class)
        )
        chosen = classes[position * self.classes_per_batch :][: self.classes_per_batch]
        rng = np.random.default_rng((self.seed, _STEP, step))
        return np.concatenate(
            [_images(self._rows_of_class[c], self.images_per_class, rng) for c in chosen]
        )


@dataclasses.dataclass(frozen=True)
class HierarchicalSampler:
    """P classes x K images, where the classes of a batch come from few super classes, such as SOP's 12: harder negatives.

    An epoch puts each super class's classes into random groups of P / super_classes_per_batch and deals the groups to batches, no super
    class twice in one; what is left over, as of a super class much larger than the others, waits for another epoch. Classes of a super
    class that has fewer than P / super_classes_per_batch of them are never drawn.

    Args:
      labels, super_labels: (N,) integers; all images of a class have one super class.
      super_classes_per_batch: divides P.
      The others as for `ClassSampler`.

    Raises:
      ValueError: P is not a multiple of super_classes_per_batch, or fewer super classes hold P / super_classes_per_batch classes.
    """

    labels: np.ndarray
    super_labels: np.ndarray
    classes_per_batch: int
    images_per_class: int
    super_classes_per_batch: int
    seed: int = 0

    def __post_init__(self):
        _check_counts(self)
        if (
            self.super_classes_per_batch < 1
            or self.classes_per_batch % self.super_classes_per_batch
        ):
            raise ValueError(
                f"classes_per_batch is {self.classes_per_batch}, which {self.super_classes_per_batch} super classes cannot share: "
                "change one of them"
            )
        rows_of_class = _rows_of(self.labels)
        super_of_class = np.array([self.super_labels[rows[0]] for rows in rows_of_class])
        if any(
            (self.super_labels[rows] != s).any() for rows, s in zip(rows_of_class, super_of_class)
        ):
            raise ValueError("a class has images of two super classes")
        object.__setattr__(self, "_rows_of_class", rows_of_class)
        size = self.classes_per_batch // self.super_classes_per_batch
        object.__setattr__(
            self, "_classes_of_super", [c for c in _rows_of(super_of_class) if len(c) >= size]
        )
        if len(self._classes_of_super) < self.super_classes_per_batch:
            raise ValueError(
                f"only {len(self._classes_of_super)} super classes hold the {size} classes that each of {self.super_classes_per_batch} "
                "gives to a batch: lower super_classes_per_batch or classes_per_batch"
            )
        groups = np.array([len(classes) // size for classes in self._classes_of_super])
        steps = groups.sum() // self.super_classes_per_batch
        while (
            np.minimum(groups, steps).sum() < steps * self.super_classes_per_batch
        ):  # each gives one group to a batch
            steps = np.minimum(groups, steps).sum() // self.super_classes_per_batch
        object.__setattr__(self, "_steps", int(steps))

    @property
    def batch_size(self) -> int:
        return self.classes_per_batch * self.images_per_class

    @property
    def steps_per_epoch(self) -> int:
        return self._steps

    def batch(self, step: int) -> np.ndarray:
        """(P * K,) row numbers of the batch of `step` (from 0), the images of a class side by side."""
        epoch, position = divmod(step, self.steps_per_epoch)
        chosen = self._epoch(epoch)[position]
        rng = np.random.default_rng((self.seed, _STEP, step))
        return np.concatenate(
            [_images(self._rows_of_class[c], self.images_per_class, rng) for c in chosen]
        )

    def _epoch(self, epoch) -> np.ndarray:
        """(steps_per_epoch, P) classes: no super class twice in a batch, no class twice in an epoch."""
        rng = np.random.default_rng((self.seed, _GROUPS, epoch))
        size, batches = self.classes_per_batch // self.super_classes_per_batch, self.steps_per_epoch
        groups = []
        for classes in (
            self._classes_of_super[s] for s in rng.permutation(len(self._classes_of_super))
        ):
            mixed = rng.permutation(classes)
            groups += list(mixed[: min(len(mixed) // size, batches) * size].reshape(-1, size))
        # dealt round the batches like cards: a super class has at most as many groups as there are batches
        dealt = [
            groups[b : batches * self.super_classes_per_batch : batches] for b in range(batches)
        ]
        return np.array([np.concatenate(batch) for batch in dealt])[rng.permutation(batches)]


@dataclasses.dataclass(frozen=True)
class ShuffleSampler:
    """Images in random order, each with at least `min_positives` others of its class in the batch.

    An epoch is a random permutation of the images of the classes with two or more; a step takes batch_size / (1 + min_positives) of
    them, and for each as many others of its class, distinct as far as the class has them.

    Args:
      labels: (N,) integers.
      batch_size: a multiple of 1 + min_positives.
      min_positives: at least 1.
      seed: any integer >= 0.

    Raises:
      ValueError: batch_size is no such multiple, or too few images have another of their class.
    """

    labels: np.ndarray
    batch_size: int
    min_positives: int = 1
    seed: int = 0

    def __post_init__(self):
        if (
            self.min_positives < 1
            or self.batch_size < 2
            or self.batch_size % (1 + self.min_positives)
            or self.seed < 0
        ):
            raise ValueError(
                f"a batch of {self.batch_size} images cannot be made of images with {self.min_positives} positives each: expected a "
                f"multiple of {1 + self.min_positives}"
            )
        rows_of_class = [rows for rows in _rows_of(self.labels) if len(rows) > 1]
        object.__setattr__(self, "_rows_of_class", rows_of_class)
        class_of = {int(row): c for c, rows in enumerate(rows_of_class) for row in rows}
        object.__setattr__(self, "_class_of", class_of)
        object.__setattr__(self, "_rows", np.array(list(class_of), np.int64))
        if len(class_of) < self.batch_size // (1 + self.min_positives):
            raise ValueError(
                f"only {len(class_of)} training images have another of their class: lower classes_per_batch"
            )

    @property
    def images_per_class(self) -> int:
        """Those that belong together: a drawn image and its positives."""
        return 1 + self.min_positives

    @property
    def steps_per_epoch(self) -> int:
        return len(self._class_of) * (1 + self.min_positives) // self.batch_size

    def batch(self, step: int) -> np.ndarray:
        """(batch_size,) row numbers of the batch of `step` (from 0), each drawn image before its positives."""
        epoch, position = divmod(step, self.steps_per_epoch)
        drawn = self.batch_size // (1 + self.min_positives)
        order = np.random.default_rng((self.seed, _EPOCH, epoch)).permutation(self._rows)
        rng = np.random.default_rng((self.seed, _STEP, step))
        rows, taken = [], set(order[position * drawn :][:drawn].tolist())
        for row in order[position * drawn :][:drawn].tolist():
            class_rows = self._rows_of_class[self._class_of[row]]
            drawn_of_class = class_rows[
                rng.choice(len(class_rows), min(len(class_rows), self.batch_size), replace=False)
            ]
            others = [r for r in drawn_of_class.tolist() if r != row]
            fresh = [r for r in others if r not in taken]
            # those of the class that the batch has not yet, then any
            positives = np.resize(
                [*fresh, *(r for r in others if r in taken)], self.min_positives
            ).tolist()
            taken.update(positives)
            rows += [row, *positives]
        return np.array(rows)


def _check_counts(sampler) -> None:
    if sampler.classes_per_batch < 1 or sampler.images_per_class < 1 or sampler.seed < 0:
        raise ValueError(
            "classes_per_batch and images_per_class must be at least 1 and seed at least 0, "
            f"got {sampler.classes_per_batch}, {sampler.images_per_class} and {sampler.seed}"
        )


def _rows_of(labels) -> list[np.ndarray]:
    """The row numbers of each class, by label."""
    order = np.argsort(labels, kind="stable")
    _, starts = np.unique(np.asarray(labels)[order], return_index=True)
    return np.split(order, starts[1:])


def _images(rows, count, rng) -> np.ndarray:
    # np.resize repeats a short class's permutation, so that each image comes once before any comes twice
    return np.resize(rng.permutation(rows), count)
