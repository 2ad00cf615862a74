"""HTML pages in one file that fetch nothing: their style, tables, images and plots.

A page is readable on a phone, in light and in dark mode. Its tables sort and its images enlarge, by
mouse and by keyboard. Its Content-Security-Policy forbids to fetch anything, and any other script.
"""

import base64
from collections.abc import Callable, Iterable, Sequence
import hashlib
import html
import io
import pathlib
import re
from typing import Any
import warnings

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from rll_jax.data import files, images

THUMBNAIL = 240  # pixels: an image of a row is stored so large, and enlarges to that

# Colours of series that can be told from white and from black.
COLOURS = ("#2f7fe0", "#d9730d", "#1f9d55", "#d6409f", "#8b5cf6", "#0d9aa8", "#a88400", "#e0484d")
GREEN, RED = COLOURS[2], COLOURS[7]

_STYLE = pathlib.Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
_SCRIPT = pathlib.Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
    f"{base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'"
)
_KINDS = {"query": "query", "right": "same class", "wrong": "another class"}
_MARKS = {"right": "\N{CHECK MARK} ", "wrong": "\N{BALLOT X} "}  # not by colour alone
_NUMBER = re.compile(r"[-+\N{MINUS SIGN}]?[\d,]*\.?\d+(e[-+]?\d+)?( ?%| ?\(.*\))?", re.IGNORECASE)
# Plots take the page's colours: matplotlib's black, white and greys.
_PAGE_COLOURS = {
    "#000000": "currentColor",
    "#ffffff": "var(--ground)",
    "#cccccc": "var(--line)",
    "#b0b0b0": "var(--line)",
}


def page(title: str, body: str) -> str:
    """Returns a page of a body in HTML, which has a level-one heading."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><main>
{body}
</main><script>{_SCRIPT}</script></body></html>
"""


def write(path: pathlib.Path, title: str, body: str) -> None:
    """Writes a page into a file. Bytes of names that are no text become "?"."""
    with files.atomic_write(path) as temporary:
        temporary.write_text(page(title, body), encoding="utf-8", errors="replace")


def section(title: str, *parts: str) -> str:
    """Returns parts in HTML under a heading."""
    return f"<section><h2>{html.escape(title)}</h2>\n{''.join(parts)}</section>\n"


def paragraph(text: str, kind: str = "") -> str:
    """Returns a paragraph of a text; its kind may be lead (under a title) or note."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{html.escape(text)}</p>\n"


def answer(text: str) -> str:
    """Returns a paragraph that says in a sentence what the page found."""
    return f'<p class="answer"><strong>{html.escape(text)}</strong></p>\n'


def details(summary: str, body: str) -> str:
    """Returns HTML that is folded away under a line of text."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>\n"


def preformatted(text: str) -> str:
    """Returns a text as it is, in a box that scrolls."""
    return _scrolling(f"<pre>{html.escape(text)}</pre>", "text")


def cards(numbers: Iterable[tuple[str, str, str]]) -> str:
    """Returns numbers in large type: (name, number, what is said of it)."""
    inner = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(number)}"
        f"<small>{html.escape(about)}</small></dd></div>"
        for name, number, about in numbers
    )
    return f'<dl class="cards">{inner}</dl>\n'


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """Returns a table of texts and numbers, which the reader can sort by each column.

    Args:
      head: the names of the columns.
      rows: the cells; the first of each row names the row.
      caption: what the table shows.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    kinds = [
        ' class="number"' if all(map(_NUMBER.fullmatch, column)) else ""
        for column in zip(*texts, strict=True)
    ] or [""] * len(head)
    heads = "".join(
        f'<th scope="col"{kind}>{html.escape(str(name))}</th>'
        for name, kind in zip(head, kinds, strict=True)
    )
    body = "".join(_table_row(row, kinds) for row in texts)
    caption_tag = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    inner = f"<table>{caption_tag}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return _scrolling(inner, caption or "table")


def _table_row(cells: Sequence[str], kinds: Sequence[str]) -> str:
    first, *others = (html.escape(cell) for cell in cells)
    inner = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(others, kinds[1:], strict=True))
    return f'<tr><th scope="row"{kinds[0]}>{first}</th>{inner}</tr>'


def _scrolling(inner: str, name: str) -> str:
    """Returns HTML in a box that scrolls, also by keyboard, where it is wider than the page."""
    name = html.escape(name)
    return f'<div class="scroll" role="group" tabindex="0" aria-label="{name}">{inner}</div>\n'


def image_row(thumbnails: Iterable[str]) -> str:
    """Returns thumbnails side by side."""
    return f'<div class="row">{"".join(thumbnails)}</div>\n'


def thumbnail(image: Image.Image, name: str, kind: str = "", caption: str = "") -> str:
    """Returns a small image that enlarges.

    Args:
      image: the image.
      name: its text, which is read out and shown beside the enlarged image.
      kind: its class on the page: query, right or wrong.
      caption: the text under the image; it may have lines.
    """
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    tag = _image(image, "WebP", _alt(_named(name, kind)), quality=80)
    return _tile(tag, kind, caption)


def thumbnail_or_sentence(
    load: Callable[[], Image.Image], name: str, kind: str = "", caption: str = ""
) -> str:
    """Returns `thumbnail` of a loaded image; a sentence where it cannot be read now."""
    try:
        return thumbnail(load(), name, kind, caption)
    except (OSError, images.BadImageError):
        sentence = html.escape(f"{_named(name, kind)}: this image cannot be read now.")
        return _tile(f'<div class="missing">{sentence}</div>', kind, caption)


def _named(name: str, kind: str) -> str:
    return f"{_KINDS[kind]}: {name}" if kind in _KINDS else name


def _tile(content: str, kind: str, caption: str) -> str:
    text = _MARKS.get(kind, "") + caption
    caption = f"<figcaption>{html.escape(text)}</figcaption>" if caption else ""
    return f'<figure class="{kind}">{content}{caption}</figure>'


def photograph(image: Image.Image, alt: str) -> str:
    """Returns an image of the page's width, as JPEG, that enlarges."""
    return f'<figure class="figure">{_image(image, "JPEG", _alt(alt))}</figure>\n'


def plots(*figures: str) -> str:
    """Returns plots side by side where the page is wide enough."""
    return f'<div class="plots">{"".join(figures)}</div>\n'


def plot(figure: Figure, alt: str, caption: str = "") -> str:
    """Returns a matplotlib figure as SVG in the page's own colours and type.

    Args:
      figure: the figure.
      alt: what it shows, which is read out.
      caption: a text above it.
    """
    buffer = io.StringIO()
    # Names that SVG needs within itself differ between the plots of a page.
    salt = alt.encode(errors="replace").decode()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has other fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    view_box = re.search(r'viewBox="[^"]*"', text)
    inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    inner = inner[inner.index(">", inner.index("<svg")) + 1 :]
    for colour, of_page in _PAGE_COLOURS.items():
        inner = inner.replace(colour, of_page)
    used = set(re.findall(r"#([\w-]+)", inner))
    inner = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", inner)
    inner = inner.replace("xlink:href", "href")
    # Narrower than this, a plot scrolls in its box, so that its type stays readable.
    inches = figure.get_figwidth()
    style = f'style="min-width:{48 * inches:.0f}px;max-width:{120 * inches:.0f}px"'
    box = view_box[0] if view_box else ""
    svg = f'<svg {box} {style} role="img" aria-label="{html.escape(alt)}">{inner}'
    above = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{above}{_scrolling(svg, alt)}</figure>\n"


def _alt(alt: str) -> str:
    return f'alt="{html.escape(alt)}" title="{html.escape(alt)}"'


def _image(image: Image.Image, kind: str, attributes: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img src="data:image/{kind.lower()};base64,{data}" {size} {attributes}>'
