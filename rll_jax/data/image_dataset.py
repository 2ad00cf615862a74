"""Sets of labelled pictures behind one interface, wherever the pictures are."""

from concurrent import futures
import dataclasses
import os
import stat
from typing import Callable, Iterable

from etils import epath
import numpy as np
import tqdm

from rll_jax.data import benchmarks, images


@dataclasses.dataclass(frozen=True)
class EncodedImageDataset:
    """One split: encoded pictures by row number, and what is known of each.

    Attributes:
      read: position -> the encoded picture, bytes.
      positions: (N,) of the rows.
      labels: (N,) int64 classes.
      paths: (N,) where each picture came from.
      sizes: (N,) bytes of each encoded picture, 0 where it is missing or empty.
      changed: (N,) when each file was last changed, ns, as far as that is known, or None.
      super_labels: (N,) int64 classes of classes, or None.
      in_gallery: (N,) whether a row is of the gallery that the others are queries to; None: each image is both.
    """

    read: Callable[[int], bytes]
    positions: np.ndarray
    labels: np.ndarray
    paths: np.ndarray
    sizes: np.ndarray
    changed: np.ndarray | None = None
    super_labels: np.ndarray | None = None
    in_gallery: np.ndarray | None = None

    def __len__(self):
        return len(self.labels)

    def decoded_image(self, row: int):
        """The decoded picture of a row; raises `images.BadImageError` naming its path."""
        return self.image(row).rgb()

    def image(self, row: int) -> images.EncodedImage:
        """The picture of a row for a view, which decodes what it needs; raises as `image`, as does the view."""
        try:
            encoded = self.image_bytes(row)
        except (
            Exception
        ) as error:  # of the file system, of damaged ArrayRecord files, of an object store's client
            raise images.BadImageError(
                f"cannot read the image {str(self.paths[row])!r}: {str(error)[:300]}"
            ) from error
        return images.EncodedImage(encoded, str(self.paths[row]))

    def image_bytes(self, row: int) -> bytes:
        return self.read(int(self.positions[row]))

    def take(self, rows) -> "EncodedImageDataset":
        """The set of some rows, in their order."""
        arrays = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "read"
        }
        return dataclasses.replace(
            self, **{name: None if a is None else a[rows] for name, a in arrays.items()}
        )


def check_splits(train: EncodedImageDataset, test: EncodedImageDataset) -> None:
    """Raises ValueError where a split is empty, a class is in both, or no test class has two images: nothing could be measured."""
    for name, data in (("train", train), ("test", test)):
        if not len(data):
            raise ValueError(f"the {name} split has no images")
    common = np.intersect1d(train.labels, test.labels)
    if len(common):
        raise ValueError(
            f"{len(common)} classes are in train and in test, such as {common[:5].tolist()}"
        )
    if test.in_gallery is not None:
        if not np.isin(test.labels[~test.in_gallery], test.labels[test.in_gallery]).any():
            raise ValueError(
                "no query has an image of its class in the gallery: there is nothing to retrieve"
            )
    elif len(np.unique(test.labels)) == len(test):
        raise ValueError(
            f"each of the {len(test)} test classes has a single image: there is nothing to retrieve"
        )


def find_bad(data: EncodedImageDataset, *, full: bool, threads: int = 2) -> dict[int, str]:
    """{row: what is wrong} of the pictures that are missing or empty, or, where `full`, that do not decode."""
    bad = {
        int(row): f"{data.paths[row]}: missing or empty" for row in np.flatnonzero(data.sizes == 0)
    }
    if full:

        def decode(row):
            try:
                data.decoded_image(row)
            except images.BadImageError as error:
                return row, str(error)

        todo = [row for row in range(len(data)) if row not in bad]
        with futures.ThreadPoolExecutor(threads) as pool:
            done = tqdm.tqdm(
                pool.map(decode, todo),
                total=len(todo),
                desc="verifying",
                unit="image",
                mininterval=1,
            )
            bad |= dict(filter(None, done))
    return bad


def skip_bad(data: EncodedImageDataset, bad: Iterable[int]) -> EncodedImageDataset:
    """The set without those rows, and without the classes that are left with one image because of them."""
    bad = np.fromiter(bad, np.int64)
    kept = ~np.isin(np.arange(len(data)), bad)
    if data.in_gallery is None:
        left = dict(zip(*np.unique(data.labels[kept], return_counts=True)))
        alone = [label for label in np.unique(data.labels[bad]) if left.get(label, 0) < 2]
        kept &= ~np.isin(data.labels, alone)
    return data.take(np.flatnonzero(kept))


def hold_out(train: EncodedImageDataset, share: float, seed: int) -> dict[str, EncodedImageDataset]:
    """{"train": ..., "test": ...} of a training set: a share of its classes of two images or more, drawn by the seed, is test.

    Raises:
      ValueError: fewer than two such classes.
    """
    classes, counts = np.unique(train.labels, return_counts=True)
    many = classes[counts > 1]
    if len(many) < 2:
        raise ValueError(
            f"classes cannot be held out: expected at least two of two images or more, found {len(many)}"
        )
    held = np.random.default_rng(seed).permutation(many)[
        : min(max(round(len(classes) * share), 1), len(many) - 1)
    ]
    tested = np.isin(train.labels, held)
    return {
        "train": train.take(np.flatnonzero(~tested)),
        "test": train.take(np.flatnonzero(tested)),
    }


def from_rows(root, rows: list[benchmarks.Row]) -> dict[str, EncodedImageDataset]:
    """{"train": ..., "test": ...} of image files under `root`, a local folder or a gs:// or s3:// address."""
    root = epath.Path(root)
    read = _Files(root, [row.path for row in rows])
    with futures.ThreadPoolExecutor(16) as pool:  # a question to the file system each
        sizes, changed = np.array(
            list(pool.map(lambda row: _size_and_time(root / row.path), rows)), np.int64
        ).T
    columns = zip(*((row.label, row.path, row.super_label, row.split) for row in rows))
    labels, paths, super_labels, splits = (np.array(column) for column in columns)
    super_labels = super_labels.astype(np.int64) if np.ptp(super_labels) else None
    everything = EncodedImageDataset(
        read, np.arange(len(rows)), labels.astype(np.int64), paths, sizes, changed, super_labels
    )
    return split_dataset(everything, splits)


def split_dataset(
    everything: EncodedImageDataset, splits: np.ndarray
) -> dict[str, EncodedImageDataset]:
    train, test = (
        everything.take(np.flatnonzero(rows))
        for rows in (splits == benchmarks.TRAIN, splits != benchmarks.TRAIN)
    )
    roles = splits[splits != benchmarks.TRAIN]
    if (roles != benchmarks.TEST).any():
        test = dataclasses.replace(test, in_gallery=roles == benchmarks.GALLERY)
    return {"train": train, "test": test}


class _Files:
    """Encoded pictures by position, from files."""

    def __init__(self, root, paths):
        self._root, self._paths = root, paths

    def __call__(self, position):
        return (self._root / self._paths[position]).read_bytes()


def size_of(path) -> int:
    """Bytes of a file; 0 where there is none."""
    return _size_and_time(path)[0]


def _size_and_time(path) -> tuple[int, int]:
    try:
        if benchmarks.is_remote(path):
            information = path.stat()
            return (0, 0) if information.is_directory else (information.length, information.mtime)
        information = os.stat(path)  # epath's fails where the owner's number has no name
        return (
            (0, 0)
            if stat.S_ISDIR(information.st_mode)
            else (information.st_size, information.st_mtime_ns)
        )
    except OSError:
        return 0, 0
