"""The images of a folder nearest to one or more others, by a trained network, printed and as a page of pictures.

    python -m experiments.search --workdir=runs/emoji --images=DIR --query=FILE_OR_DIR

The first use embeds the folder and keeps the index in the workdir; later ones embed what changed.
"""

import html
import pathlib
import sys

from absl import app, flags

from experiments import embed
from experiments.engine import build, embedding_index, html_page
from experiments.engine import config as config_lib
from rll_jax import metrics
from rll_jax.data import images


def _page(root, queries, index, rows, similarities) -> str:
    lines = []
    for query, near, values in zip(queries, rows, similarities):
        cells = [
            html_page.picture(images.decode(query.read_bytes(), str(query)), str(query), "query")
        ]
        for row, value in zip(near, values):
            path = root / index.files[row]
            cells.append(
                html_page.picture(
                    images.decode(path.read_bytes(), str(path)), f"{index.files[row]} {value:.3f}"
                )
            )
        lines.append(html_page.row(cells))
    return (
        f"<h1>Nearest images</h1><p>A query, then the images of {html.escape(str(root))} nearest to it.</p>"
        + "".join(lines)
    )


def main(_):
    options = flags.FLAGS
    with config_lib.mistakes_in_one_line():
        if options.k < 1:
            raise ValueError(f"--k={options.k}: expected at least 1")
        out = pathlib.Path(options.out or pathlib.Path(options.workdir) / "search.html")
        if options.out:
            config_lib.check_free("out", out)
        root, query = pathlib.Path(options.images), pathlib.Path(options.query)
        if not query.exists():
            raise ValueError(f"--query={query}: no such file or folder")
        trained = build.load(options.workdir, options.step, options.best)
        paths = (
            [query / name for name in embedding_index.names(query)] if query.is_dir() else [query]
        )
        embeddings, readable = embedding_index.embed_files(paths, trained.embed)
        if not readable.any():
            raise ValueError(f"--query={query}: cannot be read as an image")
        index = embedding_index.update(options.workdir, trained, options.images)
        queries = [path for path, ok in zip(paths, readable) if ok]
        rows, similarities = metrics.nearest(
            embeddings[readable], index.embeddings, min(options.k, len(index.files))
        )
        for path, near, values in zip(queries, rows, similarities):
            print(f"{path}")
            for row, value in zip(near, values):
                print(f"  {value:.3f}  {root / index.files[row]}")
        text = html_page.whole("Nearest images", _page(root, queries, index, rows, similarities))
        with config_lib.written_whole(out) as aside:
            aside.write_text(text, encoding="utf-8", errors="replace")
    print(
        f"page: {out}  ({len(index.files)} images in the index, {index.embedded} of them embedded now)"
    )
    sys.exit(
        embed.tell_unreadable(
            index.unreadable + [str(p) for p, ok in zip(paths, readable) if not ok]
        )
    )


if __name__ == "__main__":
    build.define_flags()
    flags.DEFINE_string("images", None, "folder of images, its folders too", required=True)
    flags.DEFINE_string("query", None, "image, or a folder of them", required=True)
    flags.DEFINE_integer("k", 10, "how many of the nearest to show")
    flags.DEFINE_string(
        "out", "", "page to write; by default search.html in the workdir, written anew"
    )
    app.run(main, flags_parser=config_lib.parse_flags)
