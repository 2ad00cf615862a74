"""The file of groups of copies: `check_data` writes it, `evaluate` leaves out by it.

It is a table of all images with the columns path, label, split and group, and what else the images
have: boxes, and roles of which some are query and gallery both. --index of --dataset=folder takes
it too.
"""

from collections.abc import Mapping
import csv
import dataclasses
import pathlib

import numpy as np

from rll_jax.data import files, folders, listings, paths
from rll_jax.data.image_dataset import EncodedImageDataset, number_names

_BOX = ("x_1", "y_1", "x_2", "y_2")


def write(
    path: pathlib.Path, data: EncodedImageDataset, splits: np.ndarray, groups: np.ndarray
) -> None:
    """Writes the groups.

    Args:
      path: the file, a .csv.
      data: all images.
      splits: (N,) str, the split of each.
      groups: (N,) integers; images that have a number alone get no group.
    """
    _, places, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    columns = {
        "path": _plain_paths(data),
        "label": data.labels,
        "split": splits,
        "group": np.where(sizes[places] > 1, groups.astype(str), ""),
    }
    if {listings.TEST} < set(splits.tolist()) - {listings.TRAIN}:
        searched = splits != listings.TRAIN
        columns["split"] = np.where(searched, listings.TEST, listings.TRAIN)
        for role, other in (("is_query", listings.GALLERY), ("is_gallery", listings.QUERY)):
            columns[role] = np.where(searched, splits != other, "")
    if data.boxes is not None:
        texts = np.where(data.boxes.any(axis=1, keepdims=True), data.boxes.astype(str), "")
        columns |= dict(zip(_BOX, texts.T, strict=True))
    with (
        files.atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        table.writerows(zip(*columns.values(), strict=True))


def _plain_paths(data: EncodedImageDataset) -> list[str]:
    """Returns the paths without boxes, which are part of the names of boxed images."""
    paths = data.paths.tolist()
    if data.boxes is None:
        return paths
    return [
        path.removesuffix(f" [{','.join(map(str, box))}]")
        for path, box in zip(paths, data.boxes.tolist(), strict=True)
    ]


def read(path: str) -> dict[str, str]:
    """Returns {name of an image: its group, or ""} of a file that `write` wrote.

    Raises:
      ValueError: there is no such file, or it is not such a table.
    """
    rows = folders.read_index(path)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if "group" not in next(csv.reader(file)):
            raise ValueError(f"{path}: no column group: expected a file of check_data --groups_out")
    return {row.name: row.group for row in rows}


def check_names(data: EncodedImageDataset) -> None:
    """Raises ValueError where a name cannot be written so that a table's readers read it."""
    for path in data.paths.tolist():
        if "\n" in path or "\r" in path or not paths.is_utf8(path):
            raise ValueError(
                f"--groups_out: the name {path!r} cannot stand in a table: rename the file"
            )


def leave_out(data: EncodedImageDataset, groups: Mapping[str, str]) -> EncodedImageDataset:
    """Returns a dataset in which an image is not ranked against those of its group.

    Raises:
      ValueError: images are not listed, or the dataset has groups already.
    """
    if data.groups is not None:
        raise ValueError(
            "--groups: the images have groups already, by a column of their table: write the "
            "groups of copies into its column image_id"
        )
    paths = data.paths.tolist()
    if missing := [path for path in paths if path not in groups]:
        raise ValueError(
            f"--groups lists {len(paths) - len(missing)} of the {len(paths)} images, and not "
            f"{missing[0]}: check_data --groups_out writes it from the same --data_dir"
        )
    return dataclasses.replace(data, groups=number_names([groups[path] for path in paths]))
