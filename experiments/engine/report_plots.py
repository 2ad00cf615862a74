"""The plots of reports: curves, distances, ranks and intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from experiments.engine import html_page
from experiments.engine.losses import LossOptions
from experiments.engine.scoring import ByQuery
from rll_jax import metrics

_SIZE = (5, 3.1)  # inches; the type of matplotlib's 10 points is then readable on a phone
_PAIRS = 100_000  # pairs drawn for each histogram
_POINTS = 1000  # at most, of a curve

Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl


def _figure(size: tuple[float, float] = _SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=html_page.COLOURS)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.6, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _label(name: str, longest: int = 32) -> str:
    """Returns a name as matplotlib shows it: neither as mathematics nor as a hidden label."""
    text = name if len(name) <= longest else "\N{HORIZONTAL ELLIPSIS}" + name[1 - longest :]
    text = text.encode(errors="replace").decode().replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{text}" if text.startswith("_") else text


def _style(number: int) -> dict[str, Any]:
    """Returns the colour and line of a run, which are the same in all plots of a page."""
    colours = html_page.COLOURS
    line = ("-", "--", ":")[number // len(colours) % 3]
    return {"color": colours[number % len(colours)], "linestyle": line}


def evaluations(lines: Lines) -> list[Mapping[str, Any]]:
    """Returns the lines that have the scores of an evaluation."""
    return [line for line in lines if "recall@1" in line]


def loss_curves(runs: Mapping[str, Lines]) -> str:
    """Returns a plot of the loss of runs, {name: lines}, over the steps."""
    figure, axes = _figure()
    for number, (name, lines) in enumerate(runs.items()):
        found = [line for line in lines if "loss" in line]
        found = found[:: -(-len(found) // _POINTS) or 1]
        places = [line["step"] for line in found]
        axes.plot(places, [line["loss"] for line in found], label=_label(name), **_style(number))
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    _legend_of_several(axes, runs)
    return html_page.plot(figure, "loss over the steps")


def score_curves(runs: Mapping[str, Lines], score: str) -> str:
    """Returns a plot of a score of runs, {name: lines}, over the steps."""
    figure, axes = _figure()
    for number, (name, lines) in enumerate(runs.items()):
        found = [line for line in evaluations(lines) if score in line]
        places, values = [line["step"] for line in found], [100 * line[score] for line in found]
        axes.plot(places, values, marker="o", label=_label(name), **_style(number))
    axes.set(xlabel="step", ylabel=f"{score}, percent")
    _legend_of_several(axes, runs)
    return html_page.plot(figure, f"{score} over the steps")


def _legend_of_several(axes: Axes, runs: Mapping[str, object]) -> None:
    if len(runs) > 1:
        axes.legend()


def scores_and_zero_shot(lines: Lines, before: Sequence[Mapping[str, float]]) -> str:
    """Returns a plot of Recall@1 and MAP@R over the steps, and of the score of doing nothing."""
    figure, axes = _figure()
    for name in ("recall@1", "map@r"):
        found = [line for line in evaluations(lines) if name in line]
        values = [100 * line[name] for line in found]
        axes.plot([line["step"] for line in found], values, marker="o", label=name)
    for scores in before:
        name = "zero_shot recall@1"
        axes.axhline(100 * scores["recall@1"], color="black", linestyle="--", label=name)
    axes.set(xlabel="step", ylabel="percent")
    axes.legend()
    return html_page.plot(figure, "scores over the steps")


def interval_chart(
    groups: Mapping[str, Mapping[str, metrics.Interval]], alt: str, *, difference: bool = False
) -> str:
    """Returns a chart of values with their intervals, a line for each.

    Args:
      groups: {name of a colour: {name of a line: interval}}.
      alt: what the chart shows, its title.
      difference: whether the values are differences, so that 0 is marked.
    """
    names = list(dict.fromkeys(name for found in groups.values() for name in found))
    figure, axes = _figure((_SIZE[0], 0.8 + 0.2 * len(names) * len(groups)))
    axes.grid(visible=False, axis="y")
    for number, (group, found) in enumerate(groups.items()):
        shift = (number - (len(groups) - 1) / 2) * 0.5 / len(groups)
        places = [names.index(name) + shift for name in found]
        values, low, high = (100 * np.array(list(found.values()))[:, :3]).T
        axes.errorbar(
            values, places, xerr=[values - low, high - values], fmt="o", capsize=3, label=group
        )
    axes.set_yticks(range(len(names)), [_label(name, 24) for name in names])
    axes.set(xlabel="points of percent" if difference else "percent", ylim=(len(names) - 0.5, -0.5))
    if difference:
        axes.axvline(0, color="black", linewidth=0.8)
    if len(groups) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(groups), frameon=False)
    return html_page.plot(figure, alt, alt)


def _draw_pairs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (2, P) rows of pairs of one class, and of two classes, drawn by chance."""
    rng = np.random.default_rng(0)
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    chances = sizes.astype(float) * (sizes - 1)  # every pair is as likely as any other
    classes = rng.choice(len(sizes), _PAIRS, p=chances / chances.sum())
    first = rng.integers(0, sizes[classes])
    second = (first + rng.integers(1, sizes[classes])) % sizes[classes]
    positives = order[starts[classes] + np.stack([first, second])]
    others = rng.integers(0, len(labels), (2, _PAIRS))
    return positives, others[:, labels[others[0]] != labels[others[1]]]


def distances(embeddings: np.ndarray, labels: np.ndarray, loss: LossOptions) -> str:
    """Returns histograms of the distances of pairs of one class and of two."""
    figure, axes = _figure()
    positives, negatives = _draw_pairs(labels)
    for pairs, name, colour in (
        (positives, "same class", html_page.GREEN),
        (negatives, "other classes", html_page.RED),
    ):
        if not pairs.shape[1]:  # a single class has no negatives
            continue
        similarity = np.einsum("nd,nd->n", embeddings[pairs[0]], embeddings[pairs[1]])
        distance = np.sqrt(np.maximum(2 - 2 * similarity, 0))
        density, edges = np.histogram(distance, bins=np.linspace(0, 2, 81), density=True)
        axes.stairs(density, edges, fill=True, alpha=0.6, label=name, color=colour)
    for boundary, name, style in (
        (loss.alpha, "alpha", "-"),
        (loss.alpha - loss.margin, "alpha - margin", "--"),
    ):
        axes.axvline(boundary, color="black", linestyle=style, label=name, linewidth=1)
    axes.set(xlabel="distance of a pair", ylabel="density", xlim=(0, 2))
    axes.legend()
    return html_page.plot(figure, "distances of pairs of images")


def first_ranks(runs: Mapping[str, ByQuery | None]) -> str:
    """Returns the shares of queries of runs whose first match is within a rank; None: no run."""
    figure, axes = _figure()
    for number, (name, by_query) in enumerate(runs.items()):
        if by_query is None:
            continue
        ranks, counts = np.unique(by_query["first_rank"], return_counts=True)
        share = 100 * np.cumsum(counts) / counts.sum()
        axes.step(ranks, share, where="post", label=_label(name), **_style(number))
    axes.set(
        xlabel="rank of the nearest of the query's class, at most",
        ylabel="percent of queries",
        xscale="log",
        ylim=(0, 101),
    )
    _legend_of_several(axes, runs)
    return html_page.plot(figure, "first ranks of the queries")
