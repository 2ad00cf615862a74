"""The scores of a dataset's embeddings, level by level, and the images that could be embedded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import sys

import numpy as np
import tqdm

from experiments.engine import processes
from rll_jax import metrics
from rll_jax.data.image_dataset import EncodedImageDataset
from rll_jax.networks import embedding_net
from rll_jax.training import embedding

ScoreTable = dict[str, dict[str, float]]  # {levels: {score: value}}
ByQuery = dict[str, np.ndarray]  # what `metrics.scores_by_query` returns
Progress = Callable[[str, int, int], None]

_BAR_AFTER = 3.0  # seconds of a stage before it gets a progress bar


def score_levels(
    levels: Mapping[str, np.ndarray],
    data: EncodedImageDataset,
    ks: Sequence[int],
    *,
    only_all: bool = False,
    on_progress: Callable[[], None] | None = None,
) -> dict[str, ByQuery]:
    """Scores each query by each level, each pair and the concatenation, in one pass.

    Args:
      levels: {level: (N, D)} embeddings of the dataset, or the pooled features under
        `embedding_net.POOLED`.
      data: the dataset.
      ks: the K of Recall@K.
      only_all: score the concatenation of all levels alone.
      on_progress: called about twice a second.

    Returns:
      {"L": {"first_rank": ..., ...}, "L,M": ..., ...}, the concatenation of all levels last.
    """
    names = (*embedding_net.LEVELS, embedding_net.POOLED)
    ordered = [level for level in names if level in levels]
    rows = {level: embedding.queries_and_gallery(levels[level], data) for level in ordered}
    labels, *gallery_labels = rows[ordered[0]][1::2]
    gallery = {level: rows[level][2] for level in ordered} if gallery_labels else None
    with _progress_bar(on_progress) as progress:
        return metrics.level_scores_by_query(
            {level: rows[level][0] for level in ordered},
            labels,
            gallery,
            gallery_labels[0] if gallery_labels else None,
            combinations=[ordered] if only_all else None,
            ks=ks,
            progress=progress,
            **embedding.left_out(data),
        )


@contextlib.contextmanager
def _progress_bar(on_progress: Callable[[], None] | None) -> Iterator[Progress]:
    """Yields what draws a bar for each stage that takes long."""
    bar: tqdm.tqdm | None = None

    def progress(what: str, done: int, total: int) -> None:
        nonlocal bar
        if on_progress is not None:
            on_progress()
        if bar is None or bar.desc != f"scoring: {what}":
            if bar is not None:
                bar.close()
            bar = tqdm.tqdm(
                desc=f"scoring: {what}",
                total=total,
                delay=_BAR_AFTER,
                leave=False,
                mininterval=0.5 if sys.stderr.isatty() else 10,
                disable=not processes.is_first(),
            )
            bar.desc = f"scoring: {what}"
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def make_table(
    by_query: Mapping[str, ByQuery], data: EncodedImageDataset, ks: Sequence[int]
) -> ScoreTable:
    """Returns the scores of the levels that `score_levels` scored."""
    num_queries = len(data.query_rows)
    return {name: metrics.mean_scores(part, num_queries, ks=ks) for name, part in by_query.items()}


def add_clustering(
    table: ScoreTable, levels: Mapping[str, np.ndarray], data: EncodedImageDataset
) -> None:
    """Adds the scores of K-means to a table."""
    combined = embedding.combinations(levels)
    with tqdm.tqdm(combined.items(), "K-means", delay=_BAR_AFTER, leave=False) as bar:
        for name, embeddings in bar:
            table[name] |= metrics.clustering_metrics(embeddings, data.labels)


def query_classes(by_query: ByQuery, data: EncodedImageDataset) -> np.ndarray:
    """Returns the class of each scored query."""
    return data.labels[data.query_rows[by_query["query"]]]


def embed_readable(
    embed: Callable[..., dict[str, np.ndarray]],
    data: EncodedImageDataset,
    on_bad: Callable[[int], None],
) -> tuple[EncodedImageDataset, dict[str, np.ndarray]]:
    """Embeds the images that can be read.

    Args:
      embed: called as embed(on_bad=...), returns {level: (N, D)} of the dataset.
      data: the dataset.
      on_bad: called with the row of each image that cannot be read.

    Returns:
      The dataset of the readable images, and their embeddings by level.

    Raises:
      ValueError: no image can be read.
    """
    bad = set()

    def note(row: int) -> None:
        bad.add(row)
        on_bad(row)

    levels = embed(on_bad=note)
    rows = np.setdiff1d(np.arange(len(data)), list(bad))
    if not len(rows):
        raise ValueError("none of the test images can be read")
    return data.take(rows), {level: embeddings[rows] for level, embeddings in levels.items()}


def score_names(table: ScoreTable) -> list[str]:
    """Returns the names of the scores that are shares, in order."""
    scores = next(iter(table.values()))
    return [name for name in scores if name != "queries_without_match"]
