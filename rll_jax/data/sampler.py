"""Batches of row numbers, each a pure function of (seed, step).

A sampler keeps no state between steps, so the batch of any step can be made again, and a run that
is resumed at step s continues with exactly that batch. `ClassSampler` is the sampling of Ranked
List Loss (Wang et al. 2019). The other samplers are what else the field uses. Each of them is a
`rll_jax.typing.Sampler`.
"""

import dataclasses
from typing import Any

import numpy as np

from rll_jax.data.random_streams import Stream


def _derived() -> Any:
    """A field that `__post_init__` computes from the others."""
    return dataclasses.field(init=False, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class ClassSampler:
    """P classes x K images in each batch.

    An epoch is a random permutation of the classes, cut to a multiple of P. Each class of a batch
    gives K distinct images.

    Args:
      labels: (N,) integers, the class of each image.
      classes_per_batch: P, at most the number of classes.
      images_per_class: K. Images repeat only in a class that has fewer than K.
      seed: any integer >= 0.

    Raises:
      ValueError: there are fewer than P classes, or P, K or the seed is out of range.
    """

    labels: np.ndarray
    classes_per_batch: int
    images_per_class: int
    seed: int = 0
    _rows_of_class: list[np.ndarray] = _derived()

    def __post_init__(self) -> None:
        _check_counts(self.classes_per_batch, self.images_per_class, self.seed)
        object.__setattr__(self, "_rows_of_class", _group_rows(self.labels))
        if self.classes_per_batch > len(self._rows_of_class):
            raise ValueError(
                f"classes_per_batch is {self.classes_per_batch}, but the training set has only "
                f"{len(self._rows_of_class)} classes: lower it"
            )

    @property
    def batch_size(self) -> int:
        """P * K."""
        return self.classes_per_batch * self.images_per_class

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in which each class is drawn at most once."""
        return len(self._rows_of_class) // self.classes_per_batch

    def batch(self, step: int) -> np.ndarray:
        """Returns the (P * K,) row numbers of the batch of `step`, counted from 0.

        The images of a class are side by side.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        epoch_rng = np.random.default_rng((self.seed, Stream.EPOCH, epoch))
        classes = epoch_rng.permutation(len(self._rows_of_class))
        chosen = classes[position * self.classes_per_batch :][: self.classes_per_batch]
        rng = np.random.default_rng((self.seed, Stream.STEP, step))
        return np.concatenate(
            [_draw_rows(self._rows_of_class[c], self.images_per_class, rng) for c in chosen]
        )


@dataclasses.dataclass(frozen=True)
class HierarchicalSampler:
    """P classes x K images, where a batch's classes come from few super classes.

    Such classes, as in SOP's 12 categories, are harder negatives for each other. An epoch puts the
    classes of each super class into random groups of P / super_classes_per_batch, and deals the
    groups to the batches so that a batch has each super class at most once. Groups that are left
    over, as of a super class that is much larger than the others, wait for another epoch. Classes
    of a super class that has fewer than P / super_classes_per_batch of them are never drawn.

    Args:
      labels: (N,) integers, the class of each image.
      super_labels: (N,) integers; all images of a class have the same super class.
      classes_per_batch: P.
      images_per_class: K. Images repeat only in a class that has fewer than K.
      super_classes_per_batch: a divisor of P.
      seed: any integer >= 0.

    Raises:
      ValueError: P, K or the seed is out of range, P is not a multiple of super_classes_per_batch,
        a class has two super classes, or fewer than super_classes_per_batch super classes have
        P / super_classes_per_batch classes.
    """

    labels: np.ndarray
    super_labels: np.ndarray
    classes_per_batch: int
    images_per_class: int
    super_classes_per_batch: int
    seed: int = 0
    _rows_of_class: list[np.ndarray] = _derived()
    _classes_of_super: list[np.ndarray] = _derived()
    _steps_per_epoch: int = _derived()

    def __post_init__(self) -> None:
        _check_counts(self.classes_per_batch, self.images_per_class, self.seed)
        supers_per_batch = self.super_classes_per_batch
        if supers_per_batch < 1 or self.classes_per_batch % supers_per_batch:
            raise ValueError(
                f"classes_per_batch is {self.classes_per_batch}, which {supers_per_batch} super "
                "classes cannot share: change one of them"
            )
        rows_of_class = _group_rows(self.labels)
        object.__setattr__(self, "_rows_of_class", rows_of_class)
        super_of_class = np.array([self.super_labels[rows[0]] for rows in rows_of_class])
        for rows, super_class in zip(rows_of_class, super_of_class, strict=True):
            if (self.super_labels[rows] != super_class).any():
                raise ValueError("a class has images of two super classes")
        size = self.classes_per_batch // supers_per_batch
        large = [classes for classes in _group_rows(super_of_class) if len(classes) >= size]
        object.__setattr__(self, "_classes_of_super", large)
        if len(large) < supers_per_batch:
            raise ValueError(
                f"only {len(large)} super classes hold the {size} classes that each of "
                f"{supers_per_batch} gives to a batch: lower super_classes_per_batch or "
                "classes_per_batch"
            )
        groups = np.array([len(classes) // size for classes in large])
        object.__setattr__(self, "_steps_per_epoch", _count_batches(groups, supers_per_batch))

    @property
    def batch_size(self) -> int:
        """P * K."""
        return self.classes_per_batch * self.images_per_class

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in which each class is drawn at most once."""
        return self._steps_per_epoch

    def batch(self, step: int) -> np.ndarray:
        """Returns the (P * K,) row numbers of the batch of `step`, counted from 0.

        The images of a class are side by side.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        chosen = self._deal_epoch(epoch)[position]
        rng = np.random.default_rng((self.seed, Stream.STEP, step))
        return np.concatenate(
            [_draw_rows(self._rows_of_class[c], self.images_per_class, rng) for c in chosen]
        )

    def _deal_epoch(self, epoch: int) -> np.ndarray:
        """Returns the (steps_per_epoch, P) classes of an epoch.

        No super class is twice in a batch, and no class twice in the epoch.
        """
        rng = np.random.default_rng((self.seed, Stream.GROUPS, epoch))
        size, batches = self.classes_per_batch // self.super_classes_per_batch, self.steps_per_epoch
        groups = []
        for super_class in rng.permutation(len(self._classes_of_super)):
            mixed = rng.permutation(self._classes_of_super[super_class])
            num_groups = min(len(mixed) // size, batches)
            groups += list(mixed[: num_groups * size].reshape(-1, size))
        # The groups are dealt round the batches like cards. A super class has at most as many
        # groups as there are batches, so no batch gets two of them.
        groups = groups[: batches * self.super_classes_per_batch]
        dealt = [np.concatenate(groups[batch::batches]) for batch in range(batches)]
        return np.array(dealt)[rng.permutation(batches)]


@dataclasses.dataclass(frozen=True)
class ShuffleSampler:
    """Images in random order, each with at least `min_positives` others of its class.

    An epoch is a random permutation of the images whose class has two images or more. A step takes
    batch_size / (1 + min_positives) of them, and for each as many others of its class as
    `min_positives` says. These are distinct as far as the class has so many images.

    Args:
      labels: (N,) integers, the class of each image.
      batch_size: a multiple of 1 + min_positives.
      min_positives: at least 1.
      seed: any integer >= 0.

    Raises:
      ValueError: batch_size is no such multiple, min_positives or the seed is out of range, or too
        few images have another of their class.
    """

    labels: np.ndarray
    batch_size: int
    min_positives: int = 1
    seed: int = 0
    _rows_of_class: list[np.ndarray] = _derived()
    _class_of_row: dict[int, int] = _derived()
    _rows: np.ndarray = _derived()

    def __post_init__(self) -> None:
        in_range = self.min_positives >= 1 and self.batch_size >= 2 and self.seed >= 0
        if not in_range or self.batch_size % self.images_per_class:
            raise ValueError(
                f"a batch of {self.batch_size} images cannot be made of images with "
                f"{self.min_positives} positives each: expected a multiple of "
                f"{1 + self.min_positives}"
            )
        rows_of_class = [rows for rows in _group_rows(self.labels) if len(rows) > 1]
        class_of_row = {int(row): c for c, rows in enumerate(rows_of_class) for row in rows}
        object.__setattr__(self, "_rows_of_class", rows_of_class)
        object.__setattr__(self, "_class_of_row", class_of_row)
        object.__setattr__(self, "_rows", np.array(list(class_of_row), np.int64))
        if len(class_of_row) < self.batch_size // self.images_per_class:
            raise ValueError(
                f"only {len(class_of_row)} training images have another of their class: "
                "lower classes_per_batch"
            )

    @property
    def images_per_class(self) -> int:
        """The number of images that belong together: a drawn image and its positives."""
        return 1 + self.min_positives

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in which each image is drawn at most once, positives not counted."""
        return len(self._class_of_row) * self.images_per_class // self.batch_size

    def batch(self, step: int) -> np.ndarray:
        """Returns the (batch_size,) row numbers of the batch of `step`, counted from 0.

        Each drawn image is followed by its positives.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        num_drawn = self.batch_size // self.images_per_class
        epoch_rng = np.random.default_rng((self.seed, Stream.EPOCH, epoch))
        drawn = epoch_rng.permutation(self._rows)[position * num_drawn :][:num_drawn].tolist()
        rng = np.random.default_rng((self.seed, Stream.STEP, step))
        rows, taken = [], set(drawn)
        for row in drawn:
            positives = self._draw_positives(row, taken, rng)
            taken.update(positives)
            rows += [row, *positives]
        return np.array(rows)

    def _draw_positives(self, row: int, taken: set[int], rng: np.random.Generator) -> list[int]:
        """Draws the positives of a row: first those that the batch has not yet, then any."""
        class_rows = self._rows_of_class[self._class_of_row[row]]
        count = min(len(class_rows), self.batch_size)
        candidates = class_rows[rng.choice(len(class_rows), count, replace=False)].tolist()
        others = [other for other in candidates if other != row]
        new = [other for other in others if other not in taken]
        used = [other for other in others if other in taken]
        return np.resize([*new, *used], self.min_positives).tolist()


def _check_counts(classes_per_batch: int, images_per_class: int, seed: int) -> None:
    if classes_per_batch < 1 or images_per_class < 1 or seed < 0:
        raise ValueError(
            "classes_per_batch and images_per_class must be at least 1 and seed at least 0, "
            f"got {classes_per_batch}, {images_per_class} and {seed}"
        )


def _count_batches(groups: np.ndarray, groups_per_batch: int) -> int:
    """Returns how many batches the groups of super classes fill.

    Args:
      groups: the number of groups of each super class, which gives at most one to a batch.
      groups_per_batch: the number of groups, each of another super class, in a batch.
    """
    batches = groups.sum() // groups_per_batch
    while (usable := np.minimum(groups, batches).sum()) < batches * groups_per_batch:
        batches = usable // groups_per_batch
    return int(batches)


def _group_rows(labels: np.ndarray) -> list[np.ndarray]:
    """Returns the row numbers of each class, by label."""
    order = np.argsort(labels, kind="stable")
    _, starts = np.unique(np.asarray(labels)[order], return_index=True)
    return np.split(order, starts[1:])


def _draw_rows(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    # `np.resize` repeats a short class's permutation, so no image comes twice before all came once.
    return np.resize(rng.permutation(rows), count)
