"""The metadata of the four benchmarks, in the formats that their authors publish.

Metadata are read as data: a line that differs from the published format is refused with its file
and number, and no path may lead out of the dataset's folder. Paths are those of the metadata.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

from etils import epath

from rll_jax.data import _matlab_annotations, _text_files, paths
from rll_jax.data.listings import GALLERY, QUERY, TEST, TRAIN, Row

CUB_CLASSES, CARS_CLASSES = 200, 196
_Value = TypeVar("_Value")


def read_sop(train: epath.Path, test: epath.Path) -> list[Row]:
    """Returns the images of Ebay_train.txt and Ebay_test.txt of Stanford Online Products."""
    collector = _RowCollector()
    for path, split in ((train, TRAIN), (test, TEST)):
        _read_sop_split(path, split, collector)
    return collector.rows


def _read_sop_split(path: epath.Path, split: str, collector: "_RowCollector") -> None:
    header = ["image_id", "class_id", "super_class_id", "path"]
    table = _read_table(path, len(header), "three numbers and a path")
    line, first = next(table, (1, []))
    if first != header:
        raise ValueError(
            f"{path}, line {line}: expected the header {' '.join(header)!r}, "
            f"found {' '.join(first)!r}"
        )
    line_of_image = {}
    for line, (*numbers, image) in table:
        key, label, super_label = (_positive_number(text) for text in numbers)
        if key is None or label is None or super_label is None or not paths.is_inside_root(image):
            raise ValueError(
                f"{path}, line {line}: expected three numbers and a path inside the dataset, "
                f"found {[*numbers, image]}"
            )
        if line_of_image.setdefault(key, line) != line:
            raise ValueError(f"{path}, line {line}: image {key} is listed twice")
        collector.add(f"{path}, line {line}", image, label - 1, split, super_label - 1)
    if not line_of_image:
        raise ValueError(f"{path} lists no image")


def read_cub(images_file: epath.Path, labels_file: epath.Path) -> list[Row]:
    """Returns the images of images.txt and image_class_labels.txt of CUB-200-2011."""
    image_paths = _read_by_image(
        images_file,
        lambda text: text if paths.is_inside_root(text) else None,
        "a number and a path inside the dataset",
    )
    labels = _read_by_image(labels_file, _positive_number, "a number and a class")
    for file, listed, others in (
        (labels_file, labels, image_paths),
        (images_file, image_paths, labels),
    ):
        if absent := sorted(others.keys() - listed.keys()):
            raise ValueError(f"{file} has no line for {len(absent)} images, such as {absent[:5]}")
    collector = _RowCollector()
    for image, (line, path) in image_paths.items():
        label_line, label = labels[image]
        if label > CUB_CLASSES:
            raise ValueError(
                f"{labels_file}, line {label_line}: image {image} is of class {label}, "
                f"expected 1 to {CUB_CLASSES}"
            )
        split = split_by_half(label, CUB_CLASSES)
        collector.add(f"{images_file}, line {line}", f"images/{path}", label - 1, split)
    return collector.rows


def _read_by_image(
    path: epath.Path, convert: Callable[[str], _Value | None], expected: str
) -> dict[int, tuple[int, _Value]]:
    """Reads a table of image numbers and values: {number of the image: (line, value)}.

    Args:
      path: the table.
      convert: from the text of a value to the value; None where the text is not as expected.
      expected: what a line should hold, in words.
    """
    values = {}
    for line, (key, text) in _read_table(path, 2, expected):
        image, value = _positive_number(key), convert(text)
        if image is None or value is None:
            raise ValueError(
                f"{path}, line {line}: expected {expected}, found {key!r} and {text[:120]!r}"
            )
        if image in values:
            raise ValueError(f"{path}, line {line}: image {key} is listed twice")
        values[image] = line, value
    if not values:
        raise ValueError(f"{path} lists no image")
    return values


def read_cars(tables: list[tuple[epath.Path, str, str]]) -> list[Row]:
    """Returns the images of the .mat files of CARS196.

    Args:
      tables: (file, its column of paths, what is put before these paths).
    """
    collector = _RowCollector()
    for file, column, prefix in tables:
        for number, (path, label) in enumerate(_read_annotations(file, column), start=1):
            split = split_by_half(label, CARS_CLASSES)
            collector.add(f"{file}, annotation {number}", prefix + path, label - 1, split)
    return collector.rows


def _read_annotations(file: epath.Path, column: str) -> Iterator[tuple[str, int]]:
    """Yields (path, class) of each annotation in a .mat file of CARS196, each of them checked."""
    try:
        annotations = _matlab_annotations.read(file.read_bytes(), column)
    except ValueError as error:
        raise ValueError(
            f"{file}: expected MATLAB annotations with the columns {column} and class: {error}"
        ) from error
    for number, (path, label) in enumerate(annotations, start=1):
        is_class = 1 <= label <= CARS_CLASSES and label == int(label)
        if not paths.is_inside_root(path) or not is_class:
            raise ValueError(
                f"{file}, annotation {number}: expected a path inside the dataset and a class "
                f"1 to {CARS_CLASSES}, found {path!r:.120} and {label}"
            )
        yield path, int(label)
    if not annotations:
        raise ValueError(f"{file} lists no image")


def read_inshop(path: epath.Path) -> list[Row]:
    """Returns the images of list_eval_partition.txt of In-shop Clothes Retrieval."""
    header = ["image_name", "item_id", "evaluation_status"]
    head = list(_text_files.read_lines(path))[:2]
    texts = [text for _, text in head]
    count = _positive_number(texts[0].strip()) if texts else None
    if len(head) < 2 or count is None or texts[1].split() != header:
        raise ValueError(
            f"{path}, line {head[0][0] if head else 1}: expected a number of images and then the "
            f"header {' '.join(header)!r}, found {texts}"
        )
    collector = _RowCollector()
    expected = "a path, an item and train, query or gallery"
    for line, (image, item, split) in _read_table(path, len(header), expected, skipped_lines=2):
        label = _positive_number(item.removeprefix("id_"))
        is_known_split = split in (TRAIN, QUERY, GALLERY)
        if not paths.is_inside_root(image) or label is None or not is_known_split:
            raise ValueError(
                f"{path}, line {line}: expected a path inside the dataset, an item such as "
                f"id_00000002 and train, query or gallery, found {[image, item, split]}"
            )
        collector.add(f"{path}, line {line}", image, label - 1, split)
    if len(collector.rows) != count:
        raise ValueError(
            f"{path}, line {head[0][0]}: says {count} images, {len(collector.rows)} are listed"
        )
    return collector.rows


class _RowCollector:
    """Collects the rows of a benchmark and refuses those that contradict earlier ones.

    Attributes:
      rows: the rows so far.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._paths: set[str] = set()
        self._split_of_class: dict[int, str] = {}

    def add(self, where: str, path: str, label: int, split: str, super_label: int = 0) -> None:
        """Adds a row that was read at `where`, a file and a line.

        Raises:
          ValueError: the image is listed already, or its class is both in train and in another
            split.
        """
        if path in self._paths:
            raise ValueError(f"{where}: {path} is listed twice")
        self._paths.add(path)
        earlier = self._split_of_class.setdefault(label, split)
        if (earlier == TRAIN) != (split == TRAIN):
            raise ValueError(
                f"{where}: class {label + 1} is in {split} here, but was in {earlier} before"
            )
        self.rows.append(Row(path, label, split, super_label))


def _read_table(
    path: epath.Path, columns: int, expected: str, skipped_lines: int = 0
) -> Iterator[tuple[int, list[str]]]:
    """Yields (line, its words) of a table whose last column may hold spaces.

    Args:
      path: the table.
      columns: the number of columns.
      expected: what a line should hold, in words.
      skipped_lines: the number of first lines that are left out.
    """
    for line, text in list(_text_files.read_lines(path))[skipped_lines:]:
        words = text.split(maxsplit=columns - 1)
        if len(words) != columns:
            raise ValueError(
                f"{path}, line {line}: expected {expected}, found {text.strip()[:120]!r}"
            )
        yield line, [word.strip() for word in words]


def _positive_number(text: str) -> int | None:
    """Returns a positive whole number of at most nine digits; None where the text is not one."""
    is_number = text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0
    return int(text) if is_number else None


def split_by_half(label: int, classes: int) -> str:
    """Returns train for the first half of the classes, numbered from 1, and test for the others."""
    return TRAIN if label <= classes // 2 else TEST
