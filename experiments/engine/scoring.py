"""The scores of a dataset's embeddings, level by level, and the images that could be embedded."""

from collections.abc import Callable, Sequence

import numpy as np

from rll_jax import metrics
from rll_jax.data.image_dataset import EncodedImageDataset
from rll_jax.training import embedding

ScoreTable = dict[str, dict[str, float]]  # {levels: {score: value}}


def score_table(
    levels: dict[str, np.ndarray],
    data: EncodedImageDataset,
    ks: Sequence[int],
    *,
    clustering: bool,
) -> ScoreTable:
    """Returns the scores of each level, each pair and the concatenation.

    Args:
      levels: {level: (N, D)} embeddings of the dataset.
      data: the dataset.
      ks: the K of Recall@K.
      clustering: compute the scores of K-means too.

    Returns:
      {"L": {"recall@1": ..., ...}, "L,M": ..., ...}.
    """
    table = {}
    for name, embeddings in embedding.combinations(levels).items():
        rows = embedding.queries_and_gallery(embeddings, data)
        table[name] = metrics.retrieval_metrics(*rows, ks=ks)
        if clustering:
            table[name] |= metrics.clustering_metrics(embeddings, data.labels)
    return table


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
