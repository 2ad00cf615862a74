"""HTML pages that hold their pictures and fetch nothing."""

import base64
import html
import io

from PIL import Image

_THUMBNAIL = 72
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .3em .8em; text-align: right; border-bottom: 1px solid #ddd }
.row { display: flex; gap: 6px; align-items: center; margin: 6px 0 }
.row img { width: 72px; height: 72px; object-fit: contain; border: 4px solid #bbb; border-radius: 4px }
.row img.right { border-color: #2a2 } .row img.wrong { border-color: #d33 } .row img.query { margin-right: 14px }
.figure { max-width: 100% } pre { background: #f5f5f5; padding: 1em; overflow-x: auto }
"""


def whole(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>
{body}
</body></html>
"""


def table(head: list, rows: list[list]) -> str:
    def line(tag, cells):
        return (
            "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
        )

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def row(pictures: list[str]) -> str:
    return f'<div class="row">{"".join(pictures)}</div>\n'


def picture(image: Image.Image, name: str, kind: str = "") -> str:
    """A thumbnail; `kind` is its class on the page: query, right or wrong."""
    image = image.copy()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    name = html.escape(name, quote=True)
    return _img(image, "PNG", f'class="{kind}" alt="{name}" title="{name}"')


def photograph(image: Image.Image, alt: str) -> str:
    return _img(image, "JPEG", f'class="figure" alt="{html.escape(alt, quote=True)}"')


def plot(figure, alt: str) -> str:
    """A matplotlib figure."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    out.seek(0)
    return _img(Image.open(out), "PNG", f'class="figure" alt="{html.escape(alt, quote=True)}"')


def _img(image, kind, attributes) -> str:
    out = io.BytesIO()
    image.save(out, kind)
    return f'<img src="data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}" {attributes}>'
