"""A collection of images to search in: numbers, classes, and the embeddings of one run or two."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses

import numpy as np

from rll_jax import metrics
from rll_jax.data import folders, listings

_SPLITS = {*folders.SPLIT_LIKE, listings.QUERY, listings.GALLERY}
_ROWS = 2048  # images whose nearest is found at once
NO_CLASS = -1


@dataclasses.dataclass(frozen=True)
class Collection:
    """Images with their classes and embeddings; its rows are in the order of their numbers.

    Attributes:
      files: the N names, relative to the folder, with "/".
      numbers: (N,) ascending integers. An image keeps its number as long as the program runs.
      classes: the names of the C classes, sorted.
      class_of: (N,) the class of each image, or `NO_CLASS`.
      embeddings: for each run (N, D) float32 of unit length.
    """

    files: Sequence[str]
    numbers: np.ndarray
    classes: Sequence[str]
    class_of: np.ndarray
    embeddings: Sequence[np.ndarray]

    def row(self, number: int) -> int | None:
        """Returns the row of an image by its number; None where there is no such image."""
        row = int(np.searchsorted(self.numbers, number))
        return row if row < len(self.numbers) and self.numbers[row] == number else None


def make(
    runs: Sequence[tuple[Sequence[str], np.ndarray]], known: Mapping[str, int] | None = None
) -> Collection:
    """Makes the collection of the images that all runs have embedded.

    Args:
      runs: for each run the names of its images, and their (N, D) embeddings of unit length.
      known: {name: number} of all images that ever were in the collection; others are numbered
        behind them, by name.

    Raises:
      ValueError: there is no image that all runs have, or an embedding is not finite.
    """
    places = [{name: row for row, name in enumerate(files)} for files, _ in runs]
    common = set(places[0]).intersection(*places[1:])
    if not common:
        raise ValueError("no image was embedded by each of the runs")
    numbers = dict(known or {})
    for name in sorted(common - numbers.keys()):
        numbers[name] = len(numbers)
    files = sorted(common, key=numbers.__getitem__)
    embeddings = [
        np.ascontiguousarray(values[[place[name] for name in files]], np.float32)
        for place, (_, values) in zip(places, runs, strict=True)
    ]
    if not all(np.isfinite(values).all() for values in embeddings):
        raise ValueError("the network's embeddings are not finite: the run has diverged")
    of_files = class_names(files)
    classes = sorted({name for name in of_files if name})
    label = {name: number for number, name in enumerate(classes)} | {"": NO_CLASS}
    return Collection(
        files=files,
        numbers=np.array([numbers[name] for name in files]),
        classes=classes,
        class_of=np.array([label[name] for name in of_files]),
        embeddings=embeddings,
    )


def class_names(files: Sequence[str]) -> list[str]:
    """Returns the class of each image: the name of its folder, as in a dataset of folders.

    Folders around all classes are no classes: those of splits, and one that holds everything.
    An image in no folder has the class "".
    """
    parts = [name.split("/") for name in files]
    while parts and all(len(part) > 2 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    tops = {part[0].lower() for part in parts if len(part) > 1}
    if tops <= _SPLITS and any(len(part) > 2 for part in parts):
        parts = [part[1:] if len(part) > 1 else part for part in parts]
    return [part[0] if len(part) > 1 else "" for part in parts]


def nearest(
    embeddings: np.ndarray,
    query: np.ndarray,
    k: int,
    *,
    among: np.ndarray | None = None,
    leave_out: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the rows that are most similar to one query by cosine, in one pass over them.

    Finds what `rll_jax.metrics.nearest` finds, which is made for many queries and prepares all
    rows at each call.

    Args:
      embeddings: (N, D) float32 of unit length.
      query: (D,) of unit length.
      k: the number of rows, at least 1. Fewer are returned where there are fewer.
      among: the rows to search, ascending; None for all.
      leave_out: a row that is not returned: the query itself.

    Returns:
      The rows, the most similar first, and their float32 similarities. Of rows with equal float32
      similarity the lower comes first.
    """
    rows = np.arange(len(embeddings)) if among is None else among
    searched = embeddings if among is None else embeddings[rows]
    # Unlike a matrix product it sums all rows in one order, so that equal rows are equally near.
    similarity = np.einsum("nd,d->n", searched, query.astype(np.float32))
    if leave_out is not None:
        kept = rows != leave_out
        rows, similarity = rows[kept], similarity[kept]
    if len(rows) > k:
        near = np.flatnonzero(similarity >= np.partition(similarity, -k)[-k])
        rows, similarity = rows[near], similarity[near]
    order = np.argsort(-similarity, kind="stable")[:k]
    return rows[order], similarity[order]


def right_at_one(collection: Collection, run: int) -> Iterator[np.ndarray]:
    """Yields, for parts of the rows in their order, whether the nearest other has their class.

    The mean is the run's Recall@1. False for images without a class.

    Args:
      collection: the images.
      run: whose embeddings.
    """
    embeddings, class_of = collection.embeddings[run], collection.class_of
    if len(embeddings) == 1:
        yield np.zeros(1, bool)
        return
    for first in range(0, len(embeddings), _ROWS):
        rows = np.arange(first, min(first + _ROWS, len(embeddings)))
        found, _ = metrics.nearest(embeddings[rows], embeddings, 1, leave_out=rows)
        yield (class_of[found[:, 0]] == class_of[rows]) & (class_of[rows] != NO_CLASS)
