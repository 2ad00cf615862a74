"""Finds the images of a folder nearest to one or more others, by a trained network.

    python -m experiments.search --workdir=runs/emoji --images=DIR --query=FILE_OR_DIR

Prints them and writes a page of images. The first use embeds the folder and keeps the index in the
workdir; later uses embed what changed.
"""

import pathlib
import sys
from typing import Any

from absl import app, flags
import numpy as np
from PIL import Image

from experiments.engine import command, embedding_index, html_page, trained_network
from experiments.engine.embedding_index import Index
from rll_jax import metrics
from rll_jax.data import images

_TITLE = "Nearest images"


def _page(
    root: pathlib.Path,
    queries: list[pathlib.Path],
    index: Index,
    rows: np.ndarray,
    similarities: np.ndarray,
) -> str:
    """Returns the body of the page."""
    parts = []
    for query, nearest, values in zip(queries, rows, similarities, strict=True):
        cells = [_thumbnail(query, str(query), "query", query.name)]
        for row, value in zip(nearest, values, strict=True):
            name = str(index.files[row])
            caption = f"{pathlib.PurePath(name).name}\n{value:.3f}"
            cells.append(_thumbnail(root / name, f"{name}, similarity {value:.3f}", "", caption))
        parts.append(html_page.image_row(cells))
    about = (
        f"A query, then the images of {root} nearest to it, with their cosine similarity: "
        f"{len(queries)} queries among {len(index.files)} images. A click enlarges an image."
    )
    return f"<h1>{_TITLE}</h1>{html_page.paragraph(about, 'lead')}{''.join(parts)}"


def _thumbnail(path: pathlib.Path, name: str, kind: str, caption: str) -> str:
    def load() -> Image.Image:
        return images.decode(path.read_bytes(), str(path))

    return html_page.thumbnail_or_sentence(load, name, kind, caption)


def _query_paths(query: pathlib.Path) -> list[pathlib.Path]:
    if not query.is_dir():
        return [query]
    return [query / name for name in embedding_index.image_names(query)]


def main(_: Any) -> None:
    """Runs the command."""
    options = flags.FLAGS
    with command.user_errors():
        if options.k < 1:
            raise ValueError(f"--k={options.k}: expected at least 1")
        out = pathlib.Path(options.out or pathlib.Path(options.workdir) / "search.html")
        if options.out:
            command.check_free("out", out)
        root, query = pathlib.Path(options.images), pathlib.Path(options.query)
        if not query.exists():
            raise ValueError(f"--query={query}: no such file or folder")
        trained = trained_network.load_from_flags(sys.stderr)
        paths = _query_paths(query)
        embeddings, readable = embedding_index.embed_files(paths, trained.embed)
        if not readable.any():
            raise ValueError(f"--query={query}: cannot be read as an image")
        index = embedding_index.update(options.workdir, trained, options.images, sys.stderr)
        queries = [path for path, ok in zip(paths, readable, strict=True) if ok]
        k = min(options.k, len(index.files))
        rows, similarities = metrics.nearest(embeddings[readable], index.embeddings, k)
        for path, nearest, values in zip(queries, rows, similarities, strict=True):
            print(f"{path}")
            for row, value in zip(nearest, values, strict=True):
                print(f"  {value:.3f}  {root / index.files[row]}")
        html_page.write(out, _TITLE, _page(root, queries, index, rows, similarities))
    print(
        f"page: {out}  ({len(index.files)} images in the index, {index.num_embedded} of them "
        "embedded now)"
    )
    unreadable = [str(path) for path, ok in zip(paths, readable, strict=True) if not ok]
    sys.exit(embedding_index.print_unreadable([*index.unreadable, *unreadable]))


if __name__ == "__main__":
    trained_network.define_flags()
    flags.DEFINE_string(
        "images", None, "The folder of images, with all folders in it.", required=True
    )
    flags.DEFINE_string("query", None, "An image, or a folder of images.", required=True)
    flags.DEFINE_integer("k", 10, "The number of nearest images to show for each query.")
    flags.DEFINE_string(
        "out", "", "The page to write. Empty: search.html in the workdir, which is overwritten."
    )
    app.run(main, flags_parser=command.parse_flags)
