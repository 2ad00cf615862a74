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

_NO_IMAGES = ("segmentation", "mask", "prepared_")  # labels of pixels by class
_NUMBER = re.compile(r"0*([1-9][0-9]{0,2})(?![0-9])")


class ClassFolders(NamedTuple):
    """How the folders of a benchmark's classes are recognised.

    Attributes:
      classes: the number of its classes.
      pattern: what the names of all of them match.
    """

    classes: int
    pattern: str


def find(
    tree: FolderTree, kind: ClassFolders, words: Sequence[str], without: Sequence[epath.Path]
) -> Listing | None:
    """Returns the images of the folders of classes near `tree.top`; None where there are none.

    Args:
      tree: the folders to search.
      kind: the benchmark's folders.
      words: what the names of the benchmark's own folder may hold. Such folders come first.
      without: folders that are not searched, nor what is below them.
    """
    for folder in sorted(tree.near(tree.top), key=lambda near: not tree.is_named(near, words)):
        inside = tree.relative(folder).lower().split("/")
        if any(part.startswith(_NO_IMAGES) for part in inside):
            continue
        if any(other == folder or other in folder.parents for other in without):
            continue
        parts = [name for name in tree.folders(folder) if name.lower() in folders.SPLIT_LIKE]
        tops = [folder / part for part in parts] or [folder]
        names = {name for top in tops for name in tree.folders(top)}
        named = tree.is_named(folder, words)
        is_likely = named and (bool(parts) or folder.name.lower() == "images")
        is_meant = named or folder == tree.top
        if not _are_classes(names, kind, is_likely=is_likely, is_meant=is_meant):
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


def _are_classes(names: set[str], kind: ClassFolders, *, is_likely: bool, is_meant: bool) -> bool:
    """Whether folders of these names are the classes.

    Args:
      names: the names.
      kind: the benchmark's folders.
      is_likely: whether they lie where the benchmark's classes would: any names will do.
      is_meant: whether the benchmark or the user names their folder: the right number will do.
    """
    numbers = [int(found[1]) for name in names if (found := _NUMBER.match(name))]
    if not 2 <= len(names) <= kind.classes or max(numbers, default=0) > kind.classes:
        return False
    matches = all(re.search(kind.pattern, name) for name in names)
    return matches or is_likely or (is_meant and len(names) == kind.classes)


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
