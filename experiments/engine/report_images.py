"""The images of a report: queries with their nearest images, and a map of embeddings."""

from collections.abc import Sequence
import functools
import pathlib
import warnings

import numpy as np
from PIL import Image
import threadpoolctl

from experiments.engine import html_page
from experiments.engine.scoring import ByQuery
from rll_jax import metrics
from rll_jax.data import images
from rll_jax.data.image_dataset import EncodedImageDataset
from rll_jax.training import embedding

NEIGHBOURS = 8
_QUERIES = {"Worst": 6, "Typical": 8, "Best": 6}  # queries shown of each kind
_MAP_IMAGES, _MAP_SIDE, _MAP_THUMBNAIL = 1000, 1400, 32


def class_names(data: EncodedImageDataset) -> np.ndarray:
    """Returns the (N,) name of each image's class.

    It is the folder of the class's images, or the name of their files, where this tells the classes
    apart; otherwise "class" and its number.
    """
    paths = [pathlib.PurePath(path) for path in data.paths.tolist()]
    _, numbers = np.unique(data.labels, return_inverse=True)
    for names in ([path.parent.name for path in paths], [path.stem for path in paths]):
        pairs = set(zip(numbers.tolist(), names, strict=True))
        if len(pairs) == len(set(names)) == numbers.max() + 1 and "" not in names:
            return np.array(names)
    return np.array([f"class {label}" for label in data.labels])


def grid(data: EncodedImageDataset, embeddings: np.ndarray, by_query: ByQuery) -> str:
    """Returns rows of a query and its nearest images, for the worst, typical and best queries."""
    gallery, left_out = data.gallery_rows, embedding.left_out(data)
    if data.in_gallery is None:  # each image is query and gallery
        left_out |= {name.replace("query", "gallery"): x for name, x in left_out.items()}
    names = class_names(data)
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
        chosen = order[first : first + number]
        queries = data.query_rows[chosen]
        itself = queries if data.in_gallery is None else None
        k = min(NEIGHBOURS, len(gallery) - (itself is not None))
        of_chosen = {
            name: values[chosen] if name.startswith("query") else values
            for name, values in left_out.items()
        }
        nearest, similarity = metrics.nearest(
            embeddings[queries], embeddings[gallery], k, leave_out=itself, **of_chosen
        )
        parts.append(f"<h3>{kind}</h3>")
        for query, rows, values in zip(queries, gallery[nearest], similarity, strict=True):
            found = np.isfinite(values)
            parts.append(_query_row(data, names, query, rows[found], values[found]))
    return "".join(parts)


def _query_row(
    data: EncodedImageDataset,
    names: np.ndarray,
    query: int,
    nearest: np.ndarray,
    similarity: np.ndarray,
) -> str:
    cells = [tile(data, names, query, "query")]
    for row, value in zip(nearest, similarity, strict=True):
        kind = "right" if data.labels[row] == data.labels[query] else "wrong"
        cells.append(tile(data, names, row, kind, f"similarity {value:.3f}"))
    return html_page.image_row(cells)


def tile(
    data: EncodedImageDataset,
    names: Sequence[str] | np.ndarray,
    row: int,
    kind: str,
    *about: str,
) -> str:
    """Returns an image of a dataset with its class, and lines of what else is said of it."""
    lines = [str(names[row]), *about]
    load = functools.partial(data.decoded_image, row)
    name = ", ".join([str(data.paths[row]), *lines])
    return html_page.thumbnail_or_sentence(load, name, kind, "\n".join(lines))


def embedding_map(data: EncodedImageDataset, embeddings: np.ndarray) -> str:
    """Returns images of classes drawn by chance, where t-SNE puts their embeddings."""
    small, rows, wanted = [], [], _map_rows(data.labels)
    for row in wanted:
        try:
            image = data.decoded_image(row)
        except images.BadImageError:
            continue
        image.thumbnail((_MAP_THUMBNAIL, _MAP_THUMBNAIL), Image.Resampling.LANCZOS)
        small.append(image)
        rows.append(row)
    if len(rows) < 2:
        return html_page.paragraph("No map: its images cannot be read now.", "note")
    places = _places(embeddings[rows])
    low, high = places.min(axis=0), places.max(axis=0)
    places = (places - low) / np.maximum(high - low, 1e-9) * (_MAP_SIDE - _MAP_THUMBNAIL)
    canvas = Image.new("RGB", (_MAP_SIDE, _MAP_SIDE), (255, 255, 255))
    for image, (x, y) in zip(small, places, strict=True):
        canvas.paste(image, (int(x), int(y)))
    shown = html_page.photograph(canvas, "map of the test embeddings")
    if unread := len(wanted) - len(rows):
        shown += html_page.paragraph(
            f"{unread} images cannot be read now: they are left out.", "note"
        )
    return shown


def _map_rows(labels: np.ndarray) -> np.ndarray:
    """Returns the rows of some classes drawn by chance."""
    classes, counts = np.unique(labels, return_counts=True)
    order = np.random.default_rng(0).permutation(len(classes))
    number = 1 + np.searchsorted(np.cumsum(counts[order]), _MAP_IMAGES)
    rows = np.flatnonzero(np.isin(labels, classes[order[:number]]))
    return np.random.default_rng(0).permutation(rows)[:_MAP_IMAGES]


def _places(embeddings: np.ndarray) -> np.ndarray:
    """Returns (N, 2) places by t-SNE."""
    from sklearn.manifold import TSNE  # a second to import, which other pages do not need

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
