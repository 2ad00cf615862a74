"""report.html: a run's curves, scores, distances and retrieved images in one file."""

from collections.abc import Mapping, Sequence
import html
import pathlib
from typing import Any
import warnings

from matplotlib.figure import Figure
import numpy as np
from PIL import Image
from sklearn.manifold import TSNE
import threadpoolctl

from experiments.engine import html_page, query_scores, scoring, zero_shot
from experiments.engine.config import Config
from experiments.engine.losses import LossOptions
from experiments.engine.query_scores import QueryScores
from experiments.engine.scoring import ByQuery, ScoreTable
from rll_jax import metrics
from rll_jax.data import files
from rll_jax.data.image_dataset import EncodedImageDataset

_QUERIES = {"Worst": 6, "Typical": 8, "Best": 6}  # queries shown of each kind
_NEIGHBOURS = 8
_PAIRS = 100_000  # pairs drawn for each histogram
_ZERO_SHOT = """
zero_shot: the pooled features of the backbone itself before the first step. The difference is
paired by query."""
_MAP_IMAGES, _MAP_SIDE, _MAP_THUMBNAIL = 1000, 1400, 32


def write(
    path: pathlib.Path,
    *,
    title: str,
    lines: list[dict[str, Any]],
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
    by_query = scores.by_query
    curves = html_page.plot(_curves(lines), "loss and scores over the steps")
    distances = html_page.plot(
        _distances(embeddings, test.labels, config.loss, by_query),
        "distances of pairs, first ranks",
    )
    intervals = query_scores.intervals(scores, config.data.entry.ks)
    body = f"""<h1>{html.escape(title)}</h1>
{_at_a_glance(gain)}
{_scores(test, lines, table, intervals, gain)}
<h2>Curves</h2>{curves}
<h2>Distances and ranks</h2>{distances}
<h2>Nearest images</h2>
<p>A query, then the {_NEIGHBOURS} images nearest to it: <b style="color:#2a2">green</b> of its
class, <b style="color:#d33">red</b> of another. Queries are the worst, typical and best by their
average precision.</p>
{_grid(test, embeddings, by_query)}
<h2>Map</h2><p>Test images of classes drawn by chance, where t-SNE puts their embeddings.</p>
{html_page.photograph(_map(test, embeddings), "map of the test embeddings")}
<h2>Options</h2><pre>{html.escape(config.as_flagfile())}</pre>"""
    with files.atomic_write(path) as temporary:
        text = html_page.page(title, body)
        temporary.write_text(text, encoding="utf-8", errors="replace")


def _at_a_glance(gain: zero_shot.Gain | None) -> str:
    if gain is None:
        return ""
    return f"<p><strong>{html.escape(zero_shot.in_a_line(gain))}</strong></p>"


def _interval_table(intervals: Mapping[str, metrics.Interval], gain: zero_shot.Gain | None) -> str:
    columns = {"": intervals}
    if gain is not None:
        columns |= {"zero_shot": gain.zero_shot, "difference": gain.difference}
    head, rows = ["score"], [[name] for name in intervals]
    for title, found in columns.items():
        head += [title or "percent", "from", "to"]
        sign = "+" if title == "difference" else ""
        for row, name in zip(rows, intervals, strict=True):
            numbers = found.get(name, ())
            row += [f"{100 * number:{sign}.1f}" for number in numbers] or [""] * 3
    return html_page.table(head, rows)


def _scores(
    test: EncodedImageDataset,
    lines: Sequence[Mapping[str, Any]],
    table: ScoreTable,
    intervals: Mapping[str, metrics.Interval],
    gain: zero_shot.Gain | None,
) -> str:
    names = scoring.score_names(table)

    def in_percent(scores: Mapping[str, float]) -> list[str]:
        return [f"{100 * scores[name]:.1f}" for name in names]

    by_step = [["zero_shot", *in_percent(found)] for found in zero_shot.logged(lines)]
    by_step += [[line["step"], *in_percent(line)] for line in _evaluations(lines)]
    by_level = [[level, *in_percent(scores)] for level, scores in table.items()]
    alone = int(list(table.values())[-1]["queries_without_match"])
    return f"""<h2>Scores</h2><p>{len(test)} test images of {len(np.unique(test.labels))} classes,
in percent; {alone} queries have no image of their class to find.</p>
<p>At the end, with all levels. From and to: the 95 % interval, by drawing other classes of the same
kind (not other training runs).{_ZERO_SHOT if gain else ""}</p>
{_interval_table(intervals, gain)}
<p>Over the steps:</p>
{html_page.table(["step", *names], by_step)}
<p>At the end, by levels of the network:</p>
{html_page.table(["levels", *names], by_level)}"""


def _evaluations(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in lines if "recall@1" in line]


def _curves(lines: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line for line in lines if "loss" in line]
    left.plot([line["step"] for line in steps], [line["loss"] for line in steps])
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    for name in ("recall@1", "map@r"):
        points = [(line["step"], 100 * line[name]) for line in _evaluations(lines)]
        right.plot(*zip(*points, strict=True), marker="o", label=name)
    for found in zero_shot.logged(lines):
        name = "zero_shot recall@1"
        right.axhline(100 * found["recall@1"], color="black", linestyle="--", label=name)
    right.set(xlabel="step", ylabel="percent")
    right.legend()
    return figure


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


def _distances(
    embeddings: np.ndarray,
    labels: np.ndarray,
    loss: LossOptions,
    by_query: ByQuery,
) -> Figure:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    positives, negatives = _draw_pairs(labels)
    for pairs, name, colour in (
        (positives, "same class", "tab:green"),
        (negatives, "other classes", "tab:red"),
    ):
        if not pairs.shape[1]:  # a single class has no negatives
            continue
        similarity = np.einsum("nd,nd->n", embeddings[pairs[0]], embeddings[pairs[1]])
        distance = np.sqrt(np.maximum(2 - 2 * similarity, 0))
        bins = np.linspace(0, 2, 81)
        left.hist(distance, bins=bins, density=True, alpha=0.6, label=name, color=colour)
    for boundary, name, style in (
        (loss.alpha, "alpha", "-"),
        (loss.alpha - loss.margin, "alpha - margin", "--"),
    ):
        left.axvline(boundary, color="black", linestyle=style, label=name)
    left.set(xlabel="distance of a pair", ylabel="density", xlim=(0, 2))
    left.legend()
    ranks = np.sort(by_query["first_rank"])
    right.step(ranks, 100 * np.arange(1, len(ranks) + 1) / len(ranks), where="post")
    right.set(
        xlabel="rank of the nearest of the query's class, at most",
        ylabel="percent of queries",
        xscale="log",
        ylim=(0, 101),
    )
    right.grid(alpha=0.3)
    return figure


def _grid(test: EncodedImageDataset, embeddings: np.ndarray, by_query: ByQuery) -> str:
    """Returns rows of a query and its nearest images, for the worst, typical and best queries."""
    query_rows, gallery_rows = test.query_rows, test.gallery_rows
    jitter = np.random.default_rng(0).random(len(by_query["query"]))  # orders equals by chance
    keys = (jitter, -by_query["first_rank"], by_query["average_precision"])
    order = by_query["query"][np.lexsort(keys)]
    parts = []
    for kind, number in _QUERIES.items():
        first = {
            "Worst": 0,
            "Typical": max(0, (len(order) - number) // 2),
            "Best": max(0, len(order) - number),
        }[kind]
        queries = query_rows[order[first : first + number]]
        itself = queries if test.in_gallery is None else None
        k = min(_NEIGHBOURS, len(gallery_rows) - (itself is not None))
        groups = {}
        numbers = test.groups
        if numbers is None and test.is_query is not None:
            numbers = np.arange(len(test))  # a query that is in the gallery does not find itself
        if numbers is not None:
            groups = {
                "query_groups": numbers[queries],
                "gallery_groups": numbers[gallery_rows],
            }
        nearest, similarity = metrics.nearest(
            embeddings[queries], embeddings[gallery_rows], k, leave_out=itself, **groups
        )
        parts.append(f"<h3>{kind}</h3>")
        for query, rows, values in zip(queries, gallery_rows[nearest], similarity, strict=True):
            parts.append(_query_row(test, query, rows[np.isfinite(values)]))
    return "".join(parts)


def _query_row(test: EncodedImageDataset, query: int, nearest: np.ndarray) -> str:
    cells = [html_page.thumbnail(test.decoded_image(query), str(test.paths[query]), "query")]
    for row in nearest:
        kind = "right" if test.labels[row] == test.labels[query] else "wrong"
        cells.append(html_page.thumbnail(test.decoded_image(row), str(test.paths[row]), kind))
    return html_page.image_row(cells)


def _map(test: EncodedImageDataset, embeddings: np.ndarray) -> Image.Image:
    rows = _map_rows(test.labels)
    places = _places(embeddings[rows])
    low, high = places.min(axis=0), places.max(axis=0)
    places = (places - low) / np.maximum(high - low, 1e-9) * (_MAP_SIDE - _MAP_THUMBNAIL)
    canvas = Image.new("RGB", (_MAP_SIDE, _MAP_SIDE), (255, 255, 255))
    for row, (x, y) in zip(rows, places, strict=True):
        image = test.decoded_image(row)
        image.thumbnail((_MAP_THUMBNAIL, _MAP_THUMBNAIL), Image.Resampling.LANCZOS)
        canvas.paste(image, (int(x), int(y)))
    return canvas


def _map_rows(labels: np.ndarray) -> np.ndarray:
    """Returns the rows of some classes drawn by chance."""
    classes, counts = np.unique(labels, return_counts=True)
    order = np.random.default_rng(0).permutation(len(classes))
    number = 1 + np.searchsorted(np.cumsum(counts[order]), _MAP_IMAGES)
    rows = np.flatnonzero(np.isin(labels, classes[order[:number]]))
    return np.random.default_rng(0).permutation(rows)[:_MAP_IMAGES]


def _places(embeddings: np.ndarray) -> np.ndarray:
    """Returns (N, 2) places by t-SNE."""
    # One thread is 40 times as fast as two on a machine of two cores. The warnings are of
    # embeddings that are all equal.
    with warnings.catch_warnings(), threadpoolctl.threadpool_limits(1):
        warnings.simplefilter("ignore")
        tsne = TSNE(
            perplexity=min(30, (len(embeddings) - 1) / 3),
            init="pca" if min(embeddings.shape) > 1 else "random",
            max_iter=500,
            random_state=0,
        )
        return tsne.fit_transform(embeddings)
