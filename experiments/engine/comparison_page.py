"""A page that compares runs: scores, paired differences, curves, options and images."""

from collections.abc import Sequence
import html
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.engine import (
    finished_runs,
    html_page,
    options,
    query_scores,
    report_images,
    report_plots,
    zero_shot,
)
from experiments.engine.comparison_table import SCORES
from experiments.engine.finished_runs import FinishedRun
from rll_jax import metrics
from rll_jax.data.image_dataset import EncodedImageDataset

Intervals = dict[str, metrics.Interval]

_IMAGES = 9  # shown of each kind
_ARROW = " \N{RIGHTWARDS ARROW} "
_UNWANTED = ("step", "queries_without_match")
_INTERVALS = (
    "In percent. In parentheses: the 95 % interval, by drawing other test classes of the same "
    "kind, each for itself. It does not say how other training runs would differ."
)


class _Compared(NamedTuple):
    """Runs and their scores.

    Attributes:
      runs: the runs.
      intervals: {run: {score: interval}}, empty for a run that kept no scores of each query.
      differences: {run: {score: interval}} of the differences to the first run, without the runs
        that cannot be compared with it query by query.
      why_not: {run: why it cannot}.
    """

    runs: Sequence[FinishedRun]
    intervals: dict[str, Intervals]
    differences: dict[str, Intervals]
    why_not: dict[str, str]


def _compare(runs: Sequence[FinishedRun]) -> _Compared:
    first, *others = runs
    why_not = {run.name: finished_runs.why_not_paired(run, first) for run in others}
    differences = {
        run.name: finished_runs.differences(run, first) for run in others if not why_not[run.name]
    }
    intervals = {run.name: finished_runs.intervals(run) for run in runs}
    return _Compared(runs, intervals, differences, why_not)


def write(
    path: pathlib.Path,
    runs: Sequence[FinishedRun],
    test: EncodedImageDataset | None,
    without_test: str,
) -> None:
    """Writes the page.

    Args:
      path: the file.
      runs: the runs; all others are compared with the first.
      test: the test images of the first run, or None.
      without_test: why there are none.
    """
    names = ", ".join(run.name for run in runs)
    compared = _compare(runs)
    if len(runs) > 1:
        title, about = (
            f"Comparison of {len(runs)} runs",
            f"{names}. All are compared with the first.",
        )
    else:
        title, about = (
            f"The run {names}",
            "Give several runs to compare them with the first.",
        )
    body = [
        f"<header><h1>{html.escape(title)}</h1>\n",
        html_page.paragraph(about, "lead"),
        f"{_answers(compared)}</header>\n",
        _charts(compared),
        _scores(compared),
        _differences(compared),
        _curves(runs),
        _images(compared, test, without_test),
        _options(runs),
        _places(runs),
    ]
    html_page.write(path, f"{title}: {names}" if len(runs) > 1 else title, "".join(body))


def _answers(compared: _Compared) -> str:
    """Returns a sentence for each run after the first, and what training brought to each."""
    first, *others = compared.runs
    parts = []
    for run in others:
        pair = f"{run.name} against {first.name}"
        if why := compared.why_not[run.name]:
            sentence = f"{pair}: there is no paired difference. {why}."
            parts.append(html_page.paragraph(sentence, "note"))
            continue
        found = compared.differences[run.name]["recall@1"]
        difference = query_scores.in_percent(found, sign=True)
        after, before = (100 * one.last["recall@1"] for one in (run, first))
        scores = f"{after:.1f} against {before:.1f}{query_scores.doubt(found)}"
        parts.append(html_page.answer(f"Recall@1 of {pair}: {difference}, {scores}"))
    for run in compared.runs:
        gain = None
        if run.scores is not None:
            gain = zero_shot.compare(run.config, run.workdir, run.scores)
        if gain is not None:
            parts.append(html_page.paragraph(f"{run.name}: {zero_shot.in_a_line(gain)}"))
    return "".join(parts)


def _charts(compared: _Compared) -> str:
    """Returns the intervals of the scores, and of the differences to the first run."""
    charts = []
    for found, what, difference in (
        (compared.intervals, "Scores", False),
        (compared.differences, f"Differences to {compared.runs[0].name}, paired by query", True),
    ):
        by_score = {
            title: {run: of_run[score] for run, of_run in found.items() if score in of_run}
            for score, title in SCORES.items()
        }
        if all(by_score.values()):
            alt = f"{what}, with 95 % intervals"
            charts.append(report_plots.interval_chart(by_score, alt, difference=difference))
    return html_page.plots(*charts) if charts else ""


def _scores(compared: _Compared) -> str:
    names = list(dict.fromkeys(name for run in compared.runs for name in _score_names(run)))
    rows = []
    for run in compared.runs:
        intervals = compared.intervals[run.name]
        cells = []
        for name in names:
            plain = f"{100 * run.last[name]:.1f}" if name in run.last else ""
            cells.append(query_scores.in_percent(intervals[name]) if name in intervals else plain)
        rows.append([run.name, run.last["step"], *cells])
    notes = [
        html_page.paragraph(f"There are no intervals of {run.name}: it {run.without}.", "note")
        for run in compared.runs
        if run.scores is None
    ]
    return html_page.section(
        "Scores",
        html_page.paragraph(_INTERVALS),
        html_page.table(["run", "step", *names], rows, "All levels, at the last evaluation"),
        *notes,
    )


def _score_names(run: FinishedRun) -> list[str]:
    return [name for name in run.last if name not in _UNWANTED]


def _differences(compared: _Compared) -> str:
    paired = compared.differences
    if not paired:
        return ""
    names = list(dict.fromkeys(name for found in paired.values() for name in found))
    rows = []
    for run, found in paired.items():
        texts = {name: query_scores.in_percent(one, sign=True) for name, one in found.items()}
        rows.append([run, *(texts.get(name, "") for name in names)])
    return html_page.section(
        f"Differences to {compared.runs[0].name}",
        html_page.paragraph(
            "Paired by query: both runs have the same classes in each draw. Where an interval "
            "holds 0, the difference may be chance."
        ),
        html_page.table(["run", *names], rows, "In points of percent"),
    )


def _curves(runs: Sequence[FinishedRun]) -> str:
    lines = {run.name: run.lines for run in runs}
    ranks = {run.name: run.scores and run.scores.by_query for run in runs}
    plots = [
        report_plots.loss_curves(lines),
        *(report_plots.score_curves(lines, score) for score in SCORES),
        *([report_plots.first_ranks(ranks)] if any(ranks.values()) else []),
    ]
    return html_page.section("Curves", html_page.plots(*plots))


def _images(compared: _Compared, test: EncodedImageDataset | None, without_test: str) -> str:
    """Returns the queries whose average precision differs most between each run and the first."""
    if not compared.differences:
        return ""
    first, *others = compared.runs
    title = "Queries on which the runs differ most"
    if test is None:
        return html_page.section(title, html_page.paragraph(f"No images: {without_test}", "note"))
    parts = [
        html_page.paragraph(
            f"Under each: its class, its average precision (AP) in {first.name} and in the other "
            "run, and the rank of the first image of its class. A click enlarges an image."
        )
    ]
    for run in others:
        if run.name in compared.differences:
            parts.append(_gains_and_losses(run, first, test))
    return html_page.section(title, *parts)


def _gains_and_losses(run: FinishedRun, first: FinishedRun, test: EncodedImageDataset) -> str:
    assert run.scores is not None and first.scores is not None  # they are paired
    names, rows = report_images.class_names(test), test.query_rows
    before, after = first.scores.by_query, run.scores.by_query
    gain = after["average_precision"] - before["average_precision"]
    parts = []
    for title, by in (
        (f"Better in {run.name} than in {first.name}", gain),
        (f"Better in {first.name} than in {run.name}", -gain),
    ):
        tiles = []
        for at in np.argsort(-by, kind="stable")[: min(_IMAGES, np.sum(by > 0))]:
            ap = [f"{one['average_precision'][at]:.2f}" for one in (before, after)]
            rank = [f"{one['first_rank'][at]:.0f}" for one in (before, after)]
            about = f"AP {_ARROW.join(ap)}", f"rank {_ARROW.join(rank)}"
            row = int(rows[after["query"][at]])
            tiles.append(report_images.tile(test, names, row, "", *about))
        shown = html_page.image_row(tiles) if tiles else html_page.paragraph("None.", "note")
        parts.append(f"<h3>{html.escape(title)}</h3>\n{shown}")
    return "".join(parts)


def _options(runs: Sequence[FinishedRun]) -> str:
    flat = [run.config.flat() for run in runs]
    values = {
        name: [options.to_text(one[name]) for one in flat] for name in flat[0] if name != "workdir"
    }
    equal = {name: texts for name, texts in values.items() if len(set(texts)) == 1}
    differing = [[name, *texts] for name, texts in values.items() if name not in equal]
    parts: list[str] = []
    if differing:
        head: list[Any] = ["option", *(run.name for run in runs)]
        parts.append(html_page.table(head, differing, "Options that differ"))
    elif len(runs) > 1:
        parts.append(html_page.paragraph("All options are equal.", "note"))
    rows = [[name, texts[0]] for name, texts in equal.items()]
    folded = html_page.table(["option", "value"], rows, "Options")
    what = "equal options" if len(runs) > 1 else "options"
    parts.append(html_page.details(f"{len(rows)} {what}", folded))
    return html_page.section("Options", *parts)


def _places(runs: Sequence[FinishedRun]) -> str:
    """Returns where the runs ran, and how fast."""
    rows = []
    for run in runs:
        rate, known = run.images_per_second, run.environment
        packages, devices = known.get("packages"), known.get("devices")
        rows.append(
            [
                run.name,
                "" if rate is None else f"{rate:,.0f}",
                ", ".join(map(str, devices)) if isinstance(devices, list) else "",
                packages.get("jax", "") if isinstance(packages, dict) else "",
                known.get("commit", ""),
                run.workdir,
            ]
        )
    head = ["run", "images/s", "devices", "jax", "commit", "folder"]
    about = "Images/s: the median over the steps of training."
    return html_page.section(
        "Where they ran", html_page.paragraph(about), html_page.table(head, rows, "Machines")
    )
