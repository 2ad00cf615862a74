"""The four benchmarks as their authors publish them: which images there are, of which class, in which split.

Stanford Online Products (Song et al. 2016), CUB-200-2011 (Wah et al. 2011), CARS196 (Krause et al. 2013; both layouts) and In-shop
Clothes Retrieval (Liu et al. 2016), with the splits of Ranked List Loss. Metadata are read as data: what is not as published is
refused with file and line, and no path leads out of the set.
"""

import json
import pathlib
import subprocess
import sys
from typing import Iterator, NamedTuple

from etils import epath

TRAIN, TEST, QUERY, GALLERY = SPLITS = ("train", "test", "query", "gallery")
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz")
_CUB_CLASSES, _CARS_CLASSES = 200, 196


class Row(NamedTuple):
    """An image: its path from the root with "/", its class, its split (train and test, or train, query and gallery)."""

    path: str
    label: int
    split: str
    super_label: int = 0


class Listing(NamedTuple):
    """Images under a folder."""

    root: epath.Path
    rows: list[Row]


class _Benchmark(NamedTuple):
    title: str
    download: str
    images: dict[str, int]  # published, of each split
    classes: dict[str, int]


BENCHMARKS = {
    "sop": _Benchmark(
        "Stanford Online Products",
        "download Stanford_Online_Products.zip (2.9 GB) from https://cvgl.stanford.edu/projects/lifted_struct/",
        {TRAIN: 59551, TEST: 60502}, {TRAIN: 11318, TEST: 11316},
    ),
    "cub": _Benchmark(
        "CUB-200-2011",
        "download CUB_200_2011.tgz (1.1 GB) from https://www.vision.caltech.edu/datasets/cub_200_2011/",
        {TRAIN: 5864, TEST: 5924}, {TRAIN: 100, TEST: 100},
    ),
    "cars": _Benchmark(
        "CARS196",
        "download car_ims.tgz and cars_annos.mat, or cars_train.tgz, cars_test.tgz, car_devkit.tgz and "
        "cars_test_annos_withlabels.mat, the files of https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        {TRAIN: 8054, TEST: 8131}, {TRAIN: 98, TEST: 98},
    ),
    "inshop": _Benchmark(
        "In-shop Clothes Retrieval",
        "ask for Img/img.zip and Eval/list_eval_partition.txt at https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html",
        {TRAIN: 25882, QUERY: 14218, GALLERY: 12612}, {TRAIN: 3997, QUERY: 3985, GALLERY: 3985},
    ),
}  # fmt: skip


def read_listing(name: str, directory) -> Listing:
    """The images of "sop", "cub", "cars" or "inshop" under a folder that holds the published files, unpacked.

    Raises:
      ValueError: files are missing (what to download), or metadata broken (which file and line).
    """
    return {"sop": _sop, "cub": _cub, "cars": _cars, "inshop": _inshop}[name](epath.Path(directory))


def is_remote(path) -> bool:
    """Whether a path is of an object store, such as gs:// or s3://, where only whole files are read and nothing is renamed."""
    return "://" in str(path)


def differences(name: str, rows: list[Row]) -> list[str]:
    """What of the published counts is not there, a line for each split; empty where all is."""
    benchmark, found = BENCHMARKS[name], []
    for split, images in benchmark.images.items():
        labels = [row.label for row in rows if row.split == split]
        classes = set(labels)
        if (len(labels), len(classes)) == (images, benchmark.classes[split]):
            continue
        text = f"{split} has {len(labels):,} images of {len(classes):,} classes; published are {images:,} of {benchmark.classes[split]:,}"
        if name != "inshop":  # its numbers have gaps
            first = 0 if split == TRAIN else benchmark.classes[TRAIN]
            absent = [
                label + 1
                for label in range(first, first + benchmark.classes[split])
                if label not in classes
            ]
            text += (
                f"; no image of class {', '.join(map(str, absent[:5]))}{', ...' * (len(absent) > 5)}"
                if absent
                else ""
            )
        found.append(f"{benchmark.title}: {text}")
    return found


def inside(path: str) -> bool:
    """Whether a path from the root stays under it."""
    target = pathlib.PurePosixPath(path)
    return (
        bool(path)
        and not target.is_absolute()
        and ".." not in target.parts
        and "\0" not in path
        and "\\" not in path
    )


def lines(path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines that are not blank; any ending of lines, a byte order mark left out."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}")
    for number, line in enumerate(
        data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"), start=1
    ):
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{path}, line {number}: not UTF-8: {line[:80]!r}")
        if text.strip():
            yield number, text


def number(text: str) -> int | None:
    """A positive whole number, of at most nine digits, or None."""
    return (
        int(text)
        if text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0
        else None
    )


def _fields(path, count: int, expected: str, skip: int = 0) -> Iterator[tuple[int, list[str]]]:
    """(line, its words) of a table whose last column may hold spaces."""
    for at, text in list(lines(path))[skip:]:
        fields = text.split(maxsplit=count - 1)
        if len(fields) != count:
            raise ValueError(
                f"{path}, line {at}: expected {expected}, found {text.strip()[:120]!r}"
            )
        yield at, [field.strip() for field in fields]


def _find(directory, name: str, *files: str):
    """The folder that holds one of the files: this one, or one of those in it; raises ValueError where none does."""
    for pattern in ("", "*/", "*/*/"):
        for file in files:
            found = sorted(directory.glob(pattern + file)) if directory.is_dir() else []
            if found:
                return found[0].parent
    benchmark = BENCHMARKS[name]
    archives = (
        sorted(p.name for p in directory.iterdir() if p.name.endswith(ARCHIVES))
        if directory.is_dir()
        else []
    )
    how = f"{benchmark.download}, unpack it, and give the folder that it is in"
    if archives:
        how = (
            f"unpack {', '.join(archives[:4])} there (python -m experiments.prepare --dataset={name} --source={directory} --unpack does); "
            f"if that is something else, {how}"
        )
    raise ValueError(
        f"no {benchmark.title} in {directory} (looked for {' or '.join(files)}): {how}"
    )


class _Rows:
    """The rows of a set; ValueError where an image is listed twice, or a class both trains and is tested."""

    def __init__(self):
        self.rows, self._seen, self._split_of = [], set(), {}

    def add(self, where: str, path: str, label: int, split: str, super_label: int = 0) -> None:
        if path in self._seen:
            raise ValueError(f"{where}: {path} is listed twice")
        self._seen.add(path)
        before = self._split_of.setdefault(label, split)
        if (before == TRAIN) != (split == TRAIN):
            raise ValueError(f"{where}: class {label + 1} is of {split} here, and was of {before}")
        self.rows.append(Row(path, label, split, super_label))


def _sop(directory) -> Listing:
    root, header = (
        _find(directory, "sop", "Ebay_train.txt"),
        ["image_id", "class_id", "super_class_id", "path"],
    )
    found, lines_of = _Rows(), {}
    for split in (TRAIN, TEST):
        path, before = root / f"Ebay_{split}.txt", len(found.rows)
        table = _fields(path, 4, "three numbers and a path")
        at, first = next(table, (1, []))
        if first != header:
            raise ValueError(
                f"{path}, line {at}: expected the header {' '.join(header)!r}, found {' '.join(first)!r}"
            )
        for at, (*numbers, image) in table:
            key, label, super_label = values = [number(x) for x in numbers]
            if None in values or not inside(image):
                raise ValueError(
                    f"{path}, line {at}: expected three numbers and a path inside the set, found {[*numbers, image]}"
                )
            if lines_of.setdefault((split, key), at) != at:
                raise ValueError(f"{path}, line {at}: image {key} is listed twice")
            found.add(f"{path}, line {at}", image, label - 1, split, super_label - 1)
        if len(found.rows) == before:
            raise ValueError(f"{path} lists no image")
    return Listing(root, found.rows)


def _cub(directory) -> Listing:
    root = _find(directory, "cub", "image_class_labels.txt")
    paths = _by_id(
        root / "images.txt",
        lambda text: text if inside(text) else None,
        "a number and a path inside the set",
    )
    labels = _by_id(root / "image_class_labels.txt", number, "a number and a class")
    for file, ids, others in (
        ("image_class_labels.txt", labels, paths),
        ("images.txt", paths, labels),
    ):
        if absent := sorted(others.keys() - ids.keys()):
            raise ValueError(
                f"{root / file} has no line for {len(absent)} images, such as {absent[:5]}"
            )
    found = _Rows()
    for image, (at, path) in paths.items():
        line, label = labels[image]
        if label > _CUB_CLASSES:
            raise ValueError(
                f"{root / 'image_class_labels.txt'}, line {line}: image {image} is of class {label}, expected 1 to {_CUB_CLASSES}"
            )
        found.add(
            f"{root / 'images.txt'}, line {at}",
            f"images/{path}",
            label - 1,
            _half(label, _CUB_CLASSES),
        )
    return Listing(root, found.rows)


def _by_id(path, convert, expected) -> dict[int, tuple]:
    """{number of an image: (line, value)}."""
    found = {}
    for at, (key, text) in _fields(path, 2, expected):
        if number(key) is None or (value := convert(text)) is None:
            raise ValueError(
                f"{path}, line {at}: expected {expected}, found {key!r} and {text[:120]!r}"
            )
        if number(key) in found:
            raise ValueError(f"{path}, line {at}: image {key} is listed twice")
        found[number(key)] = at, value
    if not found:
        raise ValueError(f"{path} lists no image")
    return found


def _half(label: int, classes: int) -> str:
    """The first half of the classes, numbered from 1, trains."""
    return TRAIN if label <= classes // 2 else TEST


def _cars(directory) -> Listing:
    folder = _find(directory, "cars", "cars_annos.mat", "cars_train_annos.mat")
    if (folder / "cars_annos.mat").exists():
        tables = [(folder / "cars_annos.mat", "relative_im_path", "")]
    else:
        tested = [
            file
            for pattern in ("", "*/", "*/*/")
            for file in sorted(directory.glob(pattern + "cars_test_annos_withlabels*.mat"))
        ]
        if not tested:
            raise ValueError(
                f"no cars_test_annos_withlabels.mat in {directory}: {BENCHMARKS['cars'].download} (those in the devkit are without labels)"
            )
        tables = [
            (folder / "cars_train_annos.mat", "fname", "cars_train/"),
            (tested[0], "fname", "cars_test/"),
        ]
    found = _Rows()
    for file, column, prefix in tables:
        for at, (path, label) in enumerate(_annotations(file, column), start=1):
            found.add(
                f"{file}, annotation {at}", prefix + path, label - 1, _half(label, _CARS_CLASSES)
            )
    return Listing(_image_root(directory, folder, found.rows), found.rows)


# In a process of its own: scipy's reader crashes on some damaged files, and takes the memory that others claim.
_READ_MAT = """
import io, json, sys
import numpy as np
from scipy import io as scipy_io
try:
    table = scipy_io.loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True, variable_names=["annotations"])["annotations"]
    rows = [[str(path), float(label)] for path, label in zip(np.atleast_1d(table[sys.argv[1]]), np.atleast_1d(table["class"]), strict=True)]
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}"[:200])
print(json.dumps(rows))
"""


def _annotations(file, column: str) -> Iterator[tuple[str, int]]:
    """(path, class) of a CARS196 .mat, each row checked."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", _READ_MAT, column],
            input=file.read_bytes(),
            capture_output=True,
            timeout=120,
        )
        reason = (
            " ".join(child.stderr.decode(errors="replace").split()[:30])
            or f"its reader ended with {child.returncode}"
        )
        pairs = json.loads(child.stdout) if child.returncode == 0 else None
    except subprocess.TimeoutExpired:
        pairs, reason = None, "its reader did not end"
    if pairs is None:
        raise ValueError(
            f"{file}: expected MATLAB annotations with the columns {column} and class: {reason}"
        )
    for row, (path, label) in enumerate(pairs, start=1):
        if not inside(path) or not 1 <= label <= _CARS_CLASSES or label != int(label):
            raise ValueError(
                f"{file}, annotation {row}: expected a path inside the set and a class 1 to {_CARS_CLASSES}, found {path!r:.120} and {label}"
            )
        yield path, int(label)
    if not pairs:
        raise ValueError(f"{file} lists no image")


def _inshop(directory) -> Listing:
    folder, header = (
        _find(directory, "inshop", "list_eval_partition.txt"),
        ["image_name", "item_id", "evaluation_status"],
    )
    path = folder / "list_eval_partition.txt"
    head = list(lines(path))[:2]
    if len(head) < 2 or number(head[0][1].strip()) is None or head[1][1].split() != header:
        raise ValueError(
            f"{path}, line {head[0][0] if head else 1}: expected a number of images and then the header {' '.join(header)!r}, found {[text for _, text in head]}"
        )
    found = _Rows()
    for at, (image, item, split) in _fields(
        path, 3, "a path, an item and train, query or gallery", skip=2
    ):
        label = number(item.removeprefix("id_"))
        if not inside(image) or label is None or split not in (TRAIN, QUERY, GALLERY):
            raise ValueError(
                f"{path}, line {at}: expected a path inside the set, an item such as id_00000002 and train, query or gallery, found {[image, item, split]}"
            )
        found.add(f"{path}, line {at}", image, label - 1, split)
    if len(found.rows) != number(head[0][1].strip()):
        raise ValueError(
            f"{path}, line {head[0][0]}: says {head[0][1].strip()} images, {len(found.rows)} are listed"
        )
    return Listing(_image_root(directory, folder, found.rows), found.rows)


def _image_root(directory, folder, rows):
    """The folder that the images' paths begin at, near that of the metadata; the latter where no image is found."""
    near = [
        folder,
        folder.parent,
        directory,
        *(p for p in sorted(directory.iterdir()) if p.is_dir()),
    ]  # an object store may list the directory too, which is harmless
    tops = {row.path.split("/")[0] for row in rows}
    return max(near, key=lambda root: sum((root / top).exists() for top in tops))
