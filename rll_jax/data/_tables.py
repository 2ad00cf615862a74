"""Tables of images in .csv and .parquet files: checked rows, the same from both kinds of file.

A cell becomes a text: what pandas writes into a .csv for it. Words that pandas reads as empty are
empty here too. The columns are those of `folders.read_index`, and those of the data frames of
open-metric-learning: is_query, is_gallery and bounding boxes.
"""

from collections.abc import Iterator
import csv
import decimal
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from rll_jax.data import _text_files, files, paths
from rll_jax.data.listings import GALLERY, QUERY, SPLITS, TEST, TRAIN

_NEEDED = {"path", "label"}
_ROLES = ("is_query", "is_gallery")
_MOST_PIXELS = 2**31
_BOX = ("x_1", "y_1", "x_2", "y_2")
_NAMES = ("super_label", "group", "image_id", "category", "sequence")
_KNOWN = (*_NEEDED, "split", *_NAMES, *_ROLES, *_BOX)
_HEAD = 1 << 16  # bytes in which a header is looked for
_EMPTY = {"", "nan", "-nan", "nat", "none", "null", "nil", "na", "n/a", "#na", "#n/a", "<na>"}
# What people call the splits. The images of one that they validate on are searched.
SPLIT_WORDS = {
    **{word: TRAIN for word in ("train", "training")},
    **{word: TEST for word in ("test", "testing")},
    **{word: TEST for word in ("val", "valid", "validation", "validate", "dev", "eval")},
    **{word: QUERY for word in ("query", "queries")},
    **{word: GALLERY for word in ("gallery", "galleries")},
}
TEST_WORDS = ("test", "testing")
_TRUE, _FALSE = {"true", "t", "yes", "1"}, {"false", "f", "no", "0"}
_WHOLE_FLOAT = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")


class Entry(NamedTuple):
    """A row of a table, checked by itself.

    Attributes:
      path: the image, from the dataset's root folder.
      label: the class, as text.
      split: one of `listings.SPLITS`, or "" where the table has none.
      super_label: the super class, as text; "" where the table has none.
      group: images that do not answer each other, as text; "" where the table has none.
      image_id: the image of which this is a file, as text; "" where the table has none.
      box: what of the image is read, see `listings.Row`; None: all of it.
      place: where the row is: "line 4" or "row 3".
    """

    path: str
    label: str
    split: str
    super_label: str
    group: str
    image_id: str
    box: tuple[int, int, int, int] | None
    place: str


def read_entries(file: epath.Path, root: paths.AnyPath | None = None) -> list[Entry]:
    """Returns the rows of a table.

    Args:
      file: a .csv or a .parquet.
      root: the dataset's root folder. Absolute paths below it are taken from there. Without it
        absolute paths are refused.

    Raises:
      ValueError: a row is wrong, or an image is listed twice, or two of test and val and query go
        together (which row, and why); the file does not exist, or is no table.
    """
    entries: dict[tuple[str, tuple[int, ...] | None], Entry] = {}
    unsaid = ""  # the first test row of which no column says whether it is query or gallery
    words: dict[str, str] = {}  # where each kind of split is first
    starts, name = _starts_of_paths(root), str(file)
    for place, cells in _read_cells(file):
        entry = _read_entry(cells, place, f"{name}, {place}", starts)
        key = entry.path, entry.box
        if key in entries:
            raise ValueError(
                f"{file}, {place}: {entry.path} was listed in {entries[key].place} already"
            )
        entries[key] = entry
        if entry.split == TEST and all(_is_empty(cells.get(column, "")) for column in _ROLES):
            unsaid = unsaid or place
        if SPLIT_WORDS.get(word := cells.get("split", "").lower()) == TEST:
            words.setdefault("test" if word in TEST_WORDS else "val", place)
    if len(words) == 2:
        raise ValueError(
            f"{file}: has split test ({words['test']}) and val ({words['val']}), and one split is "
            "searched: remove the rows of the other, or let them train"
        )
    _check_splits(file, list(entries.values()), unsaid)
    return list(entries.values())


def is_data_frame(file: epath.Path) -> bool:
    """Whether a file is a table with the columns that open-metric-learning needs."""
    try:
        is_parquet = file.suffix.lower() == ".parquet"
        names = _read_parquet_names(file) if is_parquet else _read_csv_names(file)
    except (ValueError, OSError):
        return False
    return {*_NEEDED, "split", *_ROLES} <= set(names)


def _read_entry(cells: dict[str, str], place: str, where: str, starts: list[str]) -> Entry:
    path = cells["path"]
    start = next((start for start in starts if path.startswith(start)), "")
    path = path.removeprefix(start)
    if _is_empty(path) or paths.is_remote(path) or not paths.is_inside_root(path):
        raise ValueError(
            f"{where}: the path is {path!r:.120}, expected one inside --data_dir, from there, "
            "with /"
        )
    label = cells["label"]
    if not label:
        raise ValueError(f"{where}: expected a label, found none")
    if label.lower() in _EMPTY:
        raise ValueError(
            f"{where}: expected text or a whole number as the label, found {label!r}, which "
            "stands for no label"
        )
    split = _read_split(cells, where)
    # open-metric-learning calls them category and sequence.
    others = cells if set(_ROLES) <= cells.keys() else {}
    super_label = cells.get("super_label", others.get("category", ""))
    group = cells.get("group", others.get("sequence", ""))
    return Entry(
        pathlib.PurePosixPath(path).as_posix(),  # ./a and a are the same path
        _canonical(label),
        split,
        _canonical_or_empty(super_label),
        _canonical_or_empty(group),
        _canonical_or_empty(cells.get("image_id", "")),
        _read_box(cells, where),
        place,
    )


def _read_box(cells: dict[str, str], where: str) -> tuple[int, int, int, int] | None:
    """Returns the bounding box of a row, to the nearest pixels; None where it has none."""
    texts = {column: cells.get(column, "") for column in _BOX}
    boxed = [column for column, text in texts.items() if not _is_empty(text)]
    if not boxed:
        return None
    if len(boxed) < len(_BOX):
        raise ValueError(
            f"{where}: has a bounding box ({', '.join(boxed)}), and images are read whole unless "
            f"{', '.join(_BOX)} all are given"
        )
    try:
        numbers = [float(text) for text in texts.values()]
    except ValueError:
        numbers = [math.nan]
    shown = ", ".join(f"{column}={text:.20}" for column, text in texts.items())
    if not all(abs(number) < _MOST_PIXELS for number in numbers):  # NaN neither
        raise ValueError(f"{where}: the bounding box is {shown}, expected numbers of pixels")
    left, top, right, bottom = map(round, numbers)
    if right <= max(left, 0) or bottom <= max(top, 0):
        raise ValueError(
            f"{where}: the bounding box {shown} has no pixels: expected x_1 < x_2 and y_1 < y_2, "
            "counted from the left upper corner"
        )
    return left, top, right, bottom


def _canonical_or_empty(cell: str) -> str:
    return "" if _is_empty(cell) else _canonical(cell)


def _starts_of_paths(root: paths.AnyPath | None) -> list[str]:
    """Returns what absolute paths below the root start with, also where it is a link."""
    if root is None:
        return []
    is_remote = paths.is_remote(root)
    roots = [str(root)] if is_remote else [os.path.abspath(root), os.path.realpath(root)]
    return [f"{top.rstrip('/')}/" for top in roots]


def _is_empty(text: str) -> bool:
    return text.lower() in _EMPTY


def _canonical(text: str) -> str:
    """Returns one text for the texts of a whole number, and of a truth value; others as they are.

    10.0 and 10 are alike. 010 is a name, not a number.
    """
    if whole := _WHOLE_FLOAT.fullmatch(text):
        return "0" if whole[1] == "-0" else whole[1]
    return text.capitalize() if text.lower() in ("true", "false") else text


def _read_split(cells: dict[str, str], where: str) -> str:
    """Returns the split of a row by its columns split, is_query and is_gallery."""
    text = cells.get("split", "")
    split = "" if _is_empty(text) else SPLIT_WORDS.get(text.lower())
    if split is None:
        raise ValueError(
            f"{where}: the split is {text!r:.80}, expected one of {', '.join(SPLITS)}; val and "
            "validation are read as test"
        )
    query, gallery = (_truth(cells.get(column, ""), column, where) for column in _ROLES)
    if "is_gallery" not in cells and query is not None:
        gallery = not query
    if "is_query" not in cells and gallery is not None:
        query = not gallery
    if query is None and gallery is None:
        return split
    if split in ("", TRAIN):
        if (query and "is_query" in cells) or (gallery and "is_gallery" in cells):
            raise ValueError(
                f"{where}: is_query or is_gallery is true, and the split is {split or 'none'}: "
                "expected validation or test"
            )
        return split
    if not query and not gallery:
        raise ValueError(
            f"{where}: is_query and is_gallery are both false: expected one of them, or both, to "
            f"be true where the split is {text}"
        )
    role = TEST if query and gallery else QUERY if query else GALLERY
    if split not in (TEST, role):
        raise ValueError(f"{where}: the split is {split}, and is_query and is_gallery say {role}")
    return role


def _truth(text: str, column: str, where: str) -> bool | None:
    """Returns the truth value of a cell; None where it is empty."""
    word = _canonical(text).lower()
    if word in _EMPTY:
        return None
    if word not in _TRUE | _FALSE:
        raise ValueError(f"{where}: {column} is {text!r:.80}, expected True, False or nothing")
    return word in _TRUE


def _check_splits(file: epath.Path, entries: list[Entry], unsaid: str) -> None:
    """Raises ValueError unless all or no rows have a split, and no class is in train and not.

    Also where test rows go with queries or galleries, and no columns say that they are both.

    Args:
      file: the table.
      entries: its rows.
      unsaid: the first test row without such columns, or "".
    """
    places: dict[str, str] = {}
    for entry in entries:
        places.setdefault(entry.split, entry.place)
    if "" in places and len(places) > 1:
        raise ValueError(
            f"{file}, {places['']}: some rows have a split and some have none, this one among them"
        )
    if unsaid and (apart := sorted({QUERY, GALLERY} & places.keys())):
        raise ValueError(
            f"{file}: has splits test and query or gallery: {unsaid} is searched and found, "
            f"{places[apart[0]]} is {apart[0]} alone: expected train and test, or train, query and "
            "gallery"
        )
    train = {entry.label for entry in entries if entry.split == TRAIN}
    test = {entry.label for entry in entries if entry.split not in (TRAIN, "")}
    if common := sorted(train & test):
        others = "/".join(sorted(places.keys() - {TRAIN}))
        raise ValueError(
            f"{file}: {len(common)} classes are in train and in {others}, such as "
            f"{', '.join(common[:5])}"
        )


# ---- Files


def _read_cells(file: epath.Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ("line 2", {column: text}) for each row; a column's name and text are stripped."""
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if file.suffix.lower() not in readers:
        raise ValueError(f"{file}: expected a .csv or a .parquet")
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    return readers[file.suffix.lower()](file)


def _column_names(header: list[str]) -> list[str]:
    """Returns the names of columns without spaces; in lower case where path or label are not."""
    names = [name.strip() for name in header]
    if set(names) >= _NEEDED:
        return names
    return [name.lower() if name.lower() in _KNOWN else name for name in names]


def _has_columns(names: list[str]) -> bool:
    """Whether the columns that are needed are there, and none that is known is there twice."""
    known = [name for name in names if name in _KNOWN]
    return set(names) >= _NEEDED and len(set(known)) == len(known)


def _read_csv_names(file: epath.Path) -> list[str]:
    with file.open("rb") as stream:  # the file may be large, and is perhaps no table
        head = stream.read(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
    line = (head.splitlines() or [b""])[0]
    return _column_names(_csv_cells(line.decode(), f"{file}, line 1"))


def _csv_cells(text: str, where: str) -> list[str]:
    try:
        cells = next(csv.reader([text], strict=True, skipinitialspace=True))
    except csv.Error as error:  # also a quoted field that goes on in the next line
        raise ValueError(f"{where}: not a table with commas: {error}") from None
    return [cell.strip() for cell in cells]


def _read_csv(file: epath.Path) -> Iterator[tuple[str, dict[str, str]]]:
    header, name = [], str(file)
    for line, text in _text_files.read_lines(file):
        cells = _csv_cells(text, f"{name}, line {line}")
        if not header:
            header = _column_names(cells)
            if not _has_columns(header):
                raise ValueError(
                    f"{file}, line {line}: expected a header with the columns path and label, "
                    f"with commas between, found {','.join(header)!r:.120}"
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


def _read_parquet_names(file: epath.Path) -> list[str]:
    _, parquet = _pyarrow(file)
    try:
        with file.open("rb") as stream:  # reads its end alone
            return _column_names(parquet.read_schema(stream).names)
    except Exception as error:  # pyarrow's decoders raise errors of many kinds
        raise ValueError(f"{file}: not a Parquet file: {files.first_line(error)}") from error


def _pyarrow(file: epath.Path) -> tuple[Any, Any]:
    """Returns the modules pyarrow and pyarrow.parquet."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{file}: reading Parquet needs pyarrow (pip install pyarrow); a .csv needs nothing"
        ) from None
    return pa, parquet


def _read_parquet(file: epath.Path) -> Iterator[tuple[str, dict[str, str]]]:
    pa, parquet = _pyarrow(file)
    names = _read_parquet_names(file)
    if not _has_columns(names):
        raise ValueError(
            f"{file}: expected the columns path and label, each once, found {', '.join(names)}"
        )
    try:
        content = parquet.ParquetFile(pa.BufferReader(file.read_bytes()))
        schema = content.schema_arrow
        stored = {known: name for name, known in zip(schema.names, names, strict=True)}
        stored = {known: name for known, name in stored.items() if known in _KNOWN}
        table = content.read(columns=list(stored.values()))
        columns = {known: table.column(name).to_pylist() for known, name in stored.items()}
    except Exception as error:  # pyarrow's decoders raise errors of many kinds
        raise ValueError(f"{file}: not a Parquet file: {files.first_line(error)}") from error
    narrow = {"halffloat": np.float16, "float": np.float32}
    floats = {
        known: narrow.get(str(schema.field(name).type), float) for known, name in stored.items()
    }
    for row in range(table.num_rows):
        where = f"{file}, row {row}"
        texts = {c: _cell_text(cells[row], floats[c], where) for c, cells in columns.items()}
        yield f"row {row}", texts


def _cell_text(cell: object, float_type: type, where: str) -> str:
    """Returns the text of a Parquet cell, as a .csv would hold it; "" where it is empty."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        return str(float_type(cell))
    if not isinstance(cell, str | int | decimal.Decimal):
        raise ValueError(f"{where}: expected text or a whole number, found {cell!r:.80}")
    return str(cell).strip()
