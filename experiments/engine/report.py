"""report.html: a run's scores, curves, distances and retrieved images in one file."""

from collections.abc import Mapping
import html
import pathlib

import numpy as np

from experiments.engine import (
    html_page,
    options,
    query_scores,
    report_images,
    report_plots,
    scoring,
    zero_shot,
)
from experiments.engine.config import Config
from experiments.engine.query_scores import QueryScores
from experiments.engine.report_plots import Lines
from experiments.engine.scoring import ScoreTable
from rll_jax import metrics
from rll_jax.data.image_dataset import EncodedImageDataset

_INTERVALS = (
    "Under each score, and in parentheses: the 95 % interval, by drawing other test classes of the "
    "same kind (not other training runs)."
)
_ZERO_SHOT = (
    " zero_shot: the pooled features of the backbone itself before the first step. The difference "
    "is paired by query."
)


def write(
    path: pathlib.Path,
    *,
    title: str,
    lines: Lines,
    config: Config,
    test: EncodedImageDataset,
    embeddings: np.ndarray,
    table: ScoreTable,
    scores: QueryScores,
    gain: zero_shot.Gain | None = None,
) -> None:
    """Writes the page.

    Args:
      path: the file.
      title: the title.
      lines: the lines of metrics.jsonl.
      config: the run's options.
      test: the test images.
      embeddings: (N, D) their embeddings.
      table: the scores of the levels, `scoring.make_table`.
      scores: the scores of each query by these embeddings.
      gain: what training brought beyond the backbone's own features, or None.
    """
    intervals = query_scores.intervals(scores, config.data.entry.ks)
    plots = report_plots
    before = zero_shot.logged(lines)
    body = [
        f"<header><h1>{html.escape(title)}</h1>\n",
        html_page.paragraph(_about(config, test), "lead"),
        "</header>",
        _at_a_glance(table, intervals, gain),
        _scores(test, lines, table),
        html_page.section(
            "Curves",
            html_page.plots(
                plots.loss_curves({"": lines}), plots.scores_and_zero_shot(lines, before)
            ),
        ),
        html_page.section(
            "Distances and ranks",
            html_page.plots(
                plots.distances(embeddings, test.labels, config.loss),
                plots.first_ranks({"": scores.by_query}),
            ),
        ),
        html_page.section(
            "Nearest images",
            f"<p>A query, then the {report_images.NEIGHBOURS} images nearest to it, with their "
            'class and their cosine similarity: <b class="green">\N{CHECK MARK} green</b> of its '
            'class, <b class="red">\N{BALLOT X} red</b> of another. Queries are the worst, '
            "typical and best by their average precision. A click enlarges an image.</p>\n",
            report_images.grid(test, embeddings, scores.by_query),
        ),
        html_page.section(
            "Map",
            html_page.paragraph(
                "Test images of classes drawn by chance, where t-SNE puts their embeddings."
            ),
            report_images.embedding_map(test, embeddings),
        ),
        html_page.section(
            "Options",
            html_page.details(
                "The flagfile that repeats the run",
                html_page.preformatted(config.as_flagfile()),
            ),
        ),
    ]
    html_page.write(path, title, "".join(body))


def _about(config: Config, test: EncodedImageDataset) -> str:
    network, schedule = config.network, config.schedule
    return (
        f"{len(test)} test images of {len(np.unique(test.labels))} classes never trained on. "
        f"Dataset {config.data.dataset}, {network.backbone} at {config.data.image_size} px, "
        f"searched at {config.data.searched_size} px, levels {options.to_text(network.levels)} of "
        f"{network.embedding_dim} dimensions, loss {config.loss.loss}, {schedule.steps} steps."
    )


def _at_a_glance(
    table: ScoreTable, intervals: Mapping[str, metrics.Interval], gain: zero_shot.Gain | None
) -> str:
    """Returns the scores of all levels with their intervals, and what training brought."""
    final = list(table.values())[-1]
    cards = []
    for name in scoring.score_names(table):
        found = intervals.get(name)
        between = "" if found is None else f"{100 * found.low:.1f} to {100 * found.high:.1f}"
        cards.append((name, f"{100 * final[name]:.1f}", between))
    parts = [html_page.cards(cards)]
    if gain is not None:
        parts.insert(0, html_page.answer(zero_shot.in_a_line(gain)))
    if not intervals:
        return "".join(parts)
    columns = {"trained": intervals}
    if gain is not None:
        columns["zero_shot"] = gain.zero_shot
        parts.append(report_plots.interval_chart(columns, "Scores with their 95 % intervals"))
        columns["difference"] = gain.difference
        rows = [
            [name, *(_cell(found, name, title) for title, found in columns.items())]
            for name in intervals
        ]
        parts.append(
            html_page.table(["score", *columns], rows, "All levels, in percent, with intervals")
        )
    parts.append(html_page.paragraph(_INTERVALS + (_ZERO_SHOT if gain else ""), "note"))
    return "".join(parts)


def _cell(found: Mapping[str, metrics.Interval], name: str, title: str) -> str:
    if name not in found:
        return ""
    return query_scores.in_percent(found[name], sign=title == "difference")


def _scores(test: EncodedImageDataset, lines: Lines, table: ScoreTable) -> str:
    names = scoring.score_names(table)

    def in_percent(scores: Mapping[str, float]) -> list[str]:
        return [f"{100 * scores[name]:.1f}" if name in scores else "" for name in names]

    by_step = [["zero_shot", *in_percent(found)] for found in zero_shot.logged(lines)]
    by_step += [[line["step"], *in_percent(line)] for line in report_plots.evaluations(lines)]
    by_level = [[level, *in_percent(scores)] for level, scores in table.items()]
    alone = int(list(table.values())[-1]["queries_without_match"])
    without = f"{alone} queries have no image of their class to find."
    return html_page.section(
        "Scores",
        html_page.paragraph(f"In percent. {without}" if alone else "In percent."),
        html_page.table(["levels", *names], by_level, "At the end, by levels of the network"),
        html_page.table(["step", *names], by_step, "All levels, over the steps"),
    )
