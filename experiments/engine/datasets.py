"""The datasets of the commands: their options, the table of their names, and opening them."""

from collections import Counter
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import pathlib
import sys
from typing import Any, ClassVar, NamedTuple

from etils import epath
import numpy as np

from experiments.engine import phases
from experiments.engine.augmentation import VIEWS
from experiments.engine.options import Section, option
from experiments.engine.runtime import RuntimeOptions
from rll_jax import typing
from rll_jax.data import (
    array_records,
    benchmarks,
    folders,
    image_dataset,
    image_files,
    images,
    listings,
    paths,
)
from rll_jax.data.image_dataset import EncodedImageDataset

Splits = dict[str, EncodedImageDataset]  # "train" and "test"

_SHIPPED_EMOJI = pathlib.Path(__file__).parents[1] / "data" / "emoji"
_TFDS = "tfds:"


class DatasetEntry(NamedTuple):
    """What the commands know of a dataset.

    Attributes:
      open: opens the dataset from its options and `RuntimeOptions`.
      ks: the K of Recall@K that its literature reports.
      augment: the augmentation where --augment is empty, of `VIEWS`.
    """

    open: "Opener"
    ks: tuple[int, ...] = (1, 2, 4, 8)
    augment: str = "random_resized_crop"


@dataclasses.dataclass(frozen=True)
class DataOptions(Section):
    """Which images a run sees, and how it looks at them."""

    title: ClassVar[str] = "Data"

    dataset: str = option(
        "emoji",
        "The dataset: emoji, sop, cub, cars, inshop, folder, or tfds:NAME for a dataset of "
        "tensorflow-datasets.",
        main=True,
    )
    index: str = option(
        "",
        "A table of the images of --dataset=folder, .csv or .parquet, with the columns path, "
        "label and optionally split and super_label. Empty: the classes come from the folder's "
        "layout.",
    )
    test_share: float = option(
        0.5,
        "The share of classes that is searched in --dataset=folder, 0.01 to 0.99, where neither "
        "the folder nor the index has a split.",
        low=0.01,
        high=0.99,
    )
    test_classes: str = option(
        folders.DRAWN,
        "Which classes are searched in --dataset=folder, where neither the folder nor the index "
        "has a split: a share that is drawn (--test_share, --split_seed), or the second half in "
        "the order of their names.",
        choices=folders.TEST_CLASSES,
    )
    split_seed: int = option(
        0, "The seed that draws the classes of --test_share and --validation_share.", low=0
    )
    validation_share: float = option(
        0.0,
        "The share of the training classes to search instead of the test classes, 0 to 0.9. Choose "
        "options with it: the test classes are then not read. 0 searches the test classes.",
        low=0,
        high=0.9,
    )
    image_key: str = option("image", "The feature that holds the image in --dataset=tfds:NAME.")
    label_key: str = option(
        "",
        "The feature that holds the class in --dataset=tfds:NAME. Empty: label or class_id.",
    )
    augment: str = option(
        "",
        "The augmentation of training images and the test view that goes with it. wide_crop, for "
        "photographs, keeps their aspect and tests by the centre; the others but border_crop "
        "squeeze them to a square, as the authors do. Empty: what is usual for the dataset.",
        choices=("", *VIEWS),
    )
    interpolation: images.Interpolation = option(
        "bilinear",
        "How images are resized, antialiased: bilinear, which is faster, or bicubic, as the "
        "authors' recipes do.",
        choices=images.INTERPOLATIONS,
    )
    class_augment: bool = option(
        False,
        "Mirror, turn and recolour all images of a class in a batch alike, so that the class "
        "looks like a new one.",
    )
    image_size: int = option(
        32, "The side of the square images that the network sees, in pixels.", low=8, main=True
    )
    test_image_size: int = option(
        0,
        "The side of the square images that are searched, in pixels. What a random window shows "
        "looks larger than in a test view, so that a larger size may find more (FixRes, Touvron et "
        "al. 2019). 0: --image_size.",
        low=0,
    )
    cache: str = option(
        "none",
        "Keep decoded images, shrunk to what the views need: in memory, on disk in --data_dir, or "
        "not at all.",
        choices=("none", "memory", "disk"),
    )
    on_bad_image: str = option(
        "stop",
        "What to do about bad images found before the first step: stop the run, or skip them and "
        "list them in bad_images.txt.",
        choices=("stop", "skip"),
    )

    def check(self) -> None:
        """See `Section.check`."""
        known = self.dataset in DATASETS or self.dataset.removeprefix(_TFDS) not in (
            "",
            self.dataset,
        )
        if not known:
            raise ValueError(
                f"--dataset={self.dataset}: expected {', '.join(DATASETS)} or {_TFDS}NAME"
            )
        if 0 < self.test_image_size < 8:
            raise ValueError(
                f"--test_image_size={self.test_image_size}: expected 0, or 8 pixels or more"
            )
        if self.index and self.dataset != "folder":
            raise ValueError(f"--index={self.index} goes with --dataset=folder, not {self.dataset}")
        if self.test_classes != folders.DRAWN:
            self._check_test_classes()

    def _check_test_classes(self) -> None:
        if self.dataset != "folder":
            raise ValueError(
                f"--test_classes={self.test_classes} goes with --dataset=folder: {self.dataset} "
                "has a split of its own"
            )
        if self.test_share != 0.5:
            raise ValueError(
                f"--test_classes={self.test_classes} and --test_share={self.test_share} do not go "
                "together: leave one of them out"
            )

    @property
    def entry(self) -> DatasetEntry:
        """The dataset's entry in `DATASETS`."""
        return DATASETS.get(self.dataset, _TFDS_ENTRY)

    @property
    def augmentation(self) -> str:
        """--augment, or what is usual for the dataset."""
        return self.augment or self.entry.augment

    @property
    def searched_size(self) -> int:
        """The side of the images that are searched, pixels."""
        return self.test_image_size or self.image_size

    def train_view(self) -> typing.View:
        """Returns the random view of training images: (image, rng) -> pixels.

        Raises:
          ValueError: the view needs a package that is not installed.
        """
        return VIEWS[self.augmentation].train(self.image_size, self.interpolation)

    def test_view(self) -> Callable[[Any], np.ndarray]:
        """Returns the view of test images: image -> pixels."""
        return VIEWS[self.augmentation].test(self.searched_size, self.interpolation)


Opener = Callable[[DataOptions, RuntimeOptions], Splits]

# ---- Opening


def _open_emoji(data: DataOptions, runtime: RuntimeOptions) -> Splits:
    _refuse_remote(data, runtime)
    # Nothing is written beside the shipped files.
    return array_records.open_dataset(
        runtime.data_dir or _SHIPPED_EMOJI, keep_index=bool(runtime.data_dir)
    )


def _open_tfds(data: DataOptions, runtime: RuntimeOptions) -> Splits:
    _refuse_remote(data, runtime)
    name = data.dataset.removeprefix(_TFDS)
    return array_records.open_tfds(name, runtime.data_dir, data.image_key, data.label_key)


def _open_benchmark(data: DataOptions, runtime: RuntimeOptions) -> Splits:
    """Opens a benchmark's ArrayRecord files, which are written on first use."""
    _refuse_remote(data, runtime)
    folder = array_records_folder(_needed_data_dir(data, runtime), data.dataset)
    if not folder.exists():
        write_array_records(list_images(data, runtime.data_dir), folder, data, runtime)
        return array_records.open_dataset(folder)
    splits = array_records.open_dataset(folder)
    _print_differences(data.dataset, _rows(splits))
    return splits


def open_in_place(data: DataOptions, runtime: RuntimeOptions) -> Splits:
    """Opens the datasets, and writes nothing: a benchmark that is not prepared is read as it is.

    Raises:
      ValueError: as `open_datasets`.
    """
    is_raw = data.dataset in benchmarks.BENCHMARKS and runtime.data_dir
    if not is_raw or array_records_folder(runtime.data_dir, data.dataset).exists():
        return open_datasets(data, runtime)
    with store_errors(runtime.data_dir), phases.told("listing the images"):
        return image_dataset.from_rows(*list_images(data, runtime.data_dir))


def _open_folder(data: DataOptions, runtime: RuntimeOptions) -> Splits:
    """Opens a user's folder in place, or the ArrayRecord files that `prepare` made of one."""
    data_dir = _needed_data_dir(data, runtime)
    prepared = pathlib.Path(data_dir) / "dataset_info.json"
    if paths.is_remote(data_dir) or not prepared.exists():
        return image_dataset.from_rows(*list_images(data, data_dir))
    drawn = (data.test_share, data.split_seed, data.test_classes)
    if data.index or drawn != (0.5, 0, folders.DRAWN):
        raise ValueError(
            f"--data_dir={data_dir} was prepared with its own split: --index, --test_share, "
            "--split_seed and --test_classes go with the folder"
        )
    return array_records.open_dataset(data_dir)


def in_data_dir(open_dataset: Callable[[str], Splits]) -> Opener:
    """Returns the opener of a dataset that needs its folder alone: --data_dir."""

    def opener(data: DataOptions, runtime: RuntimeOptions) -> Splits:
        return open_dataset(_needed_data_dir(data, runtime))

    return opener


DATASETS = {
    "emoji": DatasetEntry(_open_emoji, augment="affine"),
    "sop": DatasetEntry(_open_benchmark, ks=(1, 10, 100, 1000)),
    "cub": DatasetEntry(_open_benchmark),
    "cars": DatasetEntry(_open_benchmark),
    "inshop": DatasetEntry(_open_benchmark, ks=(1, 10, 20, 30, 40, 50)),
    "folder": DatasetEntry(_open_folder),
}
_TFDS_ENTRY = DatasetEntry(_open_tfds)


def open_datasets(data: DataOptions, runtime: RuntimeOptions) -> Splits:
    """Returns {"train": ..., "test": ...}. A benchmark's files are prepared on first use.

    Raises:
      ValueError: the dataset is absent or broken, or has bad images (unless --on_bad_image=skip);
        or an object store cannot be reached, or this dataset cannot be read from one.
    """
    with store_errors(runtime.data_dir, data.index), phases.told("opening the dataset"):
        return data.entry.open(data, runtime)


@contextlib.contextmanager
def store_errors(*places: str) -> Iterator[None]:
    """Turns what an object store's client raises into a ValueError, where a place is of one.

    Clients raise their own kinds where a package is not installed, or without credentials or
    network.
    """
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        remote = [place for place in places if paths.is_remote(place)]
        if not remote:
            raise
        raise ValueError(
            f"cannot read {' or '.join(remote)}: {error or type(error).__name__}"
        ) from error


def _needed_data_dir(data: DataOptions, runtime: RuntimeOptions) -> str:
    if not runtime.data_dir:
        raise ValueError(f"--data_dir is needed for {data.dataset}: the folder of its images")
    return runtime.data_dir


def _refuse_remote(data: DataOptions, runtime: RuntimeOptions) -> None:
    if not paths.is_remote(runtime.data_dir):
        return
    how = "copy it to a local folder"
    if data.dataset in benchmarks.BENCHMARKS:
        how = (
            f"python -m experiments.prepare --dataset={data.dataset} --source={runtime.data_dir} "
            "--data_dir=DIR writes them, and --data_dir=DIR then trains"
        )
    raise ValueError(
        f"--data_dir={runtime.data_dir}: prepared datasets are read from local files: {how}"
    )


# ---- Listing and preparing


def array_records_folder(data_dir: str | pathlib.Path, dataset: str) -> epath.Path:
    """Returns the folder in `data_dir` that holds a dataset's ArrayRecord files."""
    return paths.to_path(data_dir) / f"prepared_{dataset}"


def list_images(data: DataOptions, data_dir: str) -> listings.Listing:
    """Lists the images of a benchmark's published files, or of a folder.

    Differences from a benchmark's published counts are printed on stderr.
    """
    if data.dataset == "folder":
        how = (data.test_share, data.split_seed)
        if data.index:
            rows = folders.read_index(
                data.index, *how, test_classes=data.test_classes, root=data_dir
            )
        else:
            rows = folders.class_folders(
                data_dir, *how, test_classes=data.test_classes, on_left_out=_print_left_out
            )
            _print_roles(folders.split_folders(data_dir))
        return listings.Listing(paths.to_path(data_dir), rows)
    listing = benchmarks.read_listing(data.dataset, data_dir)
    _print_differences(data.dataset, listing.rows)
    return listing


def _print_left_out(left_out: Counter[str]) -> None:
    if text := image_files.describe(left_out):
        print(text, flush=True)


def _print_roles(split_of: dict[str, str]) -> None:
    """Says what is searched where folders of splits have other names than train and test."""
    if searched := [name for name, split in split_of.items() if split == listings.TEST != name]:
        print(f"note: {searched[0]}/ is searched, and nothing of it trains", file=sys.stderr)


def _print_differences(dataset: str, rows: list[listings.Row]) -> None:
    for difference in benchmarks.differences(dataset, rows):
        print(f"note: {difference}", file=sys.stderr)


def roles(test: EncodedImageDataset) -> np.ndarray:
    """Returns the (N,) roles of test images: query, gallery, or test for what is both."""
    found = np.full(len(test), listings.TEST, "<U7")
    found[np.setdiff1d(test.query_rows, test.gallery_rows)] = listings.QUERY
    found[np.setdiff1d(test.gallery_rows, test.query_rows)] = listings.GALLERY
    return found


def _rows(splits: Splits) -> list[listings.Row]:
    train, test = splits["train"], splits["test"]
    train_rows = [
        listings.Row(path, label, listings.TRAIN)
        for path, label in zip(train.paths, train.labels, strict=True)
    ]
    test_rows = [
        listings.Row(path, label, role)
        for path, label, role in zip(test.paths, test.labels, roles(test), strict=True)
    ]
    return train_rows + test_rows


def write_array_records(
    listing: listings.Listing, folder: Any, data: DataOptions, runtime: RuntimeOptions
) -> None:
    """Writes a dataset into ArrayRecord files.

    Raises:
      ValueError: images are missing (unless --on_bad_image=skip), or the files cannot be written.
    """
    with phases.told("looking at the files of the images"):
        splits = image_dataset.from_rows(*listing)
    bad = {split: image_dataset.find_bad(part, full=False) for split, part in splits.items()}
    refuse_bad(bad, splits, data, runtime)
    try:
        array_records.write_dataset(*listing, folder)
    except OSError as error:
        raise ValueError(
            f"cannot prepare {data.dataset} in {folder}: {error}; "
            f"python -m experiments.prepare --dataset={data.dataset} --source={runtime.data_dir} "
            "--data_dir=OUT writes it elsewhere"
        ) from error


# ---- Bad images before the first step


def refuse_bad(
    bad: dict[str, dict[int, str]], splits: Splits, data: DataOptions, runtime: RuntimeOptions
) -> None:
    """Raises ValueError for bad images, as --on_bad_image says, or where no image is good.

    Args:
      bad: {split: {row: what is wrong}}, as `image_dataset.find_bad` finds it.
      splits: the datasets.
      data: the run's data options.
      runtime: the run's runtime options.
    """
    reasons = [reason for rows in bad.values() for reason in rows.values()]
    total = sum(len(splits[split]) for split in bad)
    where = f" of {runtime.data_dir}" if runtime.data_dir else ""
    if reasons and len(reasons) == total:
        raise ValueError(
            f"none of the {total} images{where} can be used, such as {reasons[0]}: are they in "
            "another folder?"
        )
    if reasons and data.on_bad_image == "stop":
        folder = array_records_folder(runtime.data_dir, data.dataset)
        rewrite = ""
        if data.dataset in benchmarks.BENCHMARKS and folder.exists():
            rewrite = f" and remove {folder}, which is written anew"
        more = "; ..." if len(reasons) > 10 else ""
        raise ValueError(
            f"{len(reasons)} of the {total} images{where} cannot be used: "
            f"{'; '.join(reasons[:10])}{more}. Mend them{rewrite}, or skip them by "
            "--on_bad_image=skip"
        )


def open_usable(
    data: DataOptions,
    runtime: RuntimeOptions,
    *,
    all_classes: bool = False,
    open_splits: Opener = open_datasets,
) -> tuple[Splits, list[str]]:
    """Opens the datasets without their bad images.

    Args:
      data: the run's data options.
      runtime: the run's runtime options.
      all_classes: have all classes in "test", and none in "train".
      open_splits: opens them, `open_datasets` or `open_in_place`.

    Returns:
      {"train": ..., "test": ...}, and a line for each skipped image.

    Raises:
      ValueError: as `open_datasets` and `refuse_bad`.
    """
    splits = open_splits(data, runtime)
    if all_classes:
        splits = image_dataset.all_as_test(splits)
    elif data.validation_share:
        train = splits["train"]
        splits = image_dataset.hold_out(train, data.validation_share, data.split_seed)
    full = runtime.verify_images == "full"
    bad = {
        split: image_dataset.find_bad(part, full=full, threads=runtime.threads)
        for split, part in splits.items()
    }
    refuse_bad(bad, splits, data, runtime)
    skipped = []
    for split, reasons in bad.items():
        if reasons:
            good = image_dataset.skip_bad(splits[split], reasons)
            bad_paths = {splits[split].paths[row] for row in reasons}
            alone = set(splits[split].paths) - set(good.paths) - bad_paths
            skipped += reasons.values()
            skipped += [f"{path}: the last one of its class" for path in sorted(alone)]
            splits[split] = good
    return splits, skipped
