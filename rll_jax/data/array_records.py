"""Sets in ArrayRecord files, in the format of tensorflow-datasets, written and read without TensorFlow."""

import io
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from etils import epath
import numpy as np
import tqdm

from rll_jax.data import benchmarks
from rll_jax.data.image_dataset import EncodedImageDataset, size_of, split_dataset

_NAME, _SHARD_BYTES = "rll_images", 256 * 2**20
_WITH_TENSORFLOW = (
    "preparing a set of tensorflow-datasets needs TensorFlow, which training never does; in an environment of its own: pip install "
    'tensorflow-cpu tensorflow-datasets importlib_resources && python -c "import tensorflow_datasets as tfds; '
    "tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record').download_and_prepare()\""
)
_LABEL_KEYS = ("label", "class_id")  # of tensorflow-datasets' own sets


def write_dataset(root, rows: list[benchmarks.Row], directory) -> None:
    """Writes the pictures into ArrayRecord files in `directory`, in the format of tensorflow-datasets; a missing one as an empty one.

    What stands there at the end is whole: it is made aside and renamed, and left as it is where it is there already. One picture is in
    memory at a time: tensorflow-datasets' own way sorts a split there, or, beyond a gigabyte, needs TensorFlow.

    Raises OSError where it cannot be written.
    """
    import tensorflow_datasets as tfds  # seconds to import

    root, directory = epath.Path(root), pathlib.Path(directory)
    features = {
        "image": tfds.features.Image(),
        "label": np.int64,
        "super_label": np.int64,
        "path": tfds.features.Text(),
    }
    features = tfds.features.FeaturesDict(features)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as aside:
        splits = []
        for split in benchmarks.SPLITS:
            if some := [row for row in rows if row.split == split]:
                splits.append(_write_split(root, some, split, features, pathlib.Path(aside)))
        tfds.folder_dataset.write_metadata(
            data_dir=aside, features=features, split_infos=splits, check_data=False
        )
        # the one line that tells its reader of the kind of file
        information = pathlib.Path(aside) / "dataset_info.json"
        information.write_text(
            json.dumps(
                json.loads(information.read_text()) | {"fileFormat": "array_record", "name": _NAME}
            )
        )
        os.chmod(aside, 0o755)  # temporary folders are the user's alone
        try:
            pathlib.Path(aside).rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
        else:
            pathlib.Path(aside).mkdir()  # for the clean-up to find
    open_dataset(directory)


def _write_split(root, rows, split, features, directory):
    """The split's files, each of about `_SHARD_BYTES`, and what tensorflow-datasets wants to know of them."""
    from array_record.python import array_record_module
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_serializer

    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    lengths, sizes, writer = [], [], None
    for row in tqdm.tqdm(rows, desc=f"preparing {split}", unit="image", mininterval=1):
        if writer is None or sizes[-1] > _SHARD_BYTES:
            if writer is not None:
                writer.close()
            writer = array_record_module.ArrayRecordWriter(
                str(directory / f"{split}.{len(lengths)}"), "group_size:1"
            )
            lengths.append(0)
            sizes.append(0)
        picture = (root / row.path).read_bytes() if size_of(root / row.path) else b""
        example = {
            "image": io.BytesIO(picture),
            "label": row.label,
            "super_label": row.super_label,
            "path": os.fsencode(row.path),
        }
        record = serializer.serialize_example(features.encode_example(example))
        writer.write(record)
        lengths[-1] += 1
        sizes[-1] += len(record)
    writer.close()
    for shard in range(len(lengths)):
        name = f"{_NAME}-{split}.array_record-{shard:05d}-of-{len(lengths):05d}"
        (directory / f"{split}.{shard}").rename(directory / name)
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(directory),
        dataset_name=_NAME,
        split=split,
        filetype_suffix="array_record",
    )
    return tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=sum(sizes), filename_template=template
    )


def open_dataset(directory, *, keep_index: bool = True) -> dict[str, EncodedImageDataset]:
    """{"train": ..., "test": ...} of a set that `prepare` wrote.

    Args:
      keep_index: keep labels and paths in a file beside it, where that can be written, so as not to read all at each start.

    Raises:
      ValueError: nothing prepared there, or something else.
    """
    import tensorflow_datasets as tfds  # seconds to import

    try:
        builder = tfds.builder_from_directory(str(directory))
        return split_dataset(*_read(builder, "image", "label", keep_index))
    except Exception as error:  # tfds raises anything from KeyError to RuntimeError on damaged sets
        text = str(error).strip().splitlines()
        raise ValueError(
            f"cannot read a prepared set in {directory}: {text[0] if text else error!r}"
        )


def open_tfds(
    name: str, data_dir, image_key: str = "image", label_key: str = ""
) -> dict[str, EncodedImageDataset]:
    """{"train": ..., "test": ...} of a set that tensorflow-datasets knows and has prepared as ArrayRecord files.

    Where the splits share classes (it is made for classification), all images are taken and the first half of the classes trains.

    Args:
      data_dir: tensorflow-datasets' own folder, or "" for its default.
      image_key, label_key: features of the set; "" takes label or class_id, whichever there is.

    Raises:
      ValueError: no such set, not prepared (with the command that does), or without those features.
    """
    import tensorflow_datasets as tfds  # seconds to import

    try:
        builder = tfds.builder(name, data_dir=str(data_dir) or None, file_format="array_record")
    except Exception as error:
        raise ValueError(
            f"tensorflow-datasets knows no set {name!r}: {str(error).strip().splitlines()[0]}"
        )
    if not builder.info.splits:
        hint = _WITH_TENSORFLOW.format(name=name, data_dir=builder.data_dir_root)
        raise ValueError(f"{name} is not prepared as array_record in {builder.data_dir}: {hint}")
    features = builder.info.features
    label_key = label_key or next((key for key in _LABEL_KEYS if key in features), "")
    if image_key not in features or label_key not in features:
        raise ValueError(
            f"{name} has the features {', '.join(features)}: name those of image and class by --image_key and --label_key"
        )
    everything, splits = _read(builder, image_key, label_key, keep_index=True)
    sets = split_dataset(
        everything, np.where(splits == benchmarks.TRAIN, benchmarks.TRAIN, benchmarks.TEST)
    )
    if (
        len(np.intersect1d(sets["train"].labels, sets["test"].labels))
        or not len(sets["train"])
        or not len(sets["test"])
    ):
        classes = np.unique(everything.labels)
        first_half = np.isin(everything.labels, classes[: len(classes) // 2])
        print(
            f"note: {name} has classes in train and in test: the first half of its {len(classes)} classes trains",
            file=sys.stderr,
        )
        sets = split_dataset(everything, np.where(first_half, benchmarks.TRAIN, benchmarks.TEST))
    return sets


class _Records:
    """Encoded pictures by position, over the splits of a prepared set one after the other."""

    def __init__(self, sources, image_key):
        self._sources, self._image_key = sources, image_key
        self._starts = np.cumsum([0, *(len(source) for source in sources[:-1])])

    def __call__(self, position):
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._sources[part][int(position - self._starts[part])][self._image_key]


def _read(builder, image_key, label_key, keep_index) -> tuple[EncodedImageDataset, np.ndarray]:
    """All splits as one set, and the split of each row."""
    import tensorflow_datasets as tfds

    names = list(builder.info.splits)
    skip = {image_key: tfds.decode.SkipDecoding()}
    sources = [builder.as_data_source(split, decoders=skip) for split in names]
    parts = [
        _index(builder, split, source, image_key, label_key, keep_index)
        for split, source in zip(names, sources)
    ]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    super_labels = columns["super_labels"] if np.ptp(columns["super_labels"]) else None
    read, labels = _Records(sources, image_key), columns["labels"]
    if len(labels) and labels.min() < 0:
        raise ValueError(
            f"{builder.name}: {int((labels < 0).sum())} images have a negative {label_key}: those without a class cannot be told apart"
        )
    everything = EncodedImageDataset(
        read,
        np.arange(len(labels)),
        labels,
        columns["paths"],
        columns["sizes"],
        super_labels=super_labels,
    )
    return everything, np.repeat(names, [len(source) for source in sources])


def _index(builder, split, source, image_key, label_key, keep) -> dict[str, np.ndarray]:
    file = epath.Path(builder.data_dir) / f"rll_jax_index.{split}.{image_key}.{label_key}.npz"
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as saved:
            if len(saved["labels"]) == len(source):
                return dict(saved)
    except Exception:  # none, or a damaged one: made again
        pass
    rows = []
    if not np.issubdtype(builder.info.features[label_key].np_dtype, np.integer):
        raise ValueError(
            f"{builder.name}: {label_key} is of {np.dtype(builder.info.features[label_key].np_dtype)}, expected whole numbers"
        )
    for at, record in enumerate(source):
        path = (
            os.fsdecode(record["path"])
            if isinstance(record.get("path"), bytes)
            else f"{split}/{at}"
        )
        super_label = next(
            (record[key] for key in ("super_label", "super_class_id") if key in record), 0
        )
        rows.append((record[label_key], path, len(record[image_key]), super_label))
    labels, paths, sizes, super_labels = zip(*rows) if rows else ((), (), (), ())
    columns: dict[str, Any] = {
        name: np.array(a, np.int64)
        for name, a in (("labels", labels), ("sizes", sizes), ("super_labels", super_labels))
    }
    columns["paths"] = np.array(paths, np.str_)
    if keep:
        data = io.BytesIO()
        np.savez(data, **columns)
        try:
            file.write_bytes(data.getvalue())
        except OSError:  # read-only: read again next time
            pass
    return columns
