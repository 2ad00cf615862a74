"""The score of doing nothing: the pooled features of a run's backbone before its first step."""

from collections.abc import Iterable, Mapping
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

from experiments.engine import query_scores
from experiments.engine.config import Config
from experiments.engine.query_scores import QueryScores
from rll_jax import metrics

FILE = "zero_shot_by_query.npz"  # in the workdir

_PREFIX = "zero_shot/"  # of the scores' names in metrics.jsonl


class Gain(NamedTuple):
    """What training brought beyond the backbone's own features.

    Attributes:
      network: the backbone and where its weights are from, for the eye.
      recall: Recall@1 after and before.
      zero_shot: {score: interval} of the backbone's own features.
      difference: {score: interval} of the differences, paired by query; none where the two are of
        different queries, as images could not be read, or all queries are of one class.
    """

    network: str
    recall: tuple[float, float]
    zero_shot: dict[str, metrics.Interval]
    difference: dict[str, metrics.Interval]


def is_wanted(config: Config) -> bool:
    """Whether a run scores its backbone's own features: it starts from weights, and may."""
    return config.runtime.zero_shot and bool(config.network.starting_weights)


def compare(config: Config, workdir: pathlib.Path, scores: QueryScores) -> Gain | None:
    """Compares a run's scores with those of its untrained backbone.

    Args:
      config: the run's options.
      workdir: its folder.
      scores: the scores of the trained network on the run's test images.

    Returns:
      The comparison; None where the run kept no such scores, or they cannot be read, which is said.
    """
    if not is_wanted(config) or not (workdir / FILE).exists():
        return None
    try:
        before = query_scores.read(workdir, FILE)
        zero_shot = query_scores.intervals(before, config.data.entry.ks)
        recall = (_recall(scores), _recall(before))
    except (ValueError, KeyError) as error:
        print(f"zero_shot is left out: {error}", file=sys.stderr, flush=True)
        return None
    try:
        difference = query_scores.intervals(scores, config.data.entry.ks, before)
    except ValueError:  # other queries
        difference = {}
    return Gain(_network(config), recall, zero_shot, difference)


def _recall(scores: QueryScores) -> float:
    return float(np.mean(scores.by_query["first_rank"] <= 1))


def _network(config: Config) -> str:
    name, backbone = config.network.starting_weights, config.network.backbone
    if (pathlib.Path(name) / "flags.txt").is_file():  # a run has trained it before
        return f"the {backbone} of {name}"
    return f"the untrained {backbone}"


def in_a_line(gain: Gain) -> str:
    """Returns the answer to whether training was worth it, in percent of Recall@1."""
    after, before = gain.recall
    interval = gain.difference.get("recall@1")
    between, doubt = "", ""
    if interval is not None:
        between = f" ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
        doubt = query_scores.doubt(interval)
    return (
        f"fine-tuning brought Recall@1 {100 * (after - before):+.1f}{between}: {100 * after:.1f} "
        f"against {100 * before:.1f} of {gain.network}{doubt}"
    )


def as_logged(scores: Mapping[str, float]) -> dict[str, float]:
    """Returns scores under their names in metrics.jsonl: zero_shot/recall@1, ..."""
    return {f"{_PREFIX}{name}": value for name, value in scores.items()}


def logged(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns the scores that `as_logged` named, of the lines of metrics.jsonl that have them."""
    found = [
        {
            name.removeprefix(_PREFIX): value
            for name, value in line.items()
            if name.startswith(_PREFIX)
        }
        for line in lines
    ]
    return [scores for scores in found if scores]
