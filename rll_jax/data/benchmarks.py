"""The four benchmarks as their authors publish them: the class and the split of each image.

Stanford Online Products (Song et al. 2016), CUB-200-2011 (Wah et al. 2011), CARS196 (Krause et al.
2013; both layouts) and In-shop Clothes Retrieval (Liu et al. 2016), with the splits of Ranked List
Loss. Metadata are read as data: a line that differs from the published format is refused with its
file and number, and no path may lead out of the dataset's folder.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from etils import epath

from rll_jax.data import _matlab_annotations, _text_files, paths
from rll_jax.data.listings import GALLERY, QUERY, TEST, TRAIN, Listing, Row

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz")
_CUB_CLASSES, _CARS_CLASSES = 200, 196
_DEPTHS = ("", "*/", "*/*/")  # published files are looked for so deep in the folder
_Value = TypeVar("_Value")


class _Benchmark(NamedTuple):
    """What is published of a benchmark.

    Attributes:
      title: its name.
      download: how to get its files.
      images: the published number of images of each split.
      classes: the published number of classes of each split.
    """

    title: str
    download: str
    images: dict[str, int]
    classes: dict[str, int]


BENCHMARKS = {
    "sop": _Benchmark(
        "Stanford Online Products",
        "download Stanford_Online_Products.zip (2.9 GB) from "
        "https://cvgl.stanford.edu/projects/lifted_struct/",
        {TRAIN: 59551, TEST: 60502},
        {TRAIN: 11318, TEST: 11316},
    ),
    "cub": _Benchmark(
        "CUB-200-2011",
        "download CUB_200_2011.tgz (1.1 GB) from "
        "https://www.vision.caltech.edu/datasets/cub_200_2011/",
        {TRAIN: 5864, TEST: 5924},
        {TRAIN: 100, TEST: 100},
    ),
    "cars": _Benchmark(
        "CARS196",
        "download car_ims.tgz and cars_annos.mat, or cars_train.tgz, cars_test.tgz, "
        "car_devkit.tgz and cars_test_annos_withlabels.mat, the files of "
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        {TRAIN: 8054, TEST: 8131},
        {TRAIN: 98, TEST: 98},
    ),
    "inshop": _Benchmark(
        "In-shop Clothes Retrieval",
        "ask for Img/img.zip and Eval/list_eval_partition.txt at "
        "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html",
        {TRAIN: 25882, QUERY: 14218, GALLERY: 12612},
        {TRAIN: 3997, QUERY: 3985, GALLERY: 3985},
    ),
}


def read_listing(name: str, directory: paths.AnyPath) -> Listing:
    """Returns the images of a benchmark.

    Args:
      name: "sop", "cub", "cars" or "inshop".
      directory: a folder that holds the published files, unpacked, or one or two folders above.

    Raises:
      ValueError: files are missing (what to download), or metadata are broken (file and line).
    """
    readers = {"sop": _read_sop, "cub": _read_cub, "cars": _read_cars, "inshop": _read_inshop}
    return readers[name](paths.to_path(directory))


def differences(name: str, rows: list[Row]) -> list[str]:
    """Returns a line for each split whose counts differ from the published ones."""
    benchmark, messages = BENCHMARKS[name], []
    for split, images in benchmark.images.items():
        labels = [row.label for row in rows if row.split == split]
        classes = set(labels)
        if (len(labels), len(classes)) == (images, benchmark.classes[split]):
            continue
        text = (
            f"{split} has {len(labels):,} images of {len(classes):,} classes; "
            f"published are {images:,} of {benchmark.classes[split]:,}"
        )
        if name != "inshop":  # its class numbers have gaps
            first = 0 if split == TRAIN else benchmark.classes[TRAIN]
            published = range(first, first + benchmark.classes[split])
            if absent := [str(label + 1) for label in published if label not in classes]:
                text += f"; no image of class {', '.join(absent[:5])}"
                text += ", ..." * (len(absent) > 5)
        messages.append(f"{benchmark.title}: {text}")
    return messages


def _read_sop(directory: epath.Path) -> Listing:
    root = _find_folder(directory, "sop", "Ebay_train.txt")
    collector = _RowCollector()
    for split in (TRAIN, TEST):
        _read_sop_split(root / f"Ebay_{split}.txt", split, collector)
    return Listing(root, collector.rows)


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


def _read_cub(directory: epath.Path) -> Listing:
    root = _find_folder(directory, "cub", "image_class_labels.txt")
    images_file, labels_file = root / "images.txt", root / "image_class_labels.txt"
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
        if label > _CUB_CLASSES:
            raise ValueError(
                f"{labels_file}, line {label_line}: image {image} is of class {label}, "
                f"expected 1 to {_CUB_CLASSES}"
            )
        split = _split_by_half(label, _CUB_CLASSES)
        collector.add(f"{images_file}, line {line}", f"images/{path}", label - 1, split)
    return Listing(root, collector.rows)


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


def _read_cars(directory: epath.Path) -> Listing:
    folder = _find_folder(directory, "cars", "cars_annos.mat", "cars_train_annos.mat")
    if (folder / "cars_annos.mat").exists():
        tables = [(folder / "cars_annos.mat", "relative_im_path", "")]
    else:
        tables = [
            (folder / "cars_train_annos.mat", "fname", "cars_train/"),
            (_find_cars_test_labels(directory), "fname", "cars_test/"),
        ]
    collector = _RowCollector()
    for file, column, prefix in tables:
        for number, (path, label) in enumerate(_read_annotations(file, column), start=1):
            split = _split_by_half(label, _CARS_CLASSES)
            collector.add(f"{file}, annotation {number}", prefix + path, label - 1, split)
    return Listing(_find_image_root(directory, folder, collector.rows), collector.rows)


def _find_cars_test_labels(directory: epath.Path) -> epath.Path:
    for depth in _DEPTHS:
        if files := sorted(directory.glob(f"{depth}cars_test_annos_withlabels*.mat")):
            return files[0]
    raise ValueError(
        f"no cars_test_annos_withlabels.mat in {directory}: {BENCHMARKS['cars'].download} "
        "(those in the devkit are without labels)"
    )


def _read_annotations(file: epath.Path, column: str) -> Iterator[tuple[str, int]]:
    """Yields (path, class) of each annotation in a .mat file of CARS196, each of them checked."""
    try:
        annotations = _matlab_annotations.read(file.read_bytes(), column)
    except ValueError as error:
        raise ValueError(
            f"{file}: expected MATLAB annotations with the columns {column} and class: {error}"
        ) from error
    for number, (path, label) in enumerate(annotations, start=1):
        is_class = 1 <= label <= _CARS_CLASSES and label == int(label)
        if not paths.is_inside_root(path) or not is_class:
            raise ValueError(
                f"{file}, annotation {number}: expected a path inside the dataset and a class "
                f"1 to {_CARS_CLASSES}, found {path!r:.120} and {label}"
            )
        yield path, int(label)
    if not annotations:
        raise ValueError(f"{file} lists no image")


def _read_inshop(directory: epath.Path) -> Listing:
    folder = _find_folder(directory, "inshop", "list_eval_partition.txt")
    path = folder / "list_eval_partition.txt"
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
    return Listing(_find_image_root(directory, folder, collector.rows), collector.rows)


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


def _split_by_half(label: int, classes: int) -> str:
    """Returns train for the first half of the classes, numbered from 1, and test for the others."""
    return TRAIN if label <= classes // 2 else TEST


def _find_folder(directory: epath.Path, name: str, *files: str) -> epath.Path:
    """Returns the folder that holds one of the files: `directory`, or one or two folders below it.

    Raises:
      ValueError: there is none (what to download or to unpack).
    """
    is_folder = directory.is_dir()
    for depth in _DEPTHS:
        for file in files:
            if is_folder and (matches := sorted(directory.glob(depth + file))):
                return matches[0].parent
    benchmark = BENCHMARKS[name]
    how = f"{benchmark.download}, unpack it, and give the folder that it is in"
    archives = [path.name for path in directory.iterdir()] if is_folder else []
    archives = sorted(archive for archive in archives if archive.endswith(ARCHIVES))
    if archives:
        how = (
            f"unpack {', '.join(archives[:4])} there (python -m experiments.prepare "
            f"--dataset={name} --source={directory} --unpack does); "
            f"if that is something else, {how}"
        )
    raise ValueError(
        f"no {benchmark.title} in {directory} (looked for {' or '.join(files)}): {how}"
    )


def _find_image_root(directory: epath.Path, folder: epath.Path, rows: list[Row]) -> epath.Path:
    """Returns the folder that the images' paths start from.

    It is the one, of those near the metadata's `folder`, in which most first parts of the paths
    exist; `folder` itself where none does.
    """
    # An object store may list `directory` itself too, which is harmless.
    inner = [path for path in sorted(directory.iterdir()) if path.is_dir()]
    first_parts = {row.path.split("/")[0] for row in rows}
    return max(
        [folder, folder.parent, directory, *inner],
        key=lambda root: sum((root / part).exists() for part in first_parts),
    )
