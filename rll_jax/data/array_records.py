"""Datasets in ArrayRecord files, in tensorflow-datasets' format, used without TensorFlow."""

from collections.abc import Iterator, Sequence
import contextlib
import io
import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Any, cast

from etils import epath
import numpy as np
import tqdm

from rll_jax.data import files, listings, paths
from rll_jax.data.image_dataset import EncodedImageDataset, boxes_of, number_names, split_dataset

if TYPE_CHECKING:  # takes seconds to import
    import tensorflow_datasets as tfds

_NAME = "rll_images"
_SHARD_BYTES = 256 * 2**20  # a shard ends with the record that goes beyond this size
_WITH_TENSORFLOW = (
    "preparing a dataset of tensorflow-datasets needs TensorFlow, which training never does; in an "
    "environment of its own: pip install tensorflow-cpu tensorflow-datasets importlib_resources && "
    'python -c "import tensorflow_datasets as tfds; '
    "tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
    '.download_and_prepare()"'
)
# Of our own datasets, where their rows have such texts; each with what `listings.Row` calls it.
_TEXTS = {"group": "group", "image_id": "image_id", "box": "box_text"}
# What tensorflow-datasets' own datasets call a class and its super class.
_LABEL_KEYS, _SUPER_LABEL_KEYS = ("label", "class_id"), ("super_label", "super_class_id")


def write_dataset(root: paths.AnyPath, rows: list[listings.Row], directory: paths.AnyPath) -> None:
    """Writes listed images into ArrayRecord files, in the format of tensorflow-datasets.

    Writes to a temporary folder and renames it, so the result is either complete or absent. An
    existing folder is left untouched. A missing image is written as an empty one.

    One image is in memory at a time. (tensorflow-datasets' own writer sorts a split in memory or,
    beyond a gigabyte, needs TensorFlow.)

    Args:
      root: the folder that the rows' paths start from, local or in an object store.
      rows: the images.
      directory: the folder of the result, a local one.

    Raises:
      OSError: the folder cannot be written.
      ValueError: a folder that was already there is not such a dataset, or the name is not UTF-8.
    """
    import tensorflow_datasets as tfds  # takes seconds

    paths.check_utf8(directory)
    root = paths.to_path(root)
    names = [name for name, of_row in _TEXTS.items() if any(getattr(row, of_row) for row in rows)]
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": np.int64,
            "super_label": np.int64,
            "path": tfds.features.Text(),
            **{name: tfds.features.Text() for name in names},
        }
    )
    with files.atomic_folder(directory) as temporary:
        splits = [
            _write_split(root, split_rows, split, features, temporary)
            for split in listings.SPLITS
            if (split_rows := [row for row in rows if row.split == split])
        ]
        tfds.folder_dataset.write_metadata(
            data_dir=str(temporary), features=features, split_infos=splits, check_data=False
        )
        # `write_metadata` leaves out the line that tells the reader the kind of file.
        information = temporary / "dataset_info.json"
        known = json.loads(information.read_text())
        information.write_text(json.dumps(known | {"fileFormat": "array_record", "name": _NAME}))
    open_dataset(directory)


def open_dataset(
    directory: paths.AnyPath, *, keep_index: bool = True
) -> dict[str, EncodedImageDataset]:
    """Opens a dataset that `write_dataset` wrote.

    Args:
      directory: its folder.
      keep_index: keep labels and paths in a file beside the dataset, where that can be written, so
        that the next start does not read all records.

    Returns:
      {"train": ..., "test": ...}; query and gallery images are both in "test".

    Raises:
      ValueError: the folder has no such dataset, or a damaged one, or its name is not UTF-8.
    """
    import tensorflow_datasets as tfds  # takes seconds

    paths.check_utf8(directory)
    try:
        builder = tfds.builder_from_directory(os.path.abspath(directory))
        return split_dataset(*_read_splits(builder, "image", "label", keep_index))
    except Exception as error:  # tfds raises errors of all kinds on damaged datasets
        raise ValueError(
            f"cannot read a prepared dataset in {directory}: {files.first_line(error)}"
        ) from error


def open_tfds(
    name: str, data_dir: paths.AnyPath, image_key: str = "image", label_key: str = ""
) -> dict[str, EncodedImageDataset]:
    """Opens a dataset of tensorflow-datasets that is prepared as ArrayRecord files.

    Its train split trains and all other splits are test. Where these share classes (many datasets
    are made for classification) or one of the two is empty, the classes of all images are split
    instead: the first half of the classes trains. A note on stderr says so.

    Args:
      name: the name that tensorflow-datasets has for the dataset.
      data_dir: tensorflow-datasets' own folder, or "" for its default.
      image_key: the feature that holds the image.
      label_key: the feature that holds the class; "" takes label or class_id, whichever exists.

    Returns:
      {"train": ..., "test": ...}.

    Raises:
      ValueError: tensorflow-datasets does not know the dataset, it is not prepared (with the
        command that prepares it), or it does not have these features.
    """
    import tensorflow_datasets as tfds  # takes seconds

    try:
        builder = tfds.builder(name, data_dir=str(data_dir) or None, file_format="array_record")
    except Exception as error:
        raise ValueError(
            f"tensorflow-datasets knows no dataset {name!r}: {files.first_line(error)}"
        ) from error
    if not builder.info.splits:
        hint = _WITH_TENSORFLOW.format(name=name, data_dir=builder.data_dir_root)
        raise ValueError(f"{name} is not prepared as array_record in {builder.data_dir}: {hint}")
    features = cast("tfds.features.FeaturesDict", builder.info.features)
    label_key = label_key or next((key for key in _LABEL_KEYS if key in features), "")
    if image_key not in features or label_key not in features:
        raise ValueError(
            f"{name} has the features {', '.join(features)}: name those of image and class by "
            "--image_key and --label_key"
        )
    dataset, names = _read_splits(builder, image_key, label_key, keep_index=True)
    is_train = names == listings.TRAIN
    shared = np.intersect1d(dataset.labels[is_train], dataset.labels[~is_train])
    if len(shared) or is_train.all() or not is_train.any():
        classes = np.unique(dataset.labels)
        print(
            f"note: {name} has classes in train and in test: the first half of its {len(classes)} "
            "classes trains",
            file=sys.stderr,
        )
        is_train = np.isin(dataset.labels, classes[: len(classes) // 2])
    return split_dataset(dataset, np.where(is_train, listings.TRAIN, listings.TEST))


def _write_split(
    root: epath.Path,
    rows: list[listings.Row],
    split: str,
    features: "tfds.features.FeaturesDict",
    directory: pathlib.Path,
) -> "tfds.core.SplitInfo":
    """Writes the shards of a split, and returns what tensorflow-datasets keeps of them."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_serializer

    specs = cast(Any, features.get_serialized_info())
    serializer = example_serializer.ExampleSerializer(specs)
    shards = _ShardWriter(directory, split)
    for row in tqdm.tqdm(rows, desc=f"preparing {split}", unit="image", mininterval=1):
        file = root / row.path
        example = {
            "image": io.BytesIO(file.read_bytes() if paths.file_size(file) else b""),
            "label": row.label,
            "super_label": row.super_label,
            "path": os.fsencode(row.name),
            **{name: getattr(row, at) for name, at in _TEXTS.items() if name in features},
        }
        shards.write(serializer.serialize_example(features.encode_example(example)))
    shards.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(directory),
        dataset_name=_NAME,
        split=split,
        filetype_suffix="array_record",
    )
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=shards.lengths,
        num_bytes=shards.num_bytes,
        filename_template=template,
    )


class _ShardWriter:
    """Writes the records of a split into one file after another, its shards.

    Attributes:
      lengths: the number of records in each shard.
      num_bytes: the bytes of all records.
    """

    def __init__(self, directory: pathlib.Path, split: str) -> None:
        self.lengths: list[int] = []
        self.num_bytes = 0
        self._directory, self._split = directory, split
        self._writer: Any = None
        self._shard_bytes = 0

    def write(self, record: bytes) -> None:
        """Writes a record, into a new shard where the last one is large enough."""
        with self._as_os_error():
            if self._writer is None or self._shard_bytes > _SHARD_BYTES:
                self._writer = self._begin_shard()
            self._writer.write(record)
        self.lengths[-1] += 1
        self._shard_bytes += len(record)
        self.num_bytes += len(record)

    def close(self) -> None:
        """Ends the last shard and gives all shards their names, which tell their number."""
        if self._writer is not None:
            with self._as_os_error():
                self._writer.close()
        total = len(self.lengths)
        for shard in range(total):
            name = f"{_NAME}-{self._split}.array_record-{shard:05d}-of-{total:05d}"
            self._temporary_path(shard).rename(self._directory / name)

    @contextlib.contextmanager
    def _as_os_error(self) -> Iterator[None]:
        """Turns what array_record raises, such as on a full disk, into OSError."""
        try:
            yield
        except RuntimeError as error:
            raise OSError(
                f"cannot write into {self._directory}: {files.first_line(error)}"
            ) from error

    def _begin_shard(self) -> Any:
        from array_record.python import (
            array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  # compiled
        )

        if self._writer is not None:
            self._writer.close()
        path = self._temporary_path(len(self.lengths))
        self.lengths.append(0)
        self._shard_bytes = 0
        return array_record_module.ArrayRecordWriter(str(path), "group_size:1")

    def _temporary_path(self, shard: int) -> pathlib.Path:
        return self._directory / f"{self._split}.{shard}"


class _SourceReader:
    """Reads the encoded image at a position, counted over several sources one after the other."""

    def __init__(self, sources: Sequence[Any], image_key: str) -> None:
        self._sources, self._image_key = sources, image_key
        self._starts = np.cumsum([0, *(len(source) for source in sources[:-1])])

    def __call__(self, position: int) -> bytes:
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._sources[part][int(position - self._starts[part])][self._image_key]


def _read_splits(
    builder: "tfds.core.DatasetBuilder", image_key: str, label_key: str, keep_index: bool
) -> tuple[EncodedImageDataset, np.ndarray]:
    """Returns all splits of a prepared dataset as one, and the (N,) name of each row's split."""
    import tensorflow_datasets as tfds

    names = list(builder.info.splits)
    decoders = {image_key: tfds.decode.SkipDecoding()}
    open_source = cast(Any, builder.as_data_source)  # its stub hides the arguments
    sources = [open_source(split, decoders=decoders) for split in names]
    indices = [
        _read_index(builder, split, source, image_key, label_key, keep_index)
        for split, source in zip(names, sources, strict=True)
    ]
    columns = {name: np.concatenate([index[name] for index in indices]) for name in indices[0]}
    labels, super_labels = columns["labels"], columns["super_labels"]
    if len(labels) and labels.min() < 0:
        raise ValueError(
            f"{builder.name}: {int((labels < 0).sum())} images have a negative {label_key}: those "
            "without a class cannot be told apart"
        )
    dataset = EncodedImageDataset(
        read=_SourceReader(sources, image_key),
        positions=np.arange(len(labels)),
        labels=labels,
        paths=columns["paths"],
        sizes=columns["sizes"],
        super_labels=super_labels if np.ptp(super_labels) else None,
        groups=number_names(columns["group"]) if "group" in columns else None,
        image_ids=number_names(columns["image_id"]) if "image_id" in columns else None,
        boxes=boxes_of(columns["box"]) if "box" in columns else None,
    )
    return dataset, np.repeat(names, [len(source) for source in sources])


def _read_index(
    builder: "tfds.core.DatasetBuilder",
    split: str,
    source: Sequence[Any],
    image_key: str,
    label_key: str,
    keep: bool,
) -> dict[str, np.ndarray]:
    """Returns the columns of a split, such as labels and paths, from its index file if possible.

    Otherwise all records are read and, where `keep`, the index file is written.
    """
    name = f"rll_jax_index.{split}.{image_key}.{label_key}.npz"
    file = paths.to_path(builder.data_dir) / name
    with (
        contextlib.suppress(Exception),  # the file may be missing, or damaged in any way
        np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as saved,
    ):
        if len(saved["labels"]) == len(source):
            return dict(saved)
    features = cast("tfds.features.FeaturesDict", builder.info.features)
    dtype = np.dtype(cast(Any, features[label_key].np_dtype))
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(f"{builder.name}: {label_key} is of {dtype}, expected whole numbers")
    # Other people's datasets may call anything a group.
    names = [key for key in _TEXTS if builder.name == _NAME and key in features]
    columns = _index_records(source, split, image_key, label_key, names)
    if keep:
        _keep_index(file, columns)
    return columns


def _index_records(
    source: Sequence[Any], split: str, image_key: str, label_key: str, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Reads all records; an image that has no path in its record gets the path SPLIT/NUMBER."""
    labels, image_paths, sizes, super_labels = [], [], [], []
    texts = {name: [] for name in names}
    # Shown where it takes more than two seconds.
    records = tqdm.tqdm(source, f"indexing {split}", unit="image", mininterval=1, delay=2)
    for number, record in enumerate(records):
        path = record.get("path")
        image_paths.append(os.fsdecode(path) if isinstance(path, bytes) else f"{split}/{number}")
        super_label_key = next((key for key in _SUPER_LABEL_KEYS if key in record), None)
        super_labels.append(record[super_label_key] if super_label_key else 0)
        labels.append(record[label_key])
        sizes.append(len(record[image_key]))
        for name in names:
            texts[name].append(record[name].decode())
    return {
        "labels": np.array(labels, np.int64),
        "sizes": np.array(sizes, np.int64),
        "super_labels": np.array(super_labels, np.int64),
        "paths": np.array(image_paths, np.str_),
        **{name: np.array(values, np.str_) for name, values in texts.items()},
    }


def _keep_index(file: epath.Path, columns: dict[str, np.ndarray]) -> None:
    """Writes the index file; does nothing where that is not possible, as on a read-only disk."""
    data = io.BytesIO()
    np.savez(data, **columns)  # pyright: ignore[reportArgumentType]  # numpy's stub of allow_pickle
    with contextlib.suppress(OSError):
        if paths.is_remote(file):  # an object store replaces whole files
            file.write_bytes(data.getvalue())
            return
        with files.atomic_write(file) as temporary:
            temporary.write_bytes(data.getvalue())
