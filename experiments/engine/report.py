"""report.html: a run's curves, scores, distances and retrieved pictures in one file that fetches nothing."""

import html
import pathlib
import warnings

from matplotlib.figure import Figure
import numpy as np
from PIL import Image
from sklearn.manifold import TSNE
import threadpoolctl

from experiments.engine import config as config_lib
from experiments.engine import html_page, scoring
from rll_jax import metrics
from rll_jax.training import embedding

_KINDS = {"Worst": 6, "Typical": 8, "Best": 6}  # queries shown of each
_NEIGHBOURS = 8
_PAIRS = 100_000  # drawn for each histogram
_MAP_IMAGES, _MAP_SIDE, _MAP_THUMBNAIL = 1000, 1400, 32


def write(
    path: pathlib.Path,
    *,
    title: str,
    lines: list[dict],
    config,
    test,
    embeddings: np.ndarray,
    table: dict,
) -> None:
    """Writes the page.

    Args:
      lines: of metrics.jsonl.
      config: the run's options.
      test: the `datasets.EncodedImageDataset` that `embeddings` (N, D) are of.
      table: `scoring.score_table` of the levels.
    """
    evaluations = [line for line in lines if "recall@1" in line]
    names = scoring.columns(table)
    over_steps = [
        [line["step"], *(f"{100 * line[name]:.1f}" for name in names)] for line in evaluations
    ]
    of_levels = [
        [level, *(f"{100 * row[name]:.1f}" for name in names)] for level, row in table.items()
    ]
    each = metrics.scores_by_query(*embedding.queries_and_gallery(embeddings, test))
    body = f"""<h1>{html.escape(title)}</h1>
<h2>Scores</h2><p>{len(test)} test images of {len(np.unique(test.labels))} classes, in percent; {len(each["query"])} of the
images have another of their class to find.</p>
{html_page.table(["step", *names], over_steps)}
<p>At the end, by levels of the network:</p>
{html_page.table(["levels", *names], of_levels)}
<h2>Curves</h2>{html_page.plot(_curves(lines, evaluations), "loss and scores over the steps")}
<h2>Distances and ranks</h2>{html_page.plot(_distances(embeddings, test.labels, config, each), "distances of pairs, first ranks")}
<h2>Nearest images</h2>
<p>A query, then the {_NEIGHBOURS} images nearest to it: <b style="color:#2a2">green</b> of its class,
<b style="color:#d33">red</b> of another. Queries are the worst, typical and best by their average precision.</p>
{_grid(test, embeddings, each)}
<h2>Map</h2><p>Test images of classes drawn by chance, where t-SNE puts their embeddings.</p>
{html_page.photograph(_map(test, embeddings), "map of the test embeddings")}
<h2>Options</h2><pre>{html.escape(config.as_flagfile())}</pre>"""
    with config_lib.written_whole(path) as aside:
        aside.write_text(html_page.whole(title, body), encoding="utf-8", errors="replace")


def _curves(lines, evaluations) -> Figure:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [line for line in lines if "loss" in line]
    left.plot([line["step"] for line in steps], [line["loss"] for line in steps])
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    for name in ("recall@1", "map@r"):
        points = [(line["step"], 100 * line[name]) for line in evaluations]
        right.plot(*zip(*points), marker="o", label=name)
    right.set(xlabel="step", ylabel="percent")
    right.legend()
    return figure


def _pairs(labels) -> tuple[np.ndarray, np.ndarray]:
    """(2, P) rows of the same class, and of two classes, drawn by chance."""
    rng = np.random.default_rng(0)
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    chances = sizes.astype(float) * (sizes - 1)  # each pair alike
    classes = rng.choice(len(sizes), _PAIRS, p=chances / chances.sum())
    first = rng.integers(0, sizes[classes])
    second = (first + rng.integers(1, sizes[classes])) % sizes[classes]
    positives = order[starts[classes] + np.stack([first, second])]
    others = rng.integers(0, len(labels), (2, _PAIRS))
    return positives, others[:, labels[others[0]] != labels[others[1]]]


def _distances(embeddings, labels, config, each) -> Figure:
    positives, negatives = _pairs(labels)
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (a, b), name, colour in (
        (positives, "same class", "tab:green"),
        (negatives, "other classes", "tab:red"),
    ):
        if not len(a):  # a single class
            continue
        distance = np.sqrt(
            np.maximum(2 - 2 * np.einsum("nd,nd->n", embeddings[a], embeddings[b]), 0)
        )
        left.hist(
            distance, bins=np.linspace(0, 2, 81), density=True, alpha=0.6, label=name, color=colour
        )
    for at, name, style in (
        (config.alpha, "alpha", "-"),
        (config.alpha - config.margin, "alpha - margin", "--"),
    ):
        left.axvline(at, color="black", linestyle=style, label=name)
    left.set(xlabel="distance of a pair", ylabel="density", xlim=(0, 2))
    left.legend()
    ranks = np.sort(each["first_rank"])
    right.step(ranks, 100 * np.arange(1, len(ranks) + 1) / len(ranks), where="post")
    right.set(
        xlabel="rank of the nearest of the query's class, at most",
        ylabel="percent of queries",
        xscale="log",
        ylim=(0, 101),
    )
    right.grid(alpha=0.3)
    return figure


def _grid(test, embeddings, each) -> str:
    rows_of = lambda role: (
        np.arange(len(test)) if test.in_gallery is None else np.flatnonzero(test.in_gallery == role)
    )
    query_rows, gallery_rows = rows_of(False), rows_of(True)
    jitter = np.random.default_rng(0).random(len(each["query"]))  # among equals, by chance
    order = each["query"][np.lexsort((jitter, -each["first_rank"], each["average_precision"]))]
    parts = []
    for kind, number in _KINDS.items():
        first = {
            "Worst": 0,
            "Typical": max(0, (len(order) - number) // 2),
            "Best": max(0, len(order) - number),
        }[kind]
        parts.append(f"<h3>{kind}</h3>")
        queries = query_rows[order[first : first + number]]
        itself = queries if test.in_gallery is None else None
        k = min(_NEIGHBOURS, len(gallery_rows) - (itself is not None))
        near_rows, _ = metrics.nearest(
            embeddings[queries], embeddings[gallery_rows], k, leave_out=itself
        )
        for query, near in zip(queries, gallery_rows[near_rows]):
            cells = [html_page.picture(test.decoded_image(query), str(test.paths[query]), "query")]
            for row in near:
                kind_of_row = "right" if test.labels[row] == test.labels[query] else "wrong"
                cells.append(
                    html_page.picture(test.decoded_image(row), str(test.paths[row]), kind_of_row)
                )
            parts.append(html_page.row(cells))
    return "".join(parts)


def _map(test, embeddings) -> Image.Image:
    classes, counts = np.unique(test.labels, return_counts=True)
    order = np.random.default_rng(0).permutation(len(classes))
    chosen = classes[order[: 1 + np.searchsorted(np.cumsum(counts[order]), _MAP_IMAGES)]]
    rows = np.random.default_rng(0).permutation(np.flatnonzero(np.isin(test.labels, chosen)))[
        :_MAP_IMAGES
    ]
    # one thread: 40 times as fast as two on a machine of two cores; warnings: of embeddings that are all equal
    with warnings.catch_warnings(), threadpoolctl.threadpool_limits(1):
        warnings.simplefilter("ignore")
        init = "pca" if min(embeddings[rows].shape) > 1 else "random"
        tsne = TSNE(
            perplexity=min(30, (len(rows) - 1) / 3), init=init, max_iter=500, random_state=0
        )
        places = tsne.fit_transform(embeddings[rows])
    low, high = places.min(axis=0), places.max(axis=0)
    places = (places - low) / np.maximum(high - low, 1e-9) * (_MAP_SIDE - _MAP_THUMBNAIL)
    canvas = Image.new("RGB", (_MAP_SIDE, _MAP_SIDE), (255, 255, 255))
    for row, (x, y) in zip(rows, places):
        image = test.decoded_image(row)
        image.thumbnail((_MAP_THUMBNAIL, _MAP_THUMBNAIL), Image.Resampling.LANCZOS)
        canvas.paste(image, (int(x), int(y)))
    return canvas
