"""Sets of labelled pictures: tensorflow-datasets in ArrayRecord files, read by random access, without TensorFlow.

One storage and one reader for all sources: a source's own files are prepared once by a builder, and read ever after.
"""
import csv
import dataclasses
import io
import os
import pathlib
import tempfile
from typing import Any, Iterator

import numpy as np

from rll_jax import images

_PUBLISHED_SOP = {"Ebay_train.txt": 59551, "Ebay_test.txt": 60502}
_SOP_COLUMNS = ["image_id", "class_id", "super_class_id", "path"]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """One split: encoded pictures by row number, and what is known of each.

    Attributes:
      records: random access to {"image": bytes, ...}.
      labels: (N,) int64 classes.
      paths: (N,) where each picture came from.
    """

    records: Any
    labels: np.ndarray
    paths: np.ndarray

    def __len__(self):
        return len(self.labels)

    def image(self, row: int):
        """The decoded picture of a row; raises `images.BadImageError` naming its path."""
        return images.decode(self.encoded(row), str(self.paths[row]))

    def encoded(self, row: int) -> bytes:
        return self.records[int(row)]["image"]


def open_prepared(directory: str | os.PathLike, split: str) -> ImageSet:
    """A split of a prepared set with the features image, label and path.

    Raises:
      ValueError: nothing prepared there, or without that split or those features.
    """
    import tensorflow_datasets as tfds  # seconds to import

    try:
        builder = tfds.builder_from_directory(os.fspath(directory))
        records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        index = [(r["label"], r["path"]) for r in records]
    except Exception as error:  # tfds raises anything from KeyError to RuntimeError on damaged sets
        text = str(error).strip().splitlines()
        raise ValueError(f"cannot read the split {split!r} of a prepared set in {directory}: {text[0] if text else error!r}")
    labels, paths = zip(*index)
    return ImageSet(records, np.array(labels, np.int64), np.array([p.decode() for p in paths]))


def check_splits(train: ImageSet, test: ImageSet) -> None:
    """Raises ValueError where a class is in both splits, or no test class has two images: nothing could be measured."""
    common = np.intersect1d(train.labels, test.labels)
    if len(common):
        raise ValueError(f"{len(common)} classes are in train and in test, such as {common[:5].tolist()}")
    if len(np.unique(test.labels)) == len(test):
        raise ValueError(f"each of the {len(test)} test classes has a single image: there is nothing to retrieve")


def open_sop(data_dir: str | os.PathLike, split: str) -> ImageSet:
    """Stanford Online Products from its published files, prepared on first use in data_dir/prepared_sop.

    Raises:
      ValueError: files missing (with what to download and where to put it), an index that is broken (file and line), or
        images that are missing or empty.
    """
    prepared = pathlib.Path(data_dir) / "prepared_sop"
    if not prepared.exists():
        _prepare_sop(pathlib.Path(data_dir), prepared)
    return open_prepared(prepared, split)


def _prepare_sop(data_dir: pathlib.Path, prepared: pathlib.Path) -> None:
    root = next((d for d in (data_dir, data_dir / "Stanford_Online_Products") if (d / "Ebay_train.txt").exists()), None)
    if root is None:
        raise ValueError(
            f"no Stanford Online Products in {data_dir or '.'}: download Stanford_Online_Products.zip (2.9 GB) from "
            "https://cvgl.stanford.edu/projects/lifted_struct/, unpack it, and pass the folder that holds "
            "Stanford_Online_Products/ as --data_dir"
        )
    index = {name: list(_read_sop_index(root / name)) for name in _PUBLISHED_SOP}
    absent = [row["path"] for rows in index.values() for row in rows if not _has_bytes(root / row["path"])]
    if absent:
        raise ValueError(
            f"{len(absent)} images of {root} are missing or empty, such as {absent[:3]}: unpack the archive again"
        )
    import tensorflow_datasets as tfds  # seconds to import

    class RllSop(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": np.int64,
                "super_label": np.int64,
                "path": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {name.removeprefix("Ebay_").removesuffix(".txt"): self._rows(rows) for name, rows in index.items()}

        def _generate_examples(self):
            raise NotImplementedError  # tfds asks for it; the splits bring their own

        def _rows(self, rows):
            for row in rows:
                picture = io.BytesIO((root / row["path"]).read_bytes())
                label, super_label = int(row["class_id"]) - 1, int(row["super_class_id"]) - 1
                yield row["path"], dict(image=picture, label=label, super_label=super_label, path=row["path"])

    # made aside and renamed: what stands under the final name is whole
    with tempfile.TemporaryDirectory(dir=data_dir, prefix="prepared_sop.") as aside:
        builder = RllSop(data_dir=aside, file_format="array_record")
        builder.download_and_prepare()
        pathlib.Path(builder.data_dir).rename(prepared)


def _has_bytes(path: pathlib.Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _read_sop_index(path: pathlib.Path) -> Iterator[dict[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}")
    if not lines or lines[0].split() != _SOP_COLUMNS:
        raise ValueError(f"{path}, line 1: expected the header {' '.join(_SOP_COLUMNS)!r}, found {''.join(lines[:1])!r}")
    seen = set()
    for number, row in enumerate(csv.reader(lines[1:], delimiter=" "), start=2):
        if not row:
            continue
        fields = dict(zip(_SOP_COLUMNS, row))
        target = pathlib.PurePosixPath(fields.get("path", ""))
        whole = len(row) == len(_SOP_COLUMNS) and all(x.isascii() and x.isdigit() and int(x) > 0 for x in row[:3])
        if not whole or target.is_absolute() or ".." in target.parts:
            raise ValueError(f"{path}, line {number}: expected three numbers and a path inside the set, found {row!r}")
        if fields["path"] in seen:
            raise ValueError(f"{path}, line {number}: {fields['path']} is listed twice")
        seen.add(fields["path"])
        yield fields
    if not seen:
        raise ValueError(f"{path} lists no image")
