"""The table and the plot of a comparison of losses."""

from collections.abc import Mapping, Sequence
import pathlib
import statistics
from typing import Any

import numpy as np

from experiments.engine import measuring
from rll_jax import metrics

SCORES = {"recall@1": "Recall@1", "map@r": "MAP@R"}  # the titles of the scores

Row = dict[str, Any]


def make_rows(
    scores: Mapping[str, Mapping[int, Mapping[str, float]]],
    titles: Mapping[str, str],
    rates: Mapping[str, float],
    over_classes: Mapping[str, Mapping[str, metrics.Interval]] | None = None,
) -> list[Row]:
    """Returns a row for each entry. Differences to the first entry are paired by seed.

    Args:
      scores: {entry: {seed: {score: value}}}, the first entry first.
      titles: {entry: title}.
      rates: {entry: its learning rate}, without those whose runs all failed.
      over_classes: {entry: {score: interval}} of the differences, by drawing test classes.
    """
    first = next(iter(scores.values()))
    rows = []
    for name, by_seed in scores.items():
        row: Row = {
            "name": name,
            "title": titles[name],
            "learning_rate": rates.get(name),
            "seeds": list(by_seed),
        }
        for score in SCORES:
            values = [100 * found[score] for found in by_seed.values()]
            paired = [
                100 * (found[score] - first[seed][score])
                for seed, found in by_seed.items()
                if seed in first
            ]
            row[score] = {**_summary(values), "difference": _summary(paired)}
            if interval := (over_classes or {}).get(name, {}).get(score):
                ends = [100 * interval.low, 100 * interval.high]
                row[score]["difference"]["over_classes"] = ends
        rows.append(row)
    return rows


def _summary(values: list[float]) -> dict[str, Any]:
    """Returns mean, standard deviation (n - 1) and half of the mean's 95 % interval."""
    from scipy import stats  # a second to import

    std = half = None
    if len(values) > 1:
        std = statistics.stdev(values)
        half = float(stats.t.ppf(0.975, len(values) - 1)) * std / len(values) ** 0.5
    mean = statistics.fmean(values) if values else None
    return {"values": values, "mean": mean, "std": std, "half": half}


def as_markdown(
    rows: Sequence[Row], about: str, untrained: Mapping[str, float] | None = None
) -> str:
    """Returns the table in Markdown.

    Args:
      rows: of `make_rows`.
      about: what was run.
      untrained: the scores of the network before its first step.
    """
    lines = [
        f"# {len(rows)} losses on equal terms\n",
        about,
        "Percent, mean ± standard deviation over seeds. The difference is to "
        f"“{rows[0]['title']}”, paired by seed, ± half of its 95 % interval: one that "
        "reaches over 0 is noise, as far as so many seeds tell. The intervals are each for itself, "
        "and leave out the noise of tuning. In brackets: the 95 % interval of the same difference, "
        "paired by query, with other test classes drawn instead of other seeds.\n",
    ]
    head = ["loss", "rate", "Recall@1", "difference", "MAP@R", "difference", "seeds"]
    table = [_cells(row, row is rows[0]) for row in rows]
    if untrained:
        recall, map_at_r = (f"{100 * untrained[score]:.1f}" for score in SCORES)
        table.append(["the network before its first step", "", recall, "", map_at_r, "", "1"])
    return "\n".join([*lines, measuring.markdown_table(head, table)]) + "\n"


def _cells(row: Row, is_first: bool) -> list[str]:
    rate = row["learning_rate"]
    cells = [row["title"], "failed" if rate is None else f"{rate:g}"]
    for score in SCORES:
        difference = "" if is_first else cell(row[score]["difference"], "half", "+")
        cells += [cell(row[score], "std"), difference]
    return [*cells, str(len(row["seeds"]))]


def cell(summary: Mapping[str, Any], spread: str, sign: str = "") -> str:
    """Returns a mean and its spread ("std" or "half") as text, with the interval over classes."""
    if summary["mean"] is None:
        return "-"
    text = f"{summary['mean']:{sign}.1f}"
    text = text if summary[spread] is None else f"{text} ± {summary[spread]:.1f}"
    if ends := summary.get("over_classes"):
        text += f" ({ends[0]:+.1f} to {ends[1]:+.1f})"
    return text


def plot(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Draws the scores of all entries: mean, standard deviation, seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.3 * len(rows)), layout="constrained")
    places = np.arange(len(rows))[::-1]
    for axes, score in zip(figure.subplots(1, 2, sharey=True), SCORES, strict=True):
        for place, row in zip(places, rows, strict=True):
            _draw_entry(axes, place, row, row[score])
        if rows[0][score]["mean"] is not None:
            axes.axvline(rows[0][score]["mean"], color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel=f"{SCORES[score]}, percent")
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].set_yticks(places, [row["title"] for row in rows])
    figure.suptitle("mean, standard deviation and seeds", fontsize="medium")
    figure.savefig(path, dpi=110, format="png")


def _draw_entry(axes: Any, place: float, row: Row, summary: Mapping[str, Any]) -> None:
    colour = "C0" if row["name"].startswith("rll") else "C1"
    axes.plot(summary["values"], [place] * len(summary["values"]), ".", color=colour, alpha=0.35)
    if summary["mean"] is not None:
        spread = summary["std"] or 0
        axes.errorbar(summary["mean"], place, xerr=spread, fmt="o", color=colour, capsize=3)
