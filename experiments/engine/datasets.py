"""The data set of a config, and how its pictures are looked at."""

import contextlib
import functools
import pathlib
import sys
from typing import Callable, NamedTuple

from rll_jax.data import array_records, benchmarks, folders, image_dataset
from rll_jax.data import paths as paths_lib
from rll_jax.data import views as views_lib

_SHIPPED_EMOJI = pathlib.Path(__file__).parents[1] / "data" / "emoji"
_RESIZE = 256 / 227  # the recipes resize to 256 and keep 227
TFDS = "tfds:"


class Source(NamedTuple):
    """What is usual for a data set.

    Attributes:
      augment: of VIEWS, where the config names none.
      ks: the K of Recall@K.
    """

    augment: str
    ks: tuple[int, ...]


SOURCES = {
    "emoji": Source("affine", (1, 2, 4, 8)),
    "sop": Source("random_resized_crop", (1, 10, 100, 1000)),
    "cub": Source("random_resized_crop", (1, 2, 4, 8)),
    "cars": Source("random_resized_crop", (1, 2, 4, 8)),
    "inshop": Source("random_resized_crop", (1, 10, 20, 30, 40, 50)),
    "folder": Source("random_resized_crop", (1, 2, 4, 8)),
}
_OF_TFDS = Source("random_resized_crop", (1, 2, 4, 8))


class Views(NamedTuple):
    """Two ways to look at a picture, each made for a size in pixels.

    Attributes:
      train: size -> (image, rng) -> (size, size, 3) uint8.
      test: size -> image -> (size, size, 3) uint8.
    """

    train: Callable
    test: Callable


def _whole(size):
    return functools.partial(views_lib.resize_center_crop, size=size, resize=size)


def _centre(size):
    return functools.partial(views_lib.resize_center_crop, size=size, resize=_resize(size))


def _resize(size):
    return round(size * _RESIZE)


def cached_side(size: int) -> int:
    """The short side of pictures kept by --cache, that of the recipes' resized ones."""
    return _resize(size)


VIEWS = {
    "affine": Views(views_lib.RandomAffine, _whole),
    "random_resized_crop": Views(views_lib.RandomResizedCrop, _centre),
    "resize_crop": Views(lambda size: views_lib.ResizeCrop(size, _resize(size)), _centre),
    "border_crop": Views(
        lambda size: views_lib.BorderCrop(size, _resize(size)),
        lambda size: functools.partial(views_lib.border_center_crop, size=size, fit=_resize(size)),
    ),
    "colour_jitter": Views(
        lambda size: views_lib.Jittered(views_lib.RandomResizedCrop(size), strong=False), _centre
    ),
    "rand_augment": Views(
        lambda size: views_lib.Jittered(views_lib.RandomResizedCrop(size), strong=True), _centre
    ),
}


def is_known(dataset: str) -> bool:
    return dataset in SOURCES or dataset.startswith(TFDS) and len(dataset) > len(TFDS)


def find(dataset: str) -> Source:
    return SOURCES.get(dataset, _OF_TFDS)


def augment(config) -> str:
    """Of VIEWS: what the config names, or what is usual for its set."""
    return config.augment or find(config.dataset).augment


def views(config) -> Views:
    return VIEWS[augment(config)]


def open_sets(config) -> dict[str, image_dataset.EncodedImageDataset]:
    """{"train": ..., "test": ...}; a benchmark's published files are prepared on first use, in --data_dir.

    Raises:
      ValueError: the set is not there, broken, or lacks pictures (unless --on_bad_image=skip); or an object store that cannot be reached,
        or from which this set cannot be read.
    """
    with in_one_line(config.data_dir, config.index):
        return _open(config)


def _open(config) -> dict[str, image_dataset.EncodedImageDataset]:
    if config.dataset != "folder" and paths_lib.is_remote(config.data_dir):
        how = "copy it to a local folder"
        if config.dataset in benchmarks.BENCHMARKS:
            how = f"python -m experiments.prepare --dataset={config.dataset} --source={config.data_dir} --data_dir=DIR writes them, and --data_dir=DIR then trains"
        raise ValueError(
            f"--data_dir={config.data_dir}: prepared sets are read from local files: {how}"
        )
    if config.dataset.startswith(TFDS):
        return array_records.open_tfds(
            config.dataset.removeprefix(TFDS), config.data_dir, config.image_key, config.label_key
        )
    if config.dataset == "emoji":
        # shipped: nothing is written beside it
        return array_records.open_dataset(
            config.data_dir or _SHIPPED_EMOJI, keep_index=bool(config.data_dir)
        )
    if not config.data_dir:
        raise ValueError(f"--data_dir is needed for {config.dataset}: the folder of its pictures")
    prepared = prepared_in(config.data_dir, config.dataset)
    if (
        config.dataset == "folder"
    ):  # anyone's own folder is read where it is, what was made of it where it is named
        if (
            paths_lib.is_remote(config.data_dir)
            or not (pathlib.Path(config.data_dir) / "dataset_info.json").exists()
        ):
            return image_dataset.from_rows(*listing(config))
        if config.index or (config.test_share, config.split_seed) != (0.5, 0):
            raise ValueError(
                f"--data_dir={config.data_dir} was prepared with its own split: --index, --test_share and --split_seed go with the folder"
            )
        return array_records.open_dataset(config.data_dir)
    if not prepared.exists():
        prepare(*listing(config), prepared, config)
        return array_records.open_dataset(prepared)
    sets = array_records.open_dataset(prepared)
    _tell_differences(config.dataset, _rows(sets))
    return sets


@contextlib.contextmanager
def in_one_line(*paths):
    """Where one of the paths is of an object store, makes ValueErrors of what its client raises: not installed, no credentials, no network."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        if not any(map(paths_lib.is_remote, paths)):
            raise
        raise ValueError(
            f"cannot read {' or '.join(filter(paths_lib.is_remote, paths))}: {error or type(error).__name__}"
        ) from error


def prepared_in(data_dir, dataset: str) -> pathlib.Path:
    return image_dataset.epath.Path(data_dir) / f"prepared_{dataset}"


def listing(config) -> benchmarks.Listing:
    """The images of the files as they were published, or of a folder; differences from the published counts are told on stderr."""
    if config.dataset == "folder":
        if config.index:
            return benchmarks.Listing(
                config.data_dir,
                folders.read_index(config.index, config.test_share, config.split_seed),
            )
        return benchmarks.Listing(
            config.data_dir,
            folders.class_folders(config.data_dir, config.test_share, config.split_seed),
        )
    found = benchmarks.read_listing(config.dataset, config.data_dir)
    _tell_differences(config.dataset, found.rows)
    return found


def _tell_differences(dataset: str, rows) -> None:
    for difference in benchmarks.differences(dataset, rows):
        print(f"note: {difference}", file=sys.stderr)


def _rows(sets) -> list[benchmarks.Row]:
    train, test = sets["train"], sets["test"]
    roles = (
        [benchmarks.TEST] * len(test)
        if test.in_gallery is None
        else [(benchmarks.QUERY, benchmarks.GALLERY)[int(g)] for g in test.in_gallery]
    )
    columns = zip(
        [*train.paths, *test.paths],
        [*train.labels, *test.labels],
        [benchmarks.TRAIN] * len(train) + roles,
    )
    return [benchmarks.Row(*row) for row in columns]


def prepare(root, rows, directory, config) -> None:
    """Writes the set into ArrayRecord files; raises ValueError for missing pictures unless --on_bad_image=skip, or where it cannot."""
    sets = image_dataset.from_rows(root, rows)
    refuse_bad(
        {split: image_dataset.find_bad(data, full=False) for split, data in sets.items()},
        sets,
        config,
    )
    try:
        array_records.write_dataset(root, rows, directory)
    except OSError as error:
        raise ValueError(
            f"cannot prepare {config.dataset} in {directory}: {error}; python -m experiments.prepare --dataset={config.dataset} "
            f"--source={config.data_dir} --data_dir=OUT writes it elsewhere"
        )


def refuse_bad(bad: dict[str, dict[int, str]], sets: dict, config) -> None:
    """Raises ValueError, naming the first ten, where pictures are bad and --on_bad_image is stop, or where none is good."""
    found = [reason for of_split in bad.values() for reason in of_split.values()]
    total = sum(len(sets[split]) for split in bad)
    where = f" of {config.data_dir}" if config.data_dir else ""
    if found and len(found) == total:
        raise ValueError(
            f"none of the {total} images{where} can be used, such as {found[0]}: are they in another folder?"
        )
    if found and config.on_bad_image == "stop":
        first, prepared = "; ".join(found[:10]), prepared_in(config.data_dir, config.dataset)
        anew = f" and remove {prepared}, which is written anew" * (
            config.dataset in benchmarks.BENCHMARKS and prepared.exists()
        )
        raise ValueError(
            f"{len(found)} of the {total} images{where} cannot be used: {first}{'; ...' * (len(found) > 10)}. "
            f"Mend them{anew}, or leave them out by --on_bad_image=skip"
        )


def open_usable(config) -> tuple[dict[str, image_dataset.EncodedImageDataset], list[str]]:
    """The sets without the pictures that cannot be used, and what is wrong with those; raises as `open_sets` and `refuse_bad`."""
    sets = open_sets(config)
    if config.validation_share:
        sets = image_dataset.hold_out(sets["train"], config.validation_share, config.split_seed)
    bad = {
        split: image_dataset.find_bad(
            data, full=config.verify_images == "full", threads=config.threads
        )
        for split, data in sets.items()
    }
    refuse_bad(bad, sets, config)
    left_out = []
    for split, of_split in bad.items():
        if of_split:
            kept = image_dataset.skip_bad(sets[split], of_split)
            alone = (
                set(sets[split].paths)
                - set(kept.paths)
                - {sets[split].paths[row] for row in of_split}
            )
            left_out += [
                *of_split.values(),
                *(f"{path}: the last one of its class" for path in sorted(alone)),
            ]
            sets[split] = kept
    return sets, left_out
