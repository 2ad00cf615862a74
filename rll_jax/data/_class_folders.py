"""Benchmarks as folders of their classes, without the authors' metadata.

The archives of "Revisiting Training Strategies" (Roth et al. 2020) are so, and several on Kaggle;
some of these have train/ and test/, each with images of all classes. The protocols of CUB-200-2011
and CARS196 need no more: the first half of the classes trains.
"""

from collections.abc import Sequence
import re
from typing import NamedTuple

from etils import epath

from rll_jax.data import folders
from rll_jax.data._layouts import FolderTree
from rll_jax.data.listings import TEST, TRAIN, Listing, Row

_SPLITS = {"train", "test", "val", "valid", "validation"}
_NO_IMAGES = ("segmentation", "mask", "prepared_")  # labels of pixels by class
_NUMBER = re.compile(r"0*([1-9][0-9]{0,2})(?![0-9])")


class ClassFolders(NamedTuple):
    """How the folders of a benchmark's classes are recognised.

    Attributes:
      classes: the number of its classes.
      pattern: what the names of all of them match.
      word: what the name of its own folder holds, in lower case.
    """

    classes: int
    pattern: str
    word: str


def find(tree: FolderTree, kind: ClassFolders, without: Sequence[epath.Path]) -> Listing | None:
    """Returns the images of the folders of classes near `tree.top`; None where there are none.

    Args:
      tree: the folders to search.
      kind: the benchmark's folders.
      without: folders that are not searched, nor what is below them.
    """
    for folder in tree.near(tree.top):
        inside = tree.relative(folder).lower().split("/")
        if any(part.startswith(_NO_IMAGES) for part in inside):
            continue
        if any(other == folder or other in folder.parents for other in without):
            continue
        parts = [name for name in tree.folders(folder) if name.lower() in _SPLITS]
        tops = [folder / part for part in parts] or [folder]
        names = {name for top in tops for name in tree.folders(top)}
        if not _is_recognised(tree, folder, kind, names, halves=bool(parts)):
            continue
        try:
            listed = {top: folders.class_folders(top) for top in tops if tree.folders(top)}
        except ValueError:  # no images in them
            continue
        images = [
            (row.path.split("/", 1)[0], str((top / row.path).relative_to(folder)))
            for top, rows in listed.items()
            for row in rows
        ]
        return Listing(folder, _split(images, kind.classes))
    return None


def _is_recognised(
    tree: FolderTree, folder: epath.Path, kind: ClassFolders, names: set[str], halves: bool
) -> bool:
    """Whether the folders in a folder are the classes: by number, by name, or by its own name."""
    if len(names) < 2:
        return False
    if len(names) == kind.classes or all(re.search(kind.pattern, name) for name in names):
        return True
    path = f"{tree.top.name}/{tree.relative(folder)}".lower()
    return kind.word in path and (halves or folder.name.lower() == "images")


def _split(images: list[tuple[str, str]], count: int) -> list[Row]:
    """Returns the rows of (class, path): the first half of the classes, by their names, trains.

    Where the names begin with the published numbers of the classes, these are their labels, and
    tell the halves also where classes are missing.
    """
    names = {name for name, _ in images}
    numbers = {name: int(found[1]) for name in names if (found := _NUMBER.match(name))}
    if len(numbers) == len(names):
        ordered = sorted(names, key=lambda name: (numbers[name], name))
    else:
        ordered = sorted(names)
    labels = {name: label for label, name in enumerate(ordered)}
    first = len(names) // 2
    published = {name: number - 1 for name, number in numbers.items() if number <= count}
    halves = {label < count // 2 for label in published.values()}
    if len(set(published.values())) == len(names) and len(halves) == 2:
        labels, first = published, count // 2
    return [
        Row(path, labels[name], TRAIN if labels[name] < first else TEST)
        for name, path in sorted(images, key=lambda image: (labels[image[0]], image[1]))
    ]
