"""report.html: curves, scores and retrieved pictures of a run in one file that fetches nothing."""
import base64
import html
import io
import pathlib

from matplotlib.figure import Figure
import numpy as np
from PIL import Image

from rll_jax import metrics

_QUERIES, _NEIGHBOURS, _THUMBNAIL = 20, 8, 72
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .3em .8em; text-align: right; border-bottom: 1px solid #ddd }
.row { display: flex; gap: 6px; align-items: center; margin: 6px 0 }
.row img { width: 72px; height: 72px; object-fit: contain; border: 4px solid #bbb; border-radius: 4px }
.row img.right { border-color: #2a2 } .row img.wrong { border-color: #d33 } .row img.query { margin-right: 14px }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto }
"""


def write(path: pathlib.Path, *, title: str, lines: list[dict], options: str, test, embeddings: np.ndarray) -> None:
    """Writes the page.

    Args:
      lines: of metrics.jsonl.
      options: the flags, as text.
      test: the `datasets.ImageSet` that `embeddings` (N, D) are of.
    """
    evaluations = [line for line in lines if "recall@1" in line]
    names = [name for name in evaluations[-1] if name not in ("step", "queries_without_match")]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["step"] + names)
    rows = "".join(
        f"<tr><td>{line['step']}</td>" + "".join(f"<td>{100 * line[name]:.1f}</td>" for name in names) + "</tr>"
        for line in evaluations
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<h2>Scores</h2><p>{len(test)} test images of {len(np.unique(test.labels))} classes, in percent.</p>
<table><tr>{head}</tr>{rows}</table>
<h2>Curves</h2>{_curves(lines, evaluations)}
<h2>Nearest images</h2>
<p>A query, then the {_NEIGHBOURS} images nearest to it: <b style="color:#2a2">green</b> of its class,
<b style="color:#d33">red</b> of another.</p>
{_grid(test, embeddings)}
<h2>Options</h2><pre>{html.escape(options)}</pre></body></html>
"""
    path.write_text(page, encoding="utf-8")


def _curves(lines, evaluations) -> str:
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
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return _img(out.getvalue(), "png", 'alt="loss and scores over the steps" style="max-width:100%"')


def _grid(test, embeddings) -> str:
    queries = np.sort(np.random.default_rng(0).permutation(len(test))[:_QUERIES])
    neighbours = metrics.nearest(embeddings, min(_NEIGHBOURS, len(test) - 1), queries)
    rows = []
    for query, near in zip(queries, neighbours):
        cells = [_picture(test, query, "query")]
        cells += [_picture(test, n, "right" if test.labels[n] == test.labels[query] else "wrong") for n in near]
        rows.append(f'<div class="row">{"".join(cells)}</div>')
    return "\n".join(rows)


def _picture(test, row, kind) -> str:
    image = test.image(row)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG")
    name = html.escape(str(test.paths[row]), quote=True)
    return _img(out.getvalue(), "png", f'class="{kind}" alt="{name}" title="{name}"')


def _img(data: bytes, kind: str, attributes: str) -> str:
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" {attributes}>'
