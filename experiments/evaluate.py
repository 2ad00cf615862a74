"""Scores a trained network on its test classes: each level, each pair and the concatenation.

    python -m experiments.evaluate --workdir=runs/emoji

    python -m experiments.evaluate --workdir=runs/mine --data_dir=DIR --all_classes

Prints a table, with the 95 % intervals that a bootstrap over the classes gives, and writes --out,
by default evaluation.json in the workdir. --baseline=runs/other compares two runs query by query. A
run that kept the score of its untrained backbone (zero_shot) is compared with it too. --groups=FILE
leaves the copies of a query out of its ranking; check_data finds them. A dataset to evaluate needs
no training classes: a folder may have test/ alone, and a table no rows of train.
"""

from collections.abc import Mapping, Sequence
import functools
import json
import pathlib
import sys
from typing import Any

from absl import app, flags
import numpy as np

from experiments.engine import (
    checks,
    command,
    copy_groups,
    datasets,
    query_scores,
    scoring,
    trained_network,
    zero_shot,
)
from experiments.engine.config import OPTIONS, Config
from experiments.engine.query_scores import QueryScores
from experiments.engine.scoring import ScoreTable
from experiments.engine.trained_network import TrainedNetwork
from rll_jax import metrics
from rll_jax.data import files
from rll_jax.data.image_dataset import EncodedImageDataset

_DATA = ("data_dir", "dataset", "index")  # the flags that choose another dataset


def _as_text(table: ScoreTable) -> str:
    names = scoring.score_names(table)
    rows = [["", *names]]
    for level, scores in table.items():
        rows.append([level, *(f"{100 * scores[name]:.1f}" for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _given_data() -> dict[str, Any]:
    """Returns {option: value} of what chooses another dataset than the run's."""
    given = {name: flags.FLAGS[name].value for name in _DATA if flags.FLAGS[name].value}
    if "dataset" in given:  # a table and a split of classes are those of the run's own dataset
        own = ("index", "test_share", "split_seed", "test_classes", "validation_share")
        given = {name: OPTIONS[name].default for name in own} | given
    return given


def _open_test_images(
    config: Config,
    workdir: str,
    groups: Mapping[str, str] | None,
    baseline: QueryScores | None,
) -> EncodedImageDataset:
    """Returns the test images, and prints those that are skipped.

    Args:
      config: the run's options, with the dataset to evaluate.
      workdir: its folder.
      groups: what --groups holds, or None.
      baseline: the scores of --baseline, or None.

    Raises:
      ValueError: the images are not the run's, the groups' or the baseline's.
    """
    options = flags.FLAGS
    splits, skipped = datasets.open_usable(
        config.data, config.runtime, all_classes=options.all_classes
    )
    _print_left_out(skipped)
    if not _given_data() and not options.all_classes:
        checks.check_same_data(pathlib.Path(workdir), splits)
    if groups is not None:
        splits["test"] = copy_groups.leave_out(splits["test"], groups)
    if baseline is not None:
        query_scores.check_same_queries(baseline, splits["test"], options.baseline)
    splits = checks.cached_splits({"test": splits["test"]}, config.data, config.runtime)
    return splits["test"]


def _embed(
    trained: TrainedNetwork, test: EncodedImageDataset
) -> tuple[EncodedImageDataset, dict[str, np.ndarray]]:
    """Returns the test images that can be read, and their embeddings by level."""
    bad: list[str] = []
    embed = functools.partial(trained.embed, test, progress="embedding the test images")
    readable, levels = scoring.embed_readable(
        embed, test, lambda row: bad.append(str(test.paths[row]))
    )
    _print_left_out(bad)
    return readable, levels


def _print_left_out(reasons: Sequence[str]) -> None:
    for reason in reasons:
        print(f"left out: {reason}", file=sys.stderr)


def _gain(config: Config, scores: QueryScores) -> zero_shot.Gain | None:
    """Returns what training brought, if the run kept it and its own test images are evaluated."""
    options = flags.FLAGS
    if options.all_classes or options.groups or _given_data():
        return None
    return zero_shot.compare(config, pathlib.Path(options.workdir), scores)


def _print_intervals(
    scores: QueryScores,
    ks: Sequence[int],
    baseline: QueryScores | None,
    gain: zero_shot.Gain | None,
) -> dict[str, Mapping[str, metrics.Interval]]:
    """Prints the intervals of the scores and of their differences; returns all by name."""
    found: dict[str, Mapping[str, metrics.Interval]] = {
        "scores": query_scores.intervals(scores, ks)
    }
    print(query_scores.as_text(found["scores"]))
    if baseline is not None:
        found["difference"] = query_scores.intervals(scores, ks, baseline)
        print(f"difference to {flags.FLAGS.baseline}, paired:")
        print(query_scores.as_text(found["difference"], sign=True))
    if gain is not None:
        found["zero_shot"] = gain.zero_shot
        found["difference_to_zero_shot"] = gain.difference
        print(f"zero_shot: {query_scores.as_text(gain.zero_shot)}")
        print(zero_shot.in_a_line(gain))
    return found


def main(_: Any) -> None:
    """Runs the command."""
    options = flags.FLAGS
    with command.user_errors():
        out = pathlib.Path(options.out or pathlib.Path(options.workdir) / "evaluation.json")
        if options.out:
            command.check_free("out", out)
        if options.baseline and options.groups:
            raise ValueError(
                "--baseline and --groups: the scores that a run has kept rank copies too: leave "
                "one of them out"
            )
        groups = copy_groups.read(options.groups) if options.groups else None
        baseline = None
        if options.baseline:
            baseline = query_scores.read(pathlib.Path(options.baseline))
        trained = trained_network.load_from_flags()
        config = trained.config.replace(**_given_data())
        test = _open_test_images(config, options.workdir, groups, baseline)
        data, levels = _embed(trained, test)
        ks = config.data.entry.ks
        by_query = scoring.score_levels(levels, data, ks)
        table = scoring.make_table(by_query, data, ks)
        if options.clustering:
            scoring.add_clustering(table, levels, data)
        alone = next(iter(table.values()))["queries_without_match"]
        print(
            f"{options.workdir}, step {trained.step}: {len(data)} test images, in percent; "
            f"{alone} alone in their class{' but for copies' if groups else ''}"
        )
        if options.groups or data.groups is not None:
            numbers = [] if data.groups is None else data.groups
            _, sizes = np.unique(numbers, return_counts=True)
            print(f"{sizes[sizes > 1].sum()} images have a group, whose others they do not rank")
        print(_as_text(table))
        scores = query_scores.collect(list(by_query.values())[-1], data)
        print(f"95 % intervals over classes, {list(table)[-1]}:")
        intervals = _print_intervals(scores, ks, baseline, _gain(trained.config, scores))
        with files.atomic_write(out) as temporary:
            contents: dict[str, Any] = {
                "step": trained.step,
                "scores": table,
                "intervals": intervals,
            }
            if options.groups:
                contents["groups"] = options.groups
            temporary.write_text(json.dumps(contents, indent=1) + "\n")
        print(f"written: {out}")


if __name__ == "__main__":
    trained_network.define_flags()
    flags.DEFINE_string("data_dir", "", "The folder of the dataset. Empty: that of the run.")
    flags.DEFINE_string(
        "dataset",
        "",
        "The dataset, as in training, with its own split and K. Empty: that of the run.",
    )
    flags.DEFINE_string(
        "index",
        "",
        "A table of the images, as in training. Empty: that of the run, unless --dataset is given.",
    )
    flags.DEFINE_bool(
        "all_classes",
        False,
        "Search all classes of the dataset, not its test classes alone: for a dataset that the run "
        "did not train on.",
    )
    flags.DEFINE_bool(
        "clustering", True, "Score K-means too. It takes minutes for thousands of classes."
    )
    flags.DEFINE_string(
        "baseline",
        "",
        "The workdir of another run on the same test images, that has ended. The intervals of the "
        "differences to its scores are printed and written too.",
    )
    flags.DEFINE_string(
        "groups",
        "",
        "The groups of copies that check_data --groups_out wrote: a query is not ranked against "
        "images of its group.",
    )
    flags.DEFINE_string(
        "out",
        "",
        "The JSON file to write. Empty: evaluation.json in the workdir, which is overwritten.",
    )
    app.run(main, flags_parser=command.parse_flags)
