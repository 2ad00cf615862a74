"""The page of check_data: what a dataset is made of, and its copies side by side."""

from collections.abc import Callable, Sequence
import html
import pathlib
from typing import NamedTuple

from matplotlib.figure import Figure
import numpy as np
from PIL import Image

from experiments.engine import html_page
from rll_jax.data import copies, images
from rll_jax.data.image_dataset import EncodedImageDataset

RELATIONS = ("between train and test", "between classes of a split", "within a class")

_SHOWN = 100  # pairs of a relation
_FAULTS = 1000  # images that cannot be read
_SIDE = 144  # pixels of the shorter side of what a thumbnail is made of


class Kind(NamedTuple):
    """A kind of copies.

    Attributes:
      name: what it is called.
      found: the copies.
      describe: what a similarity is, in words.
    """

    name: str
    found: copies.Copies
    describe: Callable[[float], str]


class _Pair(NamedTuple):
    first: int
    second: int
    kind: str
    distance: str


def write(
    path: pathlib.Path,
    title: str,
    summary: Sequence[str],
    data: EncodedImageDataset,
    splits: np.ndarray,
    kinds: Sequence[Kind],
    faults: Sequence[str],
) -> None:
    """Writes the page.

    Args:
      path: its file.
      title: its title.
      summary: the lines that the command prints.
      data: the images that can be read.
      splits: (N,) str, their splits.
      kinds: the copies among them, the surest kind first.
      faults: a line for each image that cannot be read.
    """
    plot = html_page.plot(_images_per_class(data, splits), "images per class, sorted")
    sections = [
        _section(relation, name, data, splits, kinds) for relation, name in enumerate(RELATIONS)
    ]
    unreadable = html_page.paragraph("All images can be read.")
    if faults:
        more = f"\n{len(faults) - _FAULTS:,} more" if len(faults) > _FAULTS else ""
        unreadable = html_page.preformatted("\n".join(faults[:_FAULTS]) + more)
    about_copies = html_page.paragraph(
        "Each image with the copy that is nearest to it, the most suspicious pairs first."
    )
    body = (
        f"<h1>{html.escape(title)}</h1>\n",
        html_page.preformatted("\n".join(summary)),
        html_page.section("Images per class", plot),
        html_page.section("Copies", about_copies, *sections),
        html_page.section("Images that cannot be read", unreadable),
    )
    html_page.write(path, title, "".join(body))


def _images_per_class(data: EncodedImageDataset, splits: np.ndarray) -> Figure:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    for split in dict.fromkeys(splits.tolist()):
        _, counts = np.unique(data.labels[splits == split], return_counts=True)
        axes.step(range(len(counts) + 1), [*sorted(counts)[::-1], 0], where="post", label=split)
    axes.set(xlabel="classes, the largest first", ylabel="images", xlim=(0, None), ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _section(
    relation: int,
    name: str,
    data: EncodedImageDataset,
    splits: np.ndarray,
    kinds: Sequence[Kind],
) -> str:
    pairs = _pairs(relation, kinds)
    head = f"<h3>{name.capitalize()}</h3>"
    if not pairs:
        return f"{head}<p>None found.</p>"
    rows = []
    for pair in pairs[:_SHOWN]:
        ends = (pair.first, pair.second)
        texts = [f"{pair.kind}{f': {pair.distance}' if pair.distance else ''}"]
        texts += [f"{splits[row]}, class {data.labels[row]}: {data.paths[row]}" for row in ends]
        about = "<br>".join(map(html.escape, texts))
        rows.append(
            html_page.image_row([*(_picture(data, row) for row in ends), f"<span>{about}</span>"])
        )
    more = len(pairs) - len(rows)
    rest = f"<p>{more:,} more pairs are not shown.</p>" if more else ""
    return f"{head}{''.join(rows)}{rest}"


def _pairs(relation: int, kinds: Sequence[Kind]) -> list[_Pair]:
    """Returns each image with its nearest copy; a pair is of the first kind that has it."""
    pairs: dict[tuple[int, int], _Pair] = {}
    for kind in kinds:
        partners = kind.found.partners[relation]
        similarities = kind.found.similarities[relation]
        for row in np.argsort(-similarities, kind="stable")[: (partners >= 0).sum()].tolist():
            first, second = sorted((row, int(partners[row])))
            distance = kind.describe(float(similarities[row]))
            pairs.setdefault((first, second), _Pair(first, second, kind.name, distance))
    return list(pairs.values())


def _picture(data: EncodedImageDataset, row: int) -> str:
    path = str(data.paths[row])

    def load() -> Image.Image:
        return images.shrink(data.image(row).encoded, path, _SIDE, crop=data.box(row))

    return html_page.thumbnail_or_sentence(load, path)
