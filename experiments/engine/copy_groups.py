"""The file of groups of copies: `check_data` writes it, `evaluate` leaves out by it.

It is a table of all images with the columns path, label, split and group, which --index of
--dataset=folder takes too.
"""

from collections.abc import Mapping
import csv
import dataclasses
import pathlib

import numpy as np

from rll_jax.data import files, folders
from rll_jax.data.image_dataset import EncodedImageDataset, number_names


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
    names = np.where(sizes[places] > 1, groups.astype(str), "")
    with (
        files.atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "label", "split", "group"])
        table.writerows(zip(data.paths, data.labels, splits, names, strict=True))


def read(path: str) -> dict[str, str]:
    """Returns {path of an image: its group, or ""} of a file that `write` wrote.

    Raises:
      ValueError: there is no such file, or it is not such a table.
    """
    return {row.path: row.group for row in folders.read_index(path)}


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
