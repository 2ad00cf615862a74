"""Datasets of one's own: a folder for each class, or a table of paths and classes."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from etils import epath
import numpy as np

from rll_jax.data import _tables, image_files, paths
from rll_jax.data._layouts import FolderTree
from rll_jax.data.listings import GALLERY, QUERY, TEST, TRAIN, Row

TEST_CLASSES = DRAWN, SECOND_HALF = ("drawn", "second_half")
SPLIT_LIKE = ("train", "test", "val", "valid", "validation")  # no names of classes
_PREPARED = "prepared_"  # what the command prepare writes beside the folders of splits


class _ClassFolder(NamedTuple):
    """A class's folder: its path from the root, its name and split (or ""), its images' paths."""

    path: str
    name: str
    split: str
    images: list[str]


def class_folders(
    directory: paths.AnyPath,
    test_share: float = 0.5,
    seed: int = 0,
    *,
    test_classes: str = DRAWN,
    on_left_out: Callable[[Counter[str]], None] | None = None,
) -> list[Row]:
    """Lists the images of a folder that has one folder for each class.

    The folder may also have folders of splits with one folder for each class in them: train/ and
    test/ (or val/), or train/, query/ and gallery/, or what is searched alone; see `split_folders`.
    Classes are numbered in the order of their names. Class folders without images are left out.
    What is an image, and what is left out besides, is as in `image_files.find`.

    Args:
      directory: the folder, local or in an object store.
      test_share: the share of the classes that is test, where there are no train/ and test/.
      seed: draws these classes.
      test_classes: "drawn", or "second_half": the first half of the classes, in the order of their
        names, trains, and the others are test. `test_share` and `seed` are then not used.
      on_left_out: called once with {reason: the number of files and folders left out for it}.

    Raises:
      ValueError: the folder does not exist, has fewer than two classes with images, has folders
        named like splits that do not go together, or has a class that is in train/ and is searched
        too; or it has such folders where `test_classes` is "second_half".
      OSError: a folder cannot be read.
    """
    directory = paths.to_path(directory)
    if not directory.is_dir():
        is_file = directory.exists()
        raise ValueError(f"{directory}: {'a file, expected a' if is_file else 'no such'} folder")
    split_of = split_folders(directory)
    found = image_files.find(directory)
    classes = _group_by_class(found, split_of)
    if on_left_out is not None:
        on_left_out(found.left_out)
    if len(classes) < 2:
        raise ValueError(
            f"{directory}: expected a folder of images for each class (or train/ and test/ with "
            f"such folders), found {len(classes)} with images"
        )
    if split_of:
        _check_class_names(directory, classes)
        names = " and ".join(f"{name}/" for name, split in split_of.items() if split)
        _refuse_halves(test_classes, f"{directory}: has {names}")
        splits = [folder.split for folder in classes]
    else:
        splits = split_classes(len(classes), test_share, seed, test_classes=test_classes)
    # A class has one number in query/ and gallery/.
    keys = [(folder.split == TRAIN, folder.name) for folder in classes]
    labels = {key: label for label, key in enumerate(dict.fromkeys(keys))}
    return [
        Row(f"{folder.path}/{image}", labels[key], split)
        for folder, key, split in zip(classes, keys, splits, strict=True)
        for image in folder.images
    ]


def split_folders(directory: paths.AnyPath) -> dict[str, str]:
    """Returns {name: split} of the folders in a folder; {} where they are those of classes.

    The names are those of a table's splits, in capitals or not: train, and test (also val, valid,
    validation, dev, eval) or query and gallery. What is searched may be there without train. Where
    there are test and val, test is searched, and val has the split "": its images are left out.

    Args:
      directory: the folder, local or in an object store.

    Raises:
      ValueError: names of splits do not go together, or there are names of splits and others.
    """
    directory = paths.to_path(directory)
    names = [
        name for name in FolderTree(directory).folders(directory) if not name.startswith(_PREPARED)
    ]
    split_of = {name: _tables.SPLIT_WORDS.get(name.lower(), "") for name in names}
    searched = [name for name, split in split_of.items() if split == TEST]
    if sum(name.lower() in _tables.TEST_WORDS for name in searched) == 1 and all(split_of.values()):
        split_of |= {name: "" for name in searched if name.lower() not in _tables.TEST_WORDS}
    else:
        searched = []
    splits = [split for name, split in split_of.items() if split or name not in searched]
    if {*splits} - {TRAIN} in ({TEST}, {QUERY, GALLERY}) and len({*splits}) == len(splits):
        return dict(sorted(split_of.items(), key=lambda item: item[1] != TRAIN))
    if like := sorted(name for name in names if name.lower() in SPLIT_LIKE):
        others = " and others" if len(like) < len(names) else ""
        raise ValueError(
            f"{directory}: holds {', '.join(like)}{others}: expected train and test with the "
            "classes in them, or the classes alone (or train and val; or train, query and "
            "gallery); --index takes any other arrangement"
        )
    return {}


def split_classes(
    classes: int, test_share: float, seed: int, *, test_classes: str = DRAWN
) -> list[str]:
    """Returns train or test for each class number.

    Args:
      classes: the number of classes, at least two.
      test_share: the share of the classes that is test: at least one class is test and one train.
      seed: draws them.
      test_classes: "drawn", or "second_half": the first half trains, as in the protocols of
        CUB-200-2011 and CARS196. Of an odd number of classes one more is test.

    Raises:
      ValueError: `test_classes` is neither of the two.
    """
    if test_classes not in TEST_CLASSES:
        raise ValueError(
            f"test_classes={test_classes!r}: expected one of {', '.join(TEST_CLASSES)}"
        )
    if test_classes == SECOND_HALF:
        return [TRAIN if label < classes // 2 else TEST for label in range(classes)]
    num_test = min(max(round(classes * test_share), 1), classes - 1)
    test = set(np.random.default_rng(seed).permutation(classes)[:num_test].tolist())
    return [TEST if label in test else TRAIN for label in range(classes)]


def read_index(
    file: paths.AnyPath,
    test_share: float = 0.5,
    seed: int = 0,
    *,
    test_classes: str = DRAWN,
    root: paths.AnyPath | None = None,
) -> list[Row]:
    """Lists the images of a table: a .csv or .parquet file, also one of open-metric-learning.

    Its columns are path and label, and optionally split, super_label, group, image_id, is_query,
    is_gallery, and x_1, y_1, x_2 and y_2. Other columns are ignored. The last four are a bounding
    box in pixels of the upright picture, to which it is cropped. A picture may be listed with
    several boxes.

    A path starts from the dataset's root folder, or is absolute and below `root`. A label is any
    text or number, but no word for an empty cell, such as nan, None or NA. Classes are numbered in
    the order of their labels, and numbers by size where all labels are whole numbers from 0; 10.0
    is 10, and 010 is text. A split is train or test, or else train, query or gallery; val, valid,
    validation and dev mean test. Where is_query and is_gallery are given, test rows with both are
    test, and those with one are query or gallery; all three go together. Category is super_label
    and sequence is group there.

    A query is not ranked against images of its own group (any text or number: the same camera,
    sequence or product shot) nor against those of its own image_id (the same image in another
    file). An empty cell is none.

    Args:
      file: the table, local or in an object store.
      test_share: the share of the classes that is test, where the table has no splits.
      seed: draws these classes.
      test_classes: "drawn", or "second_half": see `split_classes`. The order is that of the labels.
      root: the dataset's root folder, or None: absolute paths are then refused.

    Raises:
      ValueError: a row is wrong (which one, and why), the splits share a class or do not go
        together, the file does not exist, or it is neither a .csv nor a .parquet; or it has splits
        where `test_classes` is "second_half".
    """
    file = paths.to_path(file)
    entries = _tables.read_entries(file, root)
    if not entries:
        raise ValueError(f"{file}: lists no image")
    labels = _numbered({entry.label for entry in entries})
    super_labels = _numbered({entry.super_label for entry in entries})
    splits = [entry.split for entry in entries]
    if "" in splits:
        if len(labels) < 2:
            raise ValueError(
                f"{file}: expected at least two classes, to be split, found {len(labels)}"
            )
        split_of_class = split_classes(len(labels), test_share, seed, test_classes=test_classes)
        splits = [split_of_class[labels[entry.label]] for entry in entries]
    else:
        _refuse_halves(test_classes, f"{file}: has a split for each row")
    return [
        Row(
            entry.path,
            labels[entry.label],
            split,
            super_labels[entry.super_label],
            entry.group,
            entry.image_id,
            entry.box,
        )
        for entry, split in zip(entries, splits, strict=True)
    ]


def _refuse_halves(test_classes: str, why: str) -> None:
    """Raises ValueError where classes should be halved though the dataset has a split."""
    if test_classes == SECOND_HALF:
        raise ValueError(f"{why}, so test_classes=second_half does not go with it: leave it out")


def _group_by_class(found: image_files.ImageFiles, split_of: dict[str, str]) -> list[_ClassFolder]:
    """Returns the class folders with images, sorted by path.

    Images in no class folder, or in a split that is not used, are counted in `found.left_out`.

    Args:
      found: the images.
      split_of: of `split_folders`.
    """
    classes: dict[str, _ClassFolder] = {}
    for path in found.names:
        top, _, below = path.partition("/") if split_of else ("", "", path)
        name, _, image = below.partition("/")
        if split_of.get(top) == "":
            found.left_out[f"images of {top}/, as test/ is searched"] += 1
        elif image and (top in split_of or not split_of):
            folder = f"{top}/{name}" if split_of else name
            new = _ClassFolder(folder, name, split_of.get(top, ""), [])
            classes.setdefault(folder, new).images.append(image)
        else:
            found.left_out["images in no class's folder"] += 1
    for folder in classes.values():
        folder.images.sort()
    return sorted(classes.values(), key=lambda folder: folder.path)


def _check_class_names(directory: epath.Path, classes: list[_ClassFolder]) -> None:
    """Raises ValueError where a class is in train and is searched too."""
    train = [folder for folder in classes if folder.split == TRAIN]
    others = [folder for folder in classes if folder.split != TRAIN]
    if common := sorted({folder.name for folder in train} & {folder.name for folder in others}):
        top = train[0].path.split("/")[0]
        searched = " or ".join(sorted({f"{folder.path.split('/')[0]}/" for folder in others}))
        raise ValueError(
            f"{directory}: {len(common)} classes are in {top}/ and in {searched}, such as "
            f"{common[:5]}: a class belongs to one of them. {directory / top} alone is split by "
            "class; so is a folder with the images of both"
        )


def _numbered(names: set[str]) -> dict[str, int]:
    """Returns {name: number from 0}, in the order of the names, by size where all are numbers."""

    def by_size(name: str) -> tuple[int, str, str]:
        digits = name.lstrip("0")
        return len(digits), digits, name

    if all(name.isascii() and name.isdigit() for name in names):
        ordered = sorted(names, key=by_size)
    else:
        ordered = sorted(names)
    return {name: number for number, name in enumerate(ordered)}
