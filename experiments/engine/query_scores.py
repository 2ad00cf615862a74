"""The scores of each query that a run keeps, for intervals and for paired comparisons."""

import collections
from collections.abc import Mapping, Sequence
import contextlib
import pathlib
from typing import Any, NamedTuple
import zipfile

import numpy as np

from experiments.engine import checks, scoring
from experiments.engine.scoring import ByQuery
from rll_jax import metrics
from rll_jax.data import files, images
from rll_jax.data.image_dataset import EncodedImageDataset

NAME = "scores_by_query.npz"  # in the workdir


class QueryScores(NamedTuple):
    """The scores of a run's last evaluation, by all its levels concatenated.

    Attributes:
      by_query: as `metrics.scores_by_query` returns them.
      classes: (M,) the class of each of these queries.
      images: a digest of the scored images and their names; empty where it was not kept, as in
        earlier versions.
    """

    by_query: ByQuery
    classes: np.ndarray
    images: str = ""

    def is_paired_with(self, other: "QueryScores") -> bool:
        """Returns whether both have the same queries, of the same images as far as that is kept."""
        same = np.array_equal(self.classes, other.classes)
        same = same and np.array_equal(self.by_query["query"], other.by_query["query"])
        return same and len({self.images, other.images} - {""}) < 2


def collect(by_query: ByQuery, data: EncodedImageDataset) -> QueryScores:
    """Returns the scores of a dataset's queries with what tells these queries."""
    classes = scoring.query_classes(by_query, data)
    return QueryScores(by_query, classes, checks.data_digest(data))


def write(workdir: pathlib.Path, scores: QueryScores, name: str = NAME) -> None:
    """Writes the scores into a file of the workdir."""
    with files.atomic_write(workdir / name) as temporary, temporary.open("wb") as file:
        columns: dict[str, Any] = {
            "classes": scores.classes,
            "images": np.array(scores.images),
            **scores.by_query,
        }
        np.savez_compressed(file, **columns)


def read(workdir: pathlib.Path, name: str = NAME) -> QueryScores:
    """Returns the scores that a run has kept.

    Raises:
      ValueError: there are none, or the file is damaged.
    """
    path = workdir / name
    if not path.exists():
        raise ValueError(f"{path}: no such file: expected a run that has ended, by this version")
    try:
        with np.load(path, allow_pickle=False) as saved:
            columns = dict(saved)
        images = str(columns.pop("images", ""))
        return QueryScores(columns, columns.pop("classes"), images)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def check_same_queries(scores: QueryScores, data: EncodedImageDataset, workdir: str) -> None:
    """Checks that a baseline's scores can be of a dataset's queries, before these are embedded.

    Args:
      scores: the scores that the baseline has kept.
      data: the dataset. Queries that cannot be read or have no match have no score.
      workdir: the baseline's folder.

    Raises:
      ValueError: the baseline scored more queries of a class than the dataset has, or none of a
        class that has some.
    """
    here = collections.Counter(data.labels[data.query_rows].tolist())
    scored = collections.Counter(scores.classes.tolist())
    for label in sorted(here.keys() | scored.keys()):
        if scored[label] > here[label] or (not scored[label] and _has_a_match(data, label)):
            raise ValueError(
                f"--baseline={workdir} scored {scored.total()} queries of {len(scored)} classes: "
                f"{scored[label]} of class {label}, of which there are {here[label]} here; give a "
                "run on the same test images"
            )


def _has_a_match(data: EncodedImageDataset, label: int) -> bool:
    """Returns whether a class surely has a scored query: two images of it can be read."""
    kept_apart = (data.in_gallery, data.groups, data.image_ids)
    rows = np.flatnonzero(data.labels == label)
    if len(rows) < 2 or any(column is not None for column in kept_apart):
        return False
    readable = 0
    for row in rows:
        with contextlib.suppress(images.BadImageError):
            data.decoded_image(int(row))
            readable += 1
        if readable == 2:
            return True
    return False


def join(runs: Sequence[QueryScores]) -> QueryScores:
    """Returns the scores of several runs on the same images as one: a class keeps its queries."""
    names = runs[0].by_query
    joined = {name: np.concatenate([run.by_query[name] for run in runs]) for name in names}
    digests = {run.images for run in runs}
    images = digests.pop() if len(digests) == 1 else ""
    return QueryScores(joined, np.concatenate([run.classes for run in runs]), images)


def intervals(
    scores: QueryScores, ks: Sequence[int], baseline: QueryScores | None = None
) -> dict[str, metrics.Interval]:
    """Returns the 95 % intervals over classes, of the scores or of the differences to a baseline.

    There are none where all queries are of one class.

    Raises:
      ValueError: the baseline has scores of other images.
    """
    if len(np.unique(scores.classes)) < 2:
        return {}
    if baseline is not None and not np.array_equal(scores.classes, baseline.classes):
        raise ValueError(
            "the queries are of other classes than the baseline's: give a run on the same test "
            "images"
        )
    return metrics.confidence_intervals(
        scores.by_query,
        scores.classes,
        baseline=None if baseline is None else baseline.by_query,
        ks=ks,
    )


def in_percent(found: metrics.Interval, *, sign: bool = False) -> str:
    """Returns an interval in percent: 61.9 (60.0 to 63.8)."""
    plus = "+" if sign else ""
    value, low, high = (f"{100 * number:{plus}.1f}" for number in found)
    return f"{value} ({low} to {high})"


def doubt(difference: metrics.Interval) -> str:
    """Returns what is to be said of a difference whose interval holds 0; otherwise nothing."""
    if difference.low <= 0 <= difference.high:
        return "; the interval holds 0, so that it may be chance"
    return ""


def as_text(found: Mapping[str, metrics.Interval], *, sign: bool = False) -> str:
    """Returns intervals in percent: recall@1 61.9 (60.0 to 63.8)  ..."""
    return "  ".join(f"{name} {in_percent(i, sign=sign)}" for name, i in found.items())
