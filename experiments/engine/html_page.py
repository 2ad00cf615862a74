"""HTML pages that hold their images and fetch nothing."""

import base64
from collections.abc import Iterable, Sequence
import html
import io
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

_THUMBNAIL = 72  # pixels
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em;
  color: #222 }
table { border-collapse: collapse }
td, th { padding: .3em .8em; text-align: right; border-bottom: 1px solid #ddd }
.row { display: flex; gap: 6px; align-items: center; margin: 6px 0 }
.row img { width: 72px; height: 72px; object-fit: contain; border: 4px solid #bbb;
  border-radius: 4px }
.row img.right { border-color: #2a2 }
.row img.wrong { border-color: #d33 }
.row img.query { margin-right: 14px }
.figure { max-width: 100% }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto }
"""


def page(title: str, body: str) -> str:
    """Returns a page of a body in HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>
{body}
</body></html>
"""


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table of texts and numbers."""
    body = "".join(_table_row("td", row) for row in rows)
    return f"<table>{_table_row('th', head)}{body}</table>"


def _table_row(tag: str, cells: Iterable[Any]) -> str:
    inner = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


def image_row(thumbnails: Iterable[str]) -> str:
    """Returns thumbnails side by side."""
    return f'<div class="row">{"".join(thumbnails)}</div>\n'


def thumbnail(image: Image.Image, name: str, kind: str = "") -> str:
    """Returns a small image.

    Args:
      image: the image.
      name: its text.
      kind: its class on the page: query, right or wrong.
    """
    image = image.copy()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    name = html.escape(name, quote=True)
    return _image(image, "PNG", f'class="{kind}" alt="{name}" title="{name}"')


def photograph(image: Image.Image, alt: str) -> str:
    """Returns an image of the page's width, as JPEG."""
    return _image(image, "JPEG", _figure(alt))


def plot(figure: Figure, alt: str) -> str:
    """Returns a matplotlib figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    buffer.seek(0)
    return _image(Image.open(buffer), "PNG", _figure(alt))


def _figure(alt: str) -> str:
    return f'class="figure" alt="{html.escape(alt, quote=True)}"'


def _image(image: Image.Image, kind: str, attributes: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/{kind.lower()};base64,{data}" {attributes}>'
