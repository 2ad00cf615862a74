"""Sets of labelled pictures behind one interface: image files, or tensorflow-datasets in ArrayRecord files, without TensorFlow."""
from concurrent import futures
import dataclasses
import io
import os
import pathlib
import stat
import tempfile
from typing import Any, Callable, Iterable

from etils import epath
import numpy as np
import tqdm

from rll_jax import images, published

PREPARE_WITH_TENSORFLOW = (
    "preparing a set of tensorflow-datasets needs TensorFlow, which training never does; in an environment of its own: pip install "
    "tensorflow-cpu tensorflow-datasets importlib_resources && python -c \"import tensorflow_datasets as tfds; "
    "tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record').download_and_prepare()\""
)  # fmt: skip
_LABEL_KEYS = ("label", "class_id")  # of tensorflow-datasets' own sets


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """One split: encoded pictures by row number, and what is known of each.

    Attributes:
      read: position -> the encoded picture, bytes.
      positions: (N,) of the rows.
      labels: (N,) int64 classes.
      paths: (N,) where each picture came from.
      sizes: (N,) bytes of each encoded picture, 0 where it is missing or empty.
      super_labels: (N,) int64 classes of classes, or None.
      in_gallery: (N,) whether a row is of the gallery that the others are queries to; None: each image is both.
    """

    read: Callable[[int], bytes]
    positions: np.ndarray
    labels: np.ndarray
    paths: np.ndarray
    sizes: np.ndarray
    super_labels: np.ndarray | None = None
    in_gallery: np.ndarray | None = None

    def __len__(self):
        return len(self.labels)

    def image(self, row: int):
        """The decoded picture of a row; raises `images.BadImageError` naming its path."""
        return self.picture(row).rgb()

    def picture(self, row: int) -> images.Picture:
        """The picture of a row for a view, which decodes what it needs; raises as `image`, as does the view."""
        try:
            return images.Picture(self.encoded(row), str(self.paths[row]))
        except OSError as error:
            raise images.BadImageError(f"cannot read the image {str(self.paths[row])!r}: {error}") from error

    def encoded(self, row: int) -> bytes:
        return self.read(int(self.positions[row]))

    def take(self, rows) -> "ImageSet":
        """The set of some rows, in their order."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "read"}
        return dataclasses.replace(self, **{name: None if a is None else a[rows] for name, a in arrays.items()})


def check_splits(train: ImageSet, test: ImageSet) -> None:
    """Raises ValueError where a split is empty, a class is in both, or no test class has two images: nothing could be measured."""
    for name, data in (("train", train), ("test", test)):
        if not len(data):
            raise ValueError(f"the {name} split has no images")
    common = np.intersect1d(train.labels, test.labels)
    if len(common):
        raise ValueError(f"{len(common)} classes are in train and in test, such as {common[:5].tolist()}")
    if test.in_gallery is not None:
        if not np.isin(test.labels[~test.in_gallery], test.labels[test.in_gallery]).any():
            raise ValueError("no query has an image of its class in the gallery: there is nothing to retrieve")
    elif len(np.unique(test.labels)) == len(test):
        raise ValueError(f"each of the {len(test)} test classes has a single image: there is nothing to retrieve")


def find_bad(data: ImageSet, *, full: bool, threads: int = 2) -> dict[int, str]:
    """{row: what is wrong} of the pictures that are missing or empty, or, where `full`, that do not decode."""
    bad = {int(row): f"{data.paths[row]}: missing or empty" for row in np.flatnonzero(data.sizes == 0)}
    if full:

        def decode(row):
            try:
                data.image(row)
            except images.BadImageError as error:
                return row, str(error)

        todo = [row for row in range(len(data)) if row not in bad]
        with futures.ThreadPoolExecutor(threads) as pool:
            done = tqdm.tqdm(pool.map(decode, todo), total=len(todo), desc="verifying", unit="image", mininterval=1)
            bad |= dict(filter(None, done))
    return bad


def without(data: ImageSet, bad: Iterable[int]) -> ImageSet:
    """The set without those rows, and without the classes that are left with one image because of them."""
    bad = np.fromiter(bad, np.int64)
    kept = ~np.isin(np.arange(len(data)), bad)
    if data.in_gallery is None:
        left = dict(zip(*np.unique(data.labels[kept], return_counts=True)))
        alone = [label for label in np.unique(data.labels[bad]) if left.get(label, 0) < 2]
        kept &= ~np.isin(data.labels, alone)
    return data.take(np.flatnonzero(kept))


def from_rows(root, rows: list[published.Row]) -> dict[str, ImageSet]:
    """{"train": ..., "test": ...} of image files under `root`, a local folder or a gs:// or s3:// address."""
    root = epath.Path(root)
    read = _Files(root, [row.path for row in rows])
    with futures.ThreadPoolExecutor(16) as pool:  # a question to the file system each
        sizes = np.array(list(pool.map(lambda row: _size(root / row.path), rows)), np.int64)
    columns = zip(*((row.label, row.path, row.super_label, row.split) for row in rows))
    labels, paths, super_labels, splits = (np.array(column) for column in columns)
    super_labels = super_labels.astype(np.int64) if np.ptp(super_labels) else None
    everything = ImageSet(read, np.arange(len(rows)), labels.astype(np.int64), paths, sizes, super_labels)
    return _by_split(everything, splits)


def _by_split(everything: ImageSet, splits: np.ndarray) -> dict[str, ImageSet]:
    train, test = (everything.take(np.flatnonzero(rows)) for rows in (splits == published.TRAIN, splits != published.TRAIN))
    roles = splits[splits != published.TRAIN]
    if (roles != published.TEST).any():
        test = dataclasses.replace(test, in_gallery=roles == published.GALLERY)
    return {"train": train, "test": test}


class _Files:
    """Encoded pictures by position, from files."""

    def __init__(self, root, paths):
        self._root, self._paths = root, paths

    def __call__(self, position):
        path = self._root / self._paths[position]
        try:
            return path.read_bytes()
        except OSError:
            raise
        except Exception as error:  # an object store's client has its own for each kind of failure
            raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def _size(path) -> int:
    try:
        if published.is_remote(path):
            information = path.stat()
            return 0 if information.is_directory else information.length
        information = os.stat(path)  # epath's fails where the owner's number has no name
        return 0 if stat.S_ISDIR(information.st_mode) else information.st_size
    except OSError:
        return 0


def prepare(root, rows: list[published.Row], directory, name: str) -> None:
    """Writes the pictures into ArrayRecord files in `directory`, which must not be there; a missing one as an empty one.

    What stands there at the end is whole: it is made aside and renamed. Raises OSError where it cannot be written.
    """
    import tensorflow_datasets as tfds  # seconds to import

    root, directory = epath.Path(root), epath.Path(directory)

    class RllImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(), "label": np.int64, "super_label": np.int64, "path": tfds.features.Text()}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True, description=f"{name}, by rll_jax")

        def _split_generators(self, _):
            splits = [split for split in published.SPLITS if any(row.split == split for row in rows)]
            return {split: self._rows([row for row in rows if row.split == split], split) for split in splits}

        def _generate_examples(self):
            raise NotImplementedError  # tfds asks for it; the splits bring their own

        def _rows(self, rows, split):
            for key, row in enumerate(tqdm.tqdm(rows, desc=f"preparing {name}, {split}", unit="image", mininterval=1)):
                picture = io.BytesIO((root / row.path).read_bytes() if _size(root / row.path) else b"")
                yield key, {"image": picture, "label": row.label, "super_label": row.super_label, "path": row.path}

    tfds.disable_progress_bar()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f"{directory.name}.") as aside:
        builder = RllImages(data_dir=aside, file_format="array_record")
        builder.download_and_prepare()
        pathlib.Path(builder.data_dir).rename(directory)
    open_prepared(directory)


def open_prepared(directory, *, keep_index: bool = True) -> dict[str, ImageSet]:
    """{"train": ..., "test": ...} of a set that `prepare` wrote.

    Args:
      keep_index: keep labels and paths in a file beside it, where that can be written, so as not to read all at each start.

    Raises:
      ValueError: nothing prepared there, or something else.
    """
    import tensorflow_datasets as tfds  # seconds to import

    try:
        builder = tfds.builder_from_directory(str(directory))
        return _by_split(*_read(builder, "image", "label", keep_index))
    except Exception as error:  # tfds raises anything from KeyError to RuntimeError on damaged sets
        text = str(error).strip().splitlines()
        raise ValueError(f"cannot read a prepared set in {directory}: {text[0] if text else error!r}")


def open_tfds(name: str, data_dir, image_key: str = "image", label_key: str = "") -> dict[str, ImageSet]:
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
        raise ValueError(f"tensorflow-datasets knows no set {name!r}: {str(error).strip().splitlines()[0]}")
    if not builder.info.splits:
        hint = PREPARE_WITH_TENSORFLOW.format(name=name, data_dir=builder.data_dir_root)
        raise ValueError(f"{name} is not prepared as array_record in {builder.data_dir}: {hint}")
    features = builder.info.features
    label_key = label_key or next((key for key in _LABEL_KEYS if key in features), "")
    if image_key not in features or label_key not in features:
        raise ValueError(f"{name} has the features {', '.join(features)}: name those of image and class by --image_key and --label_key")
    everything, splits = _read(builder, image_key, label_key, keep_index=True)
    sets = _by_split(everything, np.where(splits == published.TRAIN, published.TRAIN, published.TEST))
    if len(np.intersect1d(sets["train"].labels, sets["test"].labels)) or not len(sets["train"]) or not len(sets["test"]):
        classes = np.unique(everything.labels)
        first_half = np.isin(everything.labels, classes[: len(classes) // 2])
        sets = _by_split(everything, np.where(first_half, published.TRAIN, published.TEST))
    return sets


class _Records:
    """Encoded pictures by position, over the splits of a prepared set one after the other."""

    def __init__(self, sources, image_key):
        self._sources, self._image_key = sources, image_key
        self._starts = np.cumsum([0, *(len(source) for source in sources[:-1])])

    def __call__(self, position):
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._sources[part][int(position - self._starts[part])][self._image_key]


def _read(builder, image_key, label_key, keep_index) -> tuple[ImageSet, np.ndarray]:
    """All splits as one set, and the split of each row."""
    import tensorflow_datasets as tfds

    names = list(builder.info.splits)
    skip = {image_key: tfds.decode.SkipDecoding()}
    sources = [builder.as_data_source(split, decoders=skip) for split in names]
    parts = [_index(builder, split, source, image_key, label_key, keep_index) for split, source in zip(names, sources)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    super_labels = columns["super_labels"] if np.ptp(columns["super_labels"]) else None
    read, labels = _Records(sources, image_key), columns["labels"]
    everything = ImageSet(read, np.arange(len(labels)), labels, columns["paths"], columns["sizes"], super_labels)
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
    for at, record in enumerate(source):
        path = record["path"].decode() if isinstance(record.get("path"), bytes) else f"{split}/{at}"
        super_label = next((record[key] for key in ("super_label", "super_class_id") if key in record), 0)
        rows.append((record[label_key], path, len(record[image_key]), super_label))
    labels, paths, sizes, super_labels = zip(*rows) if rows else ((), (), (), ())
    columns: dict[str, Any] = {name: np.array(a, np.int64) for name, a in (("labels", labels), ("sizes", sizes), ("super_labels", super_labels))}
    columns["paths"] = np.array(paths, np.str_)
    if keep:
        data = io.BytesIO()
        np.savez(data, **columns)
        try:
            file.write_bytes(data.getvalue())
        except OSError:  # read-only: read again next time
            pass
    return columns
