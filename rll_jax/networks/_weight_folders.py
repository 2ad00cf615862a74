"""The weights of a folder, or of a repository of the Hugging Face hub, by the names of files."""

from collections.abc import Callable, Iterable
import json
import os
import pathlib
import re

import numpy as np

from rll_jax.networks import _weight_files

# As the hub's libraries name them. What needs no torch comes first.
FIRST = "model.safetensors"
_NAMES = (
    *(FIRST, f"{FIRST}.index.json", "open_clip_model.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin"),
)
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
_LISTED = 10  # names in an error


def read_folder(
    folder: str | os.PathLike[str], otherwise: str = "the folder holds no weights"
) -> dict[str, np.ndarray]:
    """Reads {name: array} of the weights in a folder, as `read_model` does."""
    folder = pathlib.Path(folder)
    names = [file.name for file in folder.iterdir() if file.is_file()]
    return read_model(names, lambda name: folder / name, otherwise)


def read_model(
    names: Iterable[str],
    fetch: Callable[[str], str | os.PathLike[str]],
    otherwise: str = "there are no weights",
) -> dict[str, np.ndarray]:
    """Reads {name: array} of a model's files: the first of the usual names that is there.

    Weights in several files are read one file after the other, by their index, or by the numbers in
    their names.

    Args:
      names: what the folder or repository holds; what is in its folders is not looked at.
      fetch: returns the path of a file by its name.
      otherwise: what an error says where there are no such files.

    Raises:
      ValueError: there are no such files (what there is), a part is missing, or a file cannot be
        read.
    """
    names = sorted(name for name in names if "/" not in name)
    for name in _NAMES:
        if name in names:
            path = fetch(name)
            if not name.endswith(".json"):
                return _weight_files.read(path)
            return _read_parts(_parts_of_index(pathlib.Path(path)), names, fetch)
    if numbered := [part for name in names if (part := _PART.fullmatch(name))]:
        start, _, count, ending = numbered[0].groups()
        parts = [f"{start}-{number:05d}-of-{count}{ending}" for number in range(1, int(count) + 1)]
        return _read_parts(parts, names, fetch)
    there = f"{', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''}"
    raise ValueError(
        f"{otherwise}: expected one of {', '.join(_NAMES)}, found {there or 'no files'}"
    )


def _parts_of_index(index: pathlib.Path) -> list[str]:
    """Returns the names of the files that an index names."""
    try:
        parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not parts or any(re.search(r"[/\\\0]|^\.*$", part) for part in parts):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{index}: expected the names of the files of weights") from None
    return parts


def _read_parts(
    parts: list[str], names: list[str], fetch: Callable[[str], str | os.PathLike[str]]
) -> dict[str, np.ndarray]:
    if missing := [part for part in parts if part not in names]:
        raise ValueError(
            f"{len(missing)} of the {len(parts)} files of its weights are missing, such as "
            f"{missing[0]}"
        )
    arrays: dict[str, np.ndarray] = {}
    for part in parts:
        arrays |= _weight_files.read(fetch(part))
    return arrays
