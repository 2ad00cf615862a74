"""Anyone's own pictures: a folder for each class, or a table of paths and classes."""

from concurrent import futures
import csv
import pathlib

from etils import epath
import numpy as np

from rll_jax.data import benchmarks
from rll_jax.data.benchmarks import Row

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_COLUMNS = ("path", "label", "split", "super_label")


def class_folders(directory, test_share: float = 0.5, seed: int = 0) -> list[Row]:
    """The images of a folder with one folder for each class, or with train/ and test/ of such folders.

    Classes are numbered in the order of their names. Without train/ and test/ a share of the classes, drawn by the seed, is test.

    Raises:
      ValueError: no such folder, fewer than two classes in it, or no images.
    """
    directory = epath.Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder")
    inner = [directory / split for split in (benchmarks.TRAIN, benchmarks.TEST)]
    given = all(folder.is_dir() for folder in inner)
    names = {folder.name for folder in _folders(directory)}
    splits = sorted(
        name for name in names if name.lower() in ("train", "test", "val", "valid", "validation")
    )
    if splits and names != {benchmarks.TRAIN, benchmarks.TEST}:
        raise ValueError(
            f"{directory}: holds {', '.join(splits)}{' and others' * (set(splits) != names)}: expected train and test with the classes in "
            "them, or the classes alone; --index takes any other arrangement"
        )
    folders = (
        [(sub, folder.name) for folder in inner for sub in _folders(folder)]
        if given
        else [(sub, "") for sub in _folders(directory)]
    )
    with futures.ThreadPoolExecutor(16) as pool:  # a question to the file system each, or more
        images = list(pool.map(lambda item: _images(item[0]), folders))
    found = [
        (f"{s}/{sub.name}" if s else sub.name, s, files) for (sub, s), files in zip(folders, images)
    ]
    found = sorted(
        ((name, split, files) for name, split, files in found if files), key=lambda item: item[0]
    )
    if len(found) < 2:
        raise ValueError(
            f"{directory}: expected a folder of images for each class (or train/ and test/ of such), found {len(found)} with images"
        )
    twice = {name.partition("/")[2] for name, split, _ in found if split == "train"} & {
        name.partition("/")[2] for name, split, _ in found if split == "test"
    }
    if twice:
        raise ValueError(
            f"{directory}: {len(twice)} classes are in train/ and in test/, such as {sorted(twice)[:5]}: a class belongs to one of them"
        )
    splits = (
        [split for _, split, _ in found] if given else split_classes(len(found), test_share, seed)
    )
    return [
        Row(f"{name}/{file}", label, split)
        for label, ((name, _, files), split) in enumerate(zip(found, splits))
        for file in files
    ]


def split_classes(classes: int, test_share: float, seed: int) -> list[str]:
    """train or test for each class: a share by chance, at least one class of each."""
    tested = min(max(round(classes * test_share), 1), classes - 1)
    chosen = set(np.random.default_rng(seed).permutation(classes)[:tested].tolist())
    return [benchmarks.TEST if label in chosen else benchmarks.TRAIN for label in range(classes)]


def read_index(file, test_share: float = 0.5, seed: int = 0) -> list[Row]:
    """The images of a .csv or .parquet with the columns path and label, and, by option, split and super_label.

    A label is any text or number; classes are numbered in the order of their labels, numbers by size. split is train or test, or train,
    query and gallery; without it a share of the classes, drawn by the seed, is test. Other columns are not looked at.

    Raises:
      ValueError: which row is at fault, and why; or no such file, or another kind of file.
    """
    file = epath.Path(file)
    readers = {".csv": _csv_rows, ".parquet": _parquet_rows}
    if file.suffix not in readers:
        raise ValueError(f"{file}: expected a .csv or a .parquet")
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    found, seen = [], {}
    for where, row in readers[file.suffix](file):
        path, label, split, super_label = (row.get(column, "") for column in _COLUMNS)
        if not benchmarks.inside(path):
            raise ValueError(
                f"{file}, {where}: the path is {path!r:.120}, expected one inside --data_dir, from there, with /"
            )
        if not label:
            raise ValueError(f"{file}, {where}: expected a label, found none")
        path = pathlib.PurePosixPath(path).as_posix()  # ./a and a are one
        if split not in (*benchmarks.SPLITS, ""):
            raise ValueError(
                f"{file}, {where}: the split is {split!r:.80}, expected one of {', '.join(benchmarks.SPLITS)}"
            )
        if path in seen:
            raise ValueError(f"{file}, {where}: {path} was listed in {seen[path]} already")
        seen[path] = where
        found.append((path, label, split, super_label))
    splits = {split for _, _, split, _ in found}
    if not found:
        raise ValueError(f"{file}: lists no image")
    if "" in splits and len(splits) > 1:
        first = next(seen[path] for path, _, split, _ in found if not split)
        raise ValueError(
            f"{file}, {first}: some rows have a split and some have none, this one among them"
        )
    if "test" in splits and splits & {"query", "gallery"}:
        raise ValueError(
            f"{file}: has splits test and query or gallery: expected train and test, or train, query and gallery"
        )
    trained, tested = (
        {row[1] for row in found if (row[2] == "train") == part and row[2]}
        for part in (True, False)
    )
    if common := sorted(trained & tested):
        raise ValueError(
            f"{file}: {len(common)} classes are in train and in {'/'.join(sorted(splits - {'train'}))}, such as {', '.join(common[:5])}"
        )
    labels, super_labels = (_numbered({row[column] for row in found}) for column in (1, 3))
    if "" in splits and len(labels) < 2:
        raise ValueError(f"{file}: expected at least two classes, to be split, found {len(labels)}")
    split_of = split_classes(len(labels), test_share, seed) if "" in splits else None
    return [
        Row(path, labels[label], split or split_of[labels[label]], super_labels[sup])
        for path, label, split, sup in found
    ]


def _numbered(names: set[str]) -> dict[str, int]:
    """{name: number from 0} in their order, that of numbers where all are."""
    digits = all(name.isascii() and name.isdigit() for name in names)
    return {
        name: n
        for n, name in enumerate(
            sorted(
                names,
                key=lambda name: (
                    (len(name.lstrip("0")), name.lstrip("0"), name) if digits else name
                ),
            )
        )
    }


def _csv_rows(file):
    head = []
    for at, text in benchmarks.lines(file):
        try:
            cells = [cell.strip() for cell in next(csv.reader([text], strict=True))]
        except csv.Error as error:  # a quoted field that goes on in the next line, too
            raise ValueError(f"{file}, line {at}: not a table with commas: {error}")
        if not head:
            head = cells
            if not {"path", "label"} <= set(head) or len(set(head)) != len(head):
                raise ValueError(
                    f"{file}, line {at}: expected a header with the columns path and label, found {','.join(head)!r:.120}"
                )
            continue
        if len(cells) != len(head):
            raise ValueError(f"{file}, line {at}: expected {len(head)} fields, found {len(cells)}")
        yield f"line {at}", dict(zip(head, cells))
    if not head:
        raise ValueError(
            f"{file}, line 1: expected a header with the columns path and label, found nothing"
        )


def _parquet_rows(file):
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{file}: reading Parquet needs pyarrow (pip install pyarrow); a .csv needs nothing"
        )
    try:
        whole = parquet.ParquetFile(pa.BufferReader(file.read_bytes()))
        names = whole.schema_arrow.names
        table = whole.read(columns=[column for column in _COLUMNS if column in names])
    except Exception as error:  # pyarrow's own kinds, and what its decoders raise
        raise ValueError(
            f"{file}: not a Parquet file: {str(error).splitlines()[0] if str(error) else error!r}"
        )
    if not {"path", "label"} <= set(names):
        raise ValueError(f"{file}: expected the columns path and label, found {', '.join(names)}")
    for row, cells in enumerate(table.to_pylist()):
        yield f"row {row}", {name: _text(cell, file, row) for name, cell in cells.items()}


def _text(cell, file, row) -> str:
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # what pandas makes of whole numbers with gaps
    if cell is not None and not isinstance(cell, str | int):
        raise ValueError(f"{file}, row {row}: expected text or a whole number, found {cell!r:.80}")
    return "" if cell is None else str(cell)


def _folders(directory) -> list:
    subs = (
        sub for sub in directory.iterdir() if sub != directory and not sub.name.startswith(".")
    )  # an object store may list itself
    return sorted((sub for sub in subs if sub.is_dir()), key=lambda sub: sub.name)


def _images(folder) -> list[str]:
    """The names of the images under a class's folder, its folders too."""
    if benchmarks.is_remote(folder):  # over which epath's walk fails
        import fsspec

        system, top = fsspec.core.url_to_fs(str(folder))
        found = [file.removeprefix(f"{top}/") for file in system.find(top)]
    else:
        found = [
            (parent / name).relative_to(folder).as_posix()
            for parent, _, names in epath.Path(folder).walk()
            for name in names
        ]
    return sorted(
        file
        for file in found
        if file.lower().endswith(SUFFIXES) and not file.split("/")[-1].startswith(".")
    )
