"""Datasets of one's own: a folder for each class, or a table of paths and classes."""

from collections.abc import Iterator
from concurrent import futures
import csv
import pathlib
from typing import NamedTuple

from etils import epath
import numpy as np

from rll_jax.data import _text_files, paths
from rll_jax.data.listings import GALLERY, QUERY, SPLITS, TEST, TRAIN, Row

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_COLUMNS = ("path", "label", "split", "super_label", "group", "image_id")
_SPLIT_LIKE = ("train", "test", "val", "valid", "validation")  # no names of classes


class _ClassFolder(NamedTuple):
    """A class's folder: its path from the root, its split (or ""), its images' paths from it."""

    path: str
    split: str
    images: list[str]


def class_folders(directory: paths.AnyPath, test_share: float = 0.5, seed: int = 0) -> list[Row]:
    """Lists the images of a folder that has one folder for each class.

    The folder may also have train/ and test/, each with one folder for each class. Classes are
    numbered in the order of their names. Class folders without images are left out, and so are
    files and folders whose name starts with a dot.

    Args:
      directory: the folder, local or in an object store.
      test_share: the share of the classes that is test, where there are no train/ and test/.
      seed: draws these classes.

    Raises:
      ValueError: the folder does not exist, has fewer than two classes with images, has folders
        named like splits other than train and test, or has a class in both train/ and test/.
    """
    directory = epath.Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder")
    has_splits = _has_split_folders(directory)
    classes = _find_classes(directory, [TRAIN, TEST] if has_splits else [""])
    if len(classes) < 2:
        raise ValueError(
            f"{directory}: expected a folder of images for each class (or train/ and test/ with "
            f"such folders), found {len(classes)} with images"
        )
    if has_splits:
        _check_class_names(directory, classes)
        splits = [folder.split for folder in classes]
    else:
        splits = split_classes(len(classes), test_share, seed)
    return [
        Row(f"{folder.path}/{image}", label, split)
        for label, (folder, split) in enumerate(zip(classes, splits, strict=True))
        for image in folder.images
    ]


def split_classes(classes: int, test_share: float, seed: int) -> list[str]:
    """Returns train or test for each class number.

    A share of the classes, drawn by the seed, is test; at least one class is test and one train.
    """
    num_test = min(max(round(classes * test_share), 1), classes - 1)
    test = set(np.random.default_rng(seed).permutation(classes)[:num_test].tolist())
    return [TEST if label in test else TRAIN for label in range(classes)]


def read_index(file: paths.AnyPath, test_share: float = 0.5, seed: int = 0) -> list[Row]:
    """Lists the images of a table: a .csv or .parquet file.

    Its columns are path and label, and optionally split, super_label, group and image_id. Other
    columns are ignored. A path starts from the dataset's root folder. A label is any text or
    number; classes are numbered in the order of their labels, and numbers by size where all labels
    are numbers. A split is train or test, or else train, query or gallery. A query is not ranked
    against images of its own group (any text or number: the same camera, sequence or product shot)
    nor against those of its own image_id (the same image in another file). An empty cell is none.

    Args:
      file: the table, local or in an object store.
      test_share: the share of the classes that is test, where the table has no splits.
      seed: draws these classes.

    Raises:
      ValueError: a row is wrong (which one, and why), the splits share a class or do not go
        together, the file does not exist, or it is neither a .csv nor a .parquet.
    """
    file = epath.Path(file)
    entries = _read_entries(file)
    if not entries:
        raise ValueError(f"{file}: lists no image")
    _check_entry_splits(file, entries)
    labels = _numbered({entry.label for entry in entries})
    super_labels = _numbered({entry.super_label for entry in entries})
    splits = [entry.split for entry in entries]
    if "" in splits:
        if len(labels) < 2:
            raise ValueError(
                f"{file}: expected at least two classes, to be split, found {len(labels)}"
            )
        split_of_class = split_classes(len(labels), test_share, seed)
        splits = [split_of_class[labels[entry.label]] for entry in entries]
    return [
        Row(
            entry.path,
            labels[entry.label],
            split,
            super_labels[entry.super_label],
            entry.group,
            entry.image_id,
        )
        for entry, split in zip(entries, splits, strict=True)
    ]


def _has_split_folders(directory: epath.Path) -> bool:
    """Whether the folder holds train/ and test/, and not the folders of classes.

    Raises:
      ValueError: it holds other names of splits, or names of splits and others.
    """
    names = {folder.name for folder in _subfolders(directory)}
    if names == {TRAIN, TEST}:
        return True
    if splits := sorted(name for name in names if name.lower() in _SPLIT_LIKE):
        others = " and others" if set(splits) != names else ""
        raise ValueError(
            f"{directory}: holds {', '.join(splits)}{others}: expected train and test with the "
            "classes in them, or the classes alone; --index takes any other arrangement"
        )
    return False


def _find_classes(directory: epath.Path, splits: list[str]) -> list[_ClassFolder]:
    """Returns the class folders with images, sorted by path; "" is the split of `directory`."""
    folders = [(split, sub) for split in splits for sub in _subfolders(directory / split)]
    with futures.ThreadPoolExecutor(16) as pool:  # each asks the file system at least once
        images = list(pool.map(_image_names, [folder for _, folder in folders]))
    classes = [
        _ClassFolder(f"{split}/{folder.name}" if split else folder.name, split, names)
        for (split, folder), names in zip(folders, images, strict=True)
        if names
    ]
    return sorted(classes, key=lambda folder: folder.path)


def _check_class_names(directory: epath.Path, classes: list[_ClassFolder]) -> None:
    train, test = (
        {folder.path.removeprefix(f"{split}/") for folder in classes if folder.split == split}
        for split in (TRAIN, TEST)
    )
    if common := sorted(train & test):
        raise ValueError(
            f"{directory}: {len(common)} classes are in train/ and in test/, such as {common[:5]}: "
            "a class belongs to one of them"
        )


def _subfolders(directory: epath.Path) -> list[epath.Path]:
    """Returns the folders in a folder, sorted by name, without those that start with a dot."""
    folders = [
        path
        for path in directory.iterdir()
        # An object store may list the folder itself.
        if path != directory and not path.name.startswith(".") and path.is_dir()
    ]
    return sorted(folders, key=lambda folder: folder.name)


def _image_names(folder: epath.Path) -> list[str]:
    """Returns the images in a class's folder and in the folders below: their paths from it."""
    if paths.is_remote(folder):  # epath's `walk` fails there
        import fsspec

        system, top = fsspec.core.url_to_fs(str(folder))
        names = [file.removeprefix(f"{top}/") for file in system.find(top)]
    else:
        names = [
            (parent / name).relative_to(folder).as_posix()
            for parent, _, files in epath.Path(folder).walk()
            for name in files
        ]
    return sorted(
        name
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.split("/")[-1].startswith(".")
    )


class _Entry(NamedTuple):
    """A row of a table, checked by itself, and where it is: "line 4" or "row 3"."""

    path: str
    label: str
    split: str
    super_label: str
    group: str
    image_id: str
    place: str


def _read_entries(file: epath.Path) -> list[_Entry]:
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if file.suffix not in readers:
        raise ValueError(f"{file}: expected a .csv or a .parquet")
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    entries: dict[str, _Entry] = {}
    for place, cells in readers[file.suffix](file):
        path, label, split, super_label, group, image_id = (
            cells.get(column, "") for column in _COLUMNS
        )
        if not paths.is_inside_root(path):
            raise ValueError(
                f"{file}, {place}: the path is {path!r:.120}, expected one inside --data_dir, "
                "from there, with /"
            )
        if not label:
            raise ValueError(f"{file}, {place}: expected a label, found none")
        if split not in (*SPLITS, ""):
            raise ValueError(
                f"{file}, {place}: the split is {split!r:.80}, expected one of {', '.join(SPLITS)}"
            )
        path = pathlib.PurePosixPath(path).as_posix()  # ./a and a are the same path
        if path in entries:
            raise ValueError(f"{file}, {place}: {path} was listed in {entries[path].place} already")
        entries[path] = _Entry(path, label, split, super_label, group, image_id, place)
    return list(entries.values())


def _check_entry_splits(file: epath.Path, entries: list[_Entry]) -> None:
    """Raises ValueError unless all or no entries have a split, and no class is in train and not."""
    splits = {entry.split for entry in entries}
    if "" in splits and len(splits) > 1:
        first = next(entry.place for entry in entries if not entry.split)
        raise ValueError(
            f"{file}, {first}: some rows have a split and some have none, this one among them"
        )
    if TEST in splits and splits & {QUERY, GALLERY}:
        raise ValueError(
            f"{file}: has splits test and query or gallery: expected train and test, or train, "
            "query and gallery"
        )
    train = {entry.label for entry in entries if entry.split == TRAIN}
    test = {entry.label for entry in entries if entry.split not in (TRAIN, "")}
    if common := sorted(train & test):
        others = "/".join(sorted(splits - {TRAIN}))
        raise ValueError(
            f"{file}: {len(common)} classes are in train and in {others}, such as "
            f"{', '.join(common[:5])}"
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


def _read_csv(file: epath.Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ("line 2", {column: text}) for each row of a .csv."""
    header = []
    for line, text in _text_files.read_lines(file):
        try:
            cells = [cell.strip() for cell in next(csv.reader([text], strict=True))]
        except csv.Error as error:  # also a quoted field that goes on in the next line
            raise ValueError(f"{file}, line {line}: not a table with commas: {error}") from None
        if not header:
            header = cells
            if not {"path", "label"} <= set(header) or len(set(header)) != len(header):
                raise ValueError(
                    f"{file}, line {line}: expected a header with the columns path and label, "
                    f"found {','.join(header)!r:.120}"
                )
            continue
        if len(cells) != len(header):
            raise ValueError(
                f"{file}, line {line}: expected {len(header)} fields, found {len(cells)}"
            )
        yield f"line {line}", dict(zip(header, cells, strict=True))
    if not header:
        raise ValueError(
            f"{file}, line 1: expected a header with the columns path and label, found nothing"
        )


def _read_parquet(file: epath.Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ("row 0", {column: text}) for each row of a .parquet."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{file}: reading Parquet needs pyarrow (pip install pyarrow); a .csv needs nothing"
        ) from None
    try:
        content = parquet.ParquetFile(pa.BufferReader(file.read_bytes()))
        names = content.schema_arrow.names
        table = content.read(columns=[column for column in _COLUMNS if column in names])
    except Exception as error:  # pyarrow's decoders raise errors of many kinds
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{file}: not a Parquet file: {reason}") from error
    if not {"path", "label"} <= set(names):
        raise ValueError(f"{file}: expected the columns path and label, found {', '.join(names)}")
    for row, cells in enumerate(table.to_pylist()):
        yield f"row {row}", {name: _cell_text(cell, file, row) for name, cell in cells.items()}


def _cell_text(cell: object, file: epath.Path, row: int) -> str:
    """Returns the text of a Parquet cell; "" where it is empty."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # pandas makes floats of whole numbers with gaps
    if cell is not None and not isinstance(cell, str | int):
        raise ValueError(f"{file}, row {row}: expected text or a whole number, found {cell!r:.80}")
    return "" if cell is None else str(cell)
