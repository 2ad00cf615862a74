"""Datasets of labelled images behind one interface, whether the images are files or records.

Bad images: an image is bad where it is missing, empty, or cannot be read or decoded.
  - Found: `find_bad` lists the bad images of a dataset, before training.
  - Skipped: `skip_bad` leaves listed images out of a dataset.
  - Met later: `EncodedImageDataset.image` and the views raise `images.BadImageError`, which names
    the image. `pipeline.train_batches` replaces such an image, `pipeline.test_batches` yields a
    white one; both report its row to `on_bad`, or raise the error where `on_bad` is None.
Readers list bad images like all others: `array_records.write_dataset` writes a missing file as an
empty image, and `cache` keeps an image that does not decode as it is.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
import dataclasses
import functools

from etils import epath
import numpy as np
from PIL import Image
import tqdm

from rll_jax.data import images, paths
from rll_jax.data.listings import GALLERY, QUERY, TEST, TRAIN, Row


@dataclasses.dataclass(frozen=True)
class EncodedImageDataset:
    """One split of a dataset: an encoded image for each row, and what is known of the image.

    It is a `rll_jax.typing.ImageDataset`. `positions` let a part of a dataset read from the same
    source as the whole: row i is the image at `positions[i]`.

    Attributes:
      read: returns the encoded image at a position.
      positions: (N,) integers, the positions of the rows.
      labels: (N,) int64 classes.
      paths: (N,) str, the path of each image from its root, or another name of it. Where a picture
        has boxes, the box is part of the name.
      sizes: (N,) int64 bytes of each encoded image, 0 where it is missing or empty.
      changed: (N,) int64, when each file was last changed (ns for local files), or None where that
        is not known.
      super_labels: (N,) int64 super classes, or None.
      in_gallery: (N,) bool, whether a row belongs to the gallery in which the queries are
        searched, or None where each image is searched among all others.
      is_query: (N,) bool, whether a row is a query; None: those outside the gallery are. With it,
        a row may be both. It goes with `in_gallery`.
      groups: (N,) int64; a row is not ranked against rows of its own group. None: no groups.
      image_ids: (N,) int64; a row is not ranked against rows of its own id. None: each row has its
        own.
      boxes: (N, 4) int64, the pixels left, top, right and bottom of what an image is of its upright
        picture; a row of zeros: all of it. None: no boxes.
    """

    read: Callable[[int], bytes]
    positions: np.ndarray
    labels: np.ndarray
    paths: np.ndarray
    sizes: np.ndarray
    changed: np.ndarray | None = None
    super_labels: np.ndarray | None = None
    in_gallery: np.ndarray | None = None
    groups: np.ndarray | None = None
    image_ids: np.ndarray | None = None
    is_query: np.ndarray | None = None
    boxes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def decoded_image(self, row: int) -> Image.Image:
        """Returns the decoded image of a row, RGB and upright.

        Raises:
          images.BadImageError: the image cannot be read or decoded.
        """
        return self.image(row).rgb()

    def image(self, row: int) -> images.EncodedImage:
        """Returns the image of a row for a view, which decodes as much of it as it needs.

        Raises:
          images.BadImageError: the image cannot be read. Decoding, in a view, may raise it too.
        """
        path = str(self.paths[row])
        try:
            encoded = self.image_bytes(row)
        except Exception as error:  # file systems, ArrayRecord and object stores have their own
            raise images.BadImageError(
                f"cannot read the image {path!r}: {str(error)[:300]}"
            ) from error
        return images.EncodedImage(encoded, path, self.box(row))

    def image_bytes(self, row: int) -> bytes:
        """Returns the encoded picture of a row; raises what `read` raises."""
        return self.read(int(self.positions[row]))

    def box(self, row: int) -> images.Box | None:
        """Returns what the image of a row is of its picture; None: all of it."""
        if self.boxes is None or not self.boxes[row].any():
            return None
        return tuple(self.boxes[row].tolist())

    @property
    def query_rows(self) -> np.ndarray:
        """The rows that are queries, in order."""
        if self.in_gallery is None:
            return np.arange(len(self))
        return np.flatnonzero(~self.in_gallery if self.is_query is None else self.is_query)

    @property
    def gallery_rows(self) -> np.ndarray:
        """The rows that are found, in order."""
        return np.arange(len(self)) if self.in_gallery is None else np.flatnonzero(self.in_gallery)

    def take(self, rows: np.ndarray | Sequence[int]) -> "EncodedImageDataset":
        """Returns the dataset of some rows, in the order of `rows`."""
        columns = self.columns()
        taken = {name: None if a is None else a[rows] for name, a in columns.items()}
        return dataclasses.replace(self, **taken)

    def columns(self) -> dict[str, np.ndarray | None]:
        """Returns {name: (N,) array or None} of what there is for each row."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "read"]
        return {name: getattr(self, name) for name in names}


def check_splits(train: EncodedImageDataset, test: EncodedImageDataset) -> None:
    """Checks that the splits can train and measure something.

    Raises:
      ValueError: a split is empty, a class is in both splits, or no query has another image of its
        class to find.
    """
    for name, data in (("train", train), ("test", test)):
        if not len(data):
            raise ValueError(f"the {name} split has no images")
    common = np.intersect1d(train.labels, test.labels)
    if len(common):
        raise ValueError(
            f"{len(common)} classes are in train and in test, such as {common[:5].tolist()}"
        )
    if test.in_gallery is not None:
        of_gallery = test.labels[test.gallery_rows]
        both = np.intersect1d(test.query_rows, test.gallery_rows)
        labels, counts = np.unique(of_gallery, return_counts=True)
        # A query does not find itself.
        alone = np.setdiff1d(test.query_rows, both)
        if (
            not np.isin(test.labels[alone], labels).any()
            and not np.isin(test.labels[both], labels[counts > 1]).any()
        ):
            raise ValueError(
                "no query has an image of its class in the gallery: there is nothing to retrieve"
            )
    elif len(np.unique(test.labels)) == len(test):
        raise ValueError(
            f"each of the {len(test)} test classes has a single image: there is nothing to retrieve"
        )


def find_bad(data: EncodedImageDataset, *, full: bool, threads: int = 2) -> dict[int, str]:
    """Finds the bad images of a dataset.

    Args:
      data: the dataset.
      full: decode every image. Otherwise only missing and empty images are found, by their sizes,
        and boxes that lie outside of their pictures.
      threads: the number of threads that decode.

    Returns:
      {row: what is wrong with its image}. The missing and empty images come first.
    """
    bad = {
        int(row): f"{data.paths[row]}: missing or empty" for row in np.flatnonzero(data.sizes == 0)
    }
    boxed = data.boxes is not None
    if not full and not boxed:
        return bad
    rows = [row for row in range(len(data)) if row not in bad and (full or data.box(row))]
    error = _decoding_error if full else _box_error
    with futures.ThreadPoolExecutor(threads) as pool:
        reasons = tqdm.tqdm(
            pool.map(functools.partial(error, data), rows),
            total=len(rows),
            desc="verifying" if full else "looking at boxes",
            unit="image",
            mininterval=1,
            delay=0 if full else 2,
        )
        for row, reason in zip(rows, reasons, strict=True):
            if reason is not None:
                bad[row] = reason
    return bad


def _box_error(data: EncodedImageDataset, row: int) -> str | None:
    """Returns what is wrong with a row's box; other faults show when the image is used."""
    try:
        data.image(row)
    except images.BadImageError as error:
        return str(error) if "bounding box" in str(error) else None
    return None


def _decoding_error(data: EncodedImageDataset, row: int) -> str | None:
    try:
        data.decoded_image(row)
    except images.BadImageError as error:
        return str(error)
    return None


def skip_bad(data: EncodedImageDataset, bad: Iterable[int]) -> EncodedImageDataset:
    """Returns the dataset without its bad images.

    Classes that are left with one image because of that are skipped too, as nothing can be
    retrieved in them. Where queries and gallery are apart, all classes stay.

    Args:
      data: the dataset.
      bad: the rows to skip, such as the result of `find_bad`.
    """
    bad_rows = np.fromiter(bad, np.int64)
    kept = ~np.isin(np.arange(len(data)), bad_rows)
    if data.in_gallery is None:
        labels, counts = np.unique(data.labels[kept], return_counts=True)
        remaining = dict(zip(labels, counts, strict=True))
        alone = [c for c in np.unique(data.labels[bad_rows]) if remaining.get(c, 0) < 2]
        kept &= ~np.isin(data.labels, alone)
    return data.take(np.flatnonzero(kept))


def hold_out(train: EncodedImageDataset, share: float, seed: int) -> dict[str, EncodedImageDataset]:
    """Splits a training set by class, for choosing options without the test classes.

    Args:
      train: the training set.
      share: the share of its classes that is test: at least one class. Only classes with two
        images or more are drawn, and at least one of these stays in train.
      seed: draws the test classes.

    Returns:
      {"train": ..., "test": ...}.

    Raises:
      ValueError: there are fewer than two classes with two images or more.
    """
    classes, counts = np.unique(train.labels, return_counts=True)
    candidates = classes[counts > 1]
    if len(candidates) < 2:
        raise ValueError(
            "classes cannot be held out: expected at least two classes with two images or more, "
            f"found {len(candidates)}"
        )
    num_test = min(max(round(len(classes) * share), 1), len(candidates) - 1)
    test_classes = np.random.default_rng(seed).permutation(candidates)[:num_test]
    is_test = np.isin(train.labels, test_classes)
    return {
        "train": train.take(np.flatnonzero(~is_test)),
        "test": train.take(np.flatnonzero(is_test)),
    }


def all_as_test(splits: dict[str, EncodedImageDataset]) -> dict[str, EncodedImageDataset]:
    """Returns the splits of a dataset with all images in test, each searched among all others.

    Args:
      splits: {"train": ..., "test": ...} of one dataset, which read from the same source.
    """
    train, test = (
        dataclasses.replace(splits[name], in_gallery=None, is_query=None)
        for name in ("train", "test")
    )
    pairs = zip(train.columns().items(), test.columns().values(), strict=True)
    joined = {
        name: None if of_train is None or of_test is None else np.concatenate([of_train, of_test])
        for (name, of_train), of_test in pairs
    }
    whole = dataclasses.replace(train, **joined)
    return {"train": whole.take([]), "test": whole}


def from_rows(root: paths.AnyPath, rows: list[Row]) -> dict[str, EncodedImageDataset]:
    """Makes the datasets of listed image files.

    Args:
      root: the folder that the rows' paths start from: local, or a gs:// or s3:// address.
      rows: at least one image.

    Returns:
      {"train": ..., "test": ...}; query and gallery rows are both in "test".
    """
    root = paths.to_path(root)
    with futures.ThreadPoolExecutor(16) as pool:  # each asks the file system once
        sizes_and_times = pool.map(lambda row: paths.file_size_and_time(root / row.path), rows)
        sizes, changed = np.array(list(sizes_and_times), np.int64).T
    super_labels = np.array([row.super_label for row in rows], np.int64)
    dataset = EncodedImageDataset(
        read=_FileReader(root, [row.path for row in rows]),
        positions=np.arange(len(rows)),
        labels=np.array([row.label for row in rows], np.int64),
        paths=np.array([row.name for row in rows]),
        sizes=sizes,
        changed=changed,
        super_labels=super_labels if np.ptp(super_labels) else None,
        groups=number_names([row.group for row in rows]),
        image_ids=number_names([row.image_id for row in rows]),
        boxes=boxes_of([row.box_text for row in rows]),
    )
    return split_dataset(dataset, np.array([row.split for row in rows]))


def number_names(names: Sequence[str] | np.ndarray) -> np.ndarray | None:
    """Numbers the (N,) names of groups or images: (N,) int64; None where all are "".

    Each row without a name gets a number of its own.
    """
    named = np.array([bool(name) for name in names])
    if not named.any():
        return None
    found, numbers = np.unique(np.asarray(names, np.str_), return_inverse=True)
    return np.where(named, numbers, len(found) + np.arange(len(named)))


def boxes_of(texts: Sequence[str] | np.ndarray) -> np.ndarray | None:
    """Returns the boxes of the (N,) `Row.box_text`: (N, 4) int64; None where all are ""."""
    if not any(texts):
        return None
    boxes = [[int(number) for number in (text or "0,0,0,0").split(",")] for text in texts]
    return np.array(boxes, np.int64)


def split_dataset(
    dataset: EncodedImageDataset, splits: np.ndarray
) -> dict[str, EncodedImageDataset]:
    """Splits a dataset by the split of each row.

    Args:
      dataset: all rows.
      splits: (N,) str, of `listings.SPLITS`.

    Returns:
      {"train": ..., "test": ...}; where there are query or gallery rows, `in_gallery` of "test"
      tells which rows are gallery, and `is_query` which are queries if some are both.
    """
    is_train = splits == TRAIN
    train, test = dataset.take(np.flatnonzero(is_train)), dataset.take(np.flatnonzero(~is_train))
    roles = splits[~is_train]
    if (roles != TEST).any():
        is_query = roles != GALLERY if (roles == TEST).any() else None
        test = dataclasses.replace(test, in_gallery=roles != QUERY, is_query=is_query)
    return {"train": train, "test": test}


class _FileReader:
    """Reads the encoded image at a position from the file that has this number in a list."""

    def __init__(self, root: epath.Path, file_paths: list[str]) -> None:
        self._root, self._file_paths = root, file_paths

    def __call__(self, position: int) -> bytes:
        return (self._root / self._file_paths[position]).read_bytes()
