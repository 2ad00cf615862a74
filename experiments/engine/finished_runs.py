"""What runs have left in their folders: options, scores by step and by query, rates, machines."""

from collections.abc import Mapping, Sequence
import json
import pathlib
import statistics
from typing import Any, NamedTuple

import numpy as np

from experiments.engine import config, logs, query_scores
from experiments.engine.config import Config
from experiments.engine.query_scores import QueryScores
from rll_jax import metrics

_COMPARED = ("recall@1", "map@r", "mrr")
_AGREE = 1e-6  # of a score in metrics.jsonl and of the same from the scores of each query


class FinishedRun(NamedTuple):
    """A run that has scored its test images at least once.

    Attributes:
      name: the end of its folder's path that tells it from the other runs.
      workdir: its folder.
      config: its options.
      lines: the lines of metrics.jsonl.
      last: the line of its last evaluation.
      scores: the scores of each query of that evaluation, or None.
      without: why there are no scores of each query, after "the run"; empty where there are.
      environment: what environment.json says; empty where there is none.
    """

    name: str
    workdir: pathlib.Path
    config: Config
    lines: list[dict[str, Any]]
    last: dict[str, Any]
    scores: QueryScores | None
    without: str
    environment: Mapping[str, Any]

    @property
    def images_per_second(self) -> float | None:
        """The median rate of training, or None where none was written."""
        rates = [line["images_per_second"] for line in self.lines if "images_per_second" in line]
        return statistics.median(rates) if rates else None


def split_folders(text: str) -> list[pathlib.Path]:
    """Returns the folders of A,B,C, also where their names have commas, as a sweep's do.

    Raises:
      ValueError: a name is empty.
    """
    parts, folders = text.split(","), []
    while parts:
        ends = range(len(parts), 0, -1)
        is_run = (end for end in ends if _is_run(pathlib.Path(",".join(parts[:end]))))
        end = next(is_run, 1)
        if not parts[0] and end == 1:
            raise ValueError(f"--workdir={text}: expected folders with commas between")
        folders.append(pathlib.Path(",".join(parts[:end])))
        parts = parts[end:]
    return folders


def _is_run(folder: pathlib.Path) -> bool:
    return (folder / "flags.txt").is_file()


def read(folders: Sequence[pathlib.Path]) -> list[FinishedRun]:
    """Reads runs.

    Raises:
      ValueError: a folder is missing, holds no run or a run without an evaluation, is there twice,
        or a file of it is damaged.
    """
    found: dict[pathlib.Path, pathlib.Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--workdir={folder}: no such folder")
        if not _is_run(folder):
            raise ValueError(
                f"--workdir={folder} holds no run: expected a folder that an experiment wrote, "
                "with flags.txt"
            )
        if other := found.get(folder.resolve()):
            raise ValueError(f"--workdir: {other} and {folder} are the same run: give it once")
        found[folder.resolve()] = folder
    names = short_names(list(found))
    return [_read(name, folder) for name, folder in zip(names, found.values(), strict=True)]


def short_names(folders: Sequence[pathlib.Path]) -> list[str]:
    """Returns as much of the ends of distinct absolute paths as tells them apart."""
    longest = max(len(folder.parts) for folder in folders)
    for length in range(1, longest + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(name: str, folder: pathlib.Path) -> FinishedRun:
    lines = logs.read_lines(folder / "metrics.jsonl")
    evaluations = [line for line in lines if "recall@1" in line]
    if not evaluations:
        raise ValueError(
            f"--workdir={folder} holds a run without an evaluation: let the run go on to its first"
        )
    scores, without = _query_scores(folder, evaluations[-1])
    return FinishedRun(
        name,
        folder,
        config.from_flagfile(folder / "flags.txt"),
        lines,
        evaluations[-1],
        scores,
        without,
        _json_object(folder / "environment.json"),
    )


def _json_object(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object of a JSON file; an empty one where it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _query_scores(folder: pathlib.Path, last: Mapping[str, Any]) -> tuple[QueryScores | None, str]:
    """Returns the scores of each query of the last evaluation, or why there are none."""
    if not (folder / query_scores.NAME).exists():
        return None, "kept no scores of each query: it has not ended, or is of an earlier version"
    try:
        scores = query_scores.read(folder)
        found = metrics.mean_scores(scores.by_query, len(scores.classes), ks=(1,))
        lengths = {len(column) for column in (scores.classes, *scores.by_query.values())}
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        return None, f"kept scores of each query that cannot be read ({reason})"
    if lengths != {len(scores.classes)} or not len(scores.classes):
        return None, "kept scores of each query that are damaged"
    if any(abs(found[name] - last.get(name, found[name])) > _AGREE for name in _COMPARED):
        return None, "kept scores of each query of an earlier evaluation"
    return scores, ""


def intervals(run: FinishedRun) -> dict[str, metrics.Interval]:
    """Returns the 95 % intervals of a run's scores; none where it kept no scores of each query."""
    if run.scores is None:
        return {}
    return query_scores.intervals(run.scores, run.config.data.entry.ks)


def why_not_paired(run: FinishedRun, first: FinishedRun) -> str:
    """Returns why two runs cannot be compared query by query; empty where they can."""
    if run.scores is None or first.scores is None:
        return "; ".join(f"{one.name} {one.without}" for one in (first, run) if one.without)
    mine = run.scores._replace(images=digest_of_images(run, run.scores))
    if not mine.is_paired_with(first.scores._replace(images=digest_of_images(first, first.scores))):
        return f"{run.name} and {first.name} scored other test images, or under other names"
    if len(np.unique(run.scores.classes)) < 2:
        return "all queries are of one class"
    return ""


def digest_of_images(run: FinishedRun, scores: QueryScores) -> str:
    """Returns the digest of the images that a run scored; empty where it kept none."""
    return scores.images or str(_json_object(run.workdir / "data.json").get("test", ""))


def differences(run: FinishedRun, first: FinishedRun) -> dict[str, metrics.Interval]:
    """Returns the 95 % intervals of the differences to a run that `why_not_paired` allows."""
    if run.scores is None:
        return {}
    common = [k for k in run.config.data.entry.ks if k in first.config.data.entry.ks]
    return query_scores.intervals(run.scores, common, first.scores)
