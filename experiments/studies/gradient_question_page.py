"""The table and the plot of `experiments.studies.gradient_question`."""

from collections.abc import Mapping, Sequence
import os
from typing import Any, TypedDict

from experiments.engine import measuring

NAMES = ("gradient_question.md", "gradient_question.json", "gradient_question.png")
_RUN_MARKERS = "*PXD"
_EXPLANATION = """\
The table has the percentage of the active negatives that a descent step with differentiated weights
pulls nearer to the query. A negative is active in the list of a query if it is nearer than alpha.
In brackets: the percentage that these pairs have in the gradient of the active negatives, the sum
of |dL_i / dd_ij|.

- Effective dimension: participation ratio of the covariance's eigenvalues, of all batches together
  or of all test embeddings of a run.
- Length of the mean: norm of the mean of the same embeddings.
- Active: the percentage of all negatives that is active.
- Both lists: the percentage pulled nearer where both ends of a pair move, so that the slopes of
  (i, j) and (j, i) are added.
- Published: the percentage pulled nearer with constant weights, the largest at any T.

A run need not lie on the simulated curve. Its embeddings may lie to one side of 0 (length of the
mean), and then more negatives are active.
"""


class Shares(TypedDict):
    """Shares of one kind of embeddings at one temperature, in percent, means over batches.

    Attributes:
      pairs: of the active negatives of all lists, those that are pulled nearer.
      norm: the part of these pairs in the sum of |slope| over the active negatives.
      both_lists: as `pairs`, where both ends move, so that the slopes of (i, j) and (j, i) add up.
      active: of all negatives, the active ones.
      std: the standard deviation of `pairs` over the batches.
    """

    pairs: float
    norm: float
    both_lists: float
    active: float
    std: float


class Row(TypedDict):
    """The measurements of one kind of embeddings.

    Attributes:
      title: what the embeddings are.
      effective_dimension: the participation ratio of the covariance's eigenvalues.
      mean_length: the norm of the mean embedding.
      differentiated: shares with differentiated weights, by the temperature as text.
      published: shares with constant weights, by the temperature as text.
    """

    title: str
    effective_dimension: float
    mean_length: float
    differentiated: dict[str, Shares]
    published: dict[str, Shares]


def heading(about: Mapping[str, Any]) -> str:
    """Returns the paragraphs before the table: the command, the embeddings, date and machine."""
    return (
        f"    {about['command']}\n\n"
        f"{about['batches']} batches of {about['classes']} x {about['images_per_class']}, "
        f"alpha {about['alpha']:g}. Simulated embeddings have {about['embedding_dim']} dimensions. "
        "Their class centres are normal in as many random directions as the rank says; the "
        f"examples lie about their centre, {about['spread']:g} times as wide.\n\n"
        f"{about['date']}, {about['hardware']}, commit {about['commit']}.\n"
    )


def as_markdown(rows: Sequence[Row], temperatures: Sequence[float], about: str) -> str:
    """Returns the page with the table.

    Args:
      rows: the simulated embeddings and the runs.
      temperatures: the values of T_n that each row has.
      about: the paragraphs before the table, see `heading`.
    """
    names = [f"{t:g}" for t in temperatures]
    usual = min(names, key=lambda name: abs(float(name) - 10))  # the paper's T_n is 10
    head = ["embeddings", "effective dimension", "length of the mean", "active"]
    head += [f"T = {name}" for name in names]
    head += [f"both lists, T = {usual}", "published, all T"]
    table: list[list[str]] = []
    for row in rows:
        moved = row["differentiated"]
        published = max(shares["pairs"] for shares in row["published"].values())
        cells = [row["title"], f"{row['effective_dimension']:.1f}", f"{row['mean_length']:.2f}"]
        cells.append(f"{moved[usual]['active']:.0f}")
        cells += [f"{moved[name]['pairs']:.1f} ({moved[name]['norm']:.1f})" for name in names]
        cells += [f"{moved[usual]['both_lists']:.1f}", f"{published:.1f}"]
        table.append(cells)
    parts = ["# Which way the gradient moves negative pairs\n", about, _EXPLANATION]
    return "\n".join([*parts, measuring.markdown_table(head, table)]) + "\n"


def plot(
    simulations: Sequence[Row],
    runs: Sequence[Row],
    temperatures: Sequence[float],
    path: str | os.PathLike,
) -> None:
    """Draws the percentages against the effective dimension and writes a PNG file.

    Args:
      simulations: the rows that are drawn as curves.
      runs: the rows that are drawn as single markers.
      temperatures: the values of T_n that each row has, a colour each.
      path: the file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots()
    marks = [_RUN_MARKERS[number % len(_RUN_MARKERS)] for number in range(len(runs))]
    dimensions = [row["effective_dimension"] for row in simulations]
    for number, name in enumerate(f"{t:g}" for t in temperatures):
        colour = f"C{number}"
        curve = [row["differentiated"][name] for row in simulations]
        axes.errorbar(
            dimensions,
            [shares["pairs"] for shares in curve],
            [shares["std"] for shares in curve],
            fmt="o-",
            capsize=3,
            color=colour,
            label=f"T = {name}",
        )
        for row, mark in zip(runs, marks, strict=True):
            percent = row["differentiated"][name]["pairs"]
            style = {"ms": 12, "mec": "black", "color": colour, "zorder": 3}
            axes.plot(row["effective_dimension"], percent, mark, **style)
    published = [max(s["pairs"] for s in row["published"].values()) for row in simulations]
    label = "published gradient, all T"
    axes.plot(dimensions, published, "--", color="black", zorder=4, label=label)
    for row, mark in zip(runs, marks, strict=True):  # one line of the legend for each run
        label = row["title"].replace(", level", ",\nlevel")
        axes.plot([], [], mark, ms=12, mec="black", mfc="none", linestyle="none", label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="effective dimension of the embeddings",
        ylabel="active negatives pulled nearer, percent",
        ylim=(-3, 103),
    )
    axes.grid(alpha=0.3)
    figure.legend(
        frameon=False,
        loc="outside right upper",
        title="weights differentiated, but for the dashed line",
    )
    figure.savefig(path, format="png", dpi=110)
