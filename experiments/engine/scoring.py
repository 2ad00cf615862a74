"""The scores of a dataset's embeddings, level by level, and the images that could be embedded."""

import numpy as np

from rll_jax import metrics
from rll_jax.training import embedding


def score_table(levels: dict, data, ks, clustering: bool) -> dict[str, dict[str, float]]:
    """{"L": {"recall@1": ..., ...}, "L,M": ..., ...} from the {level: (N, D)} embeddings of a set."""
    table = {}
    for name, embeddings in embedding.combinations(levels).items():
        table[name] = metrics.retrieval_metrics(
            *embedding.queries_and_gallery(embeddings, data), ks=ks
        )
        if clustering:
            table[name] |= metrics.clustering_metrics(embeddings, data.labels)
    return table


def embed_readable(embed, data, tell) -> tuple:
    """The images of a set that can be read, and their {level: (N, D)} embeddings; of each other `tell(data, row)`.

    Raises:
      ValueError: none can be read.
    """
    bad = set()
    levels = embed(data=data, on_bad=lambda row: bad.add(row) or tell(data, row))
    rows = np.setdiff1d(np.arange(len(data)), list(bad))
    if not len(rows):
        raise ValueError("none of the test images can be read")
    return data.take(rows), {level: e[rows] for level, e in levels.items()}


def columns(table: dict) -> list[str]:
    """The names of the scores, shares all."""
    return [name for name in next(iter(table.values())) if name != "queries_without_match"]
