"""Paths of a dataset's files: local or in an object store, inside the dataset's folder."""

import os
import pathlib
import re
import stat
from typing import cast

from etils import epath

AnyPath = str | os.PathLike[str]
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_remote(path: AnyPath) -> bool:
    """Whether a path is in an object store, such as gs:// or s3://.

    Only whole files are read from there, and nothing is renamed there.
    """
    return bool(_ADDRESS.match(os.fspath(path)))


def to_path(path: AnyPath) -> epath.Path:
    """Returns a local path as pathlib's, and an address of an object store as epath's.

    epath takes the letters of a local path as a pattern in `glob`, leaves out names that end in "~"
    in `iterdir`, and takes the folder /gs for an object store. pathlib's has all methods of
    epath's that are used here.
    """
    return epath.Path(path) if is_remote(path) else cast(epath.Path, pathlib.Path(path))


def is_utf8(path: AnyPath) -> bool:
    """Whether a path is UTF-8, as most but not all libraries need it."""
    return not any("\ud800" <= letter <= "\udfff" for letter in os.fspath(path))


def check_utf8(path: AnyPath) -> None:
    """Raises ValueError where a path is not UTF-8, which ArrayRecord files need."""
    if not is_utf8(path):
        raise ValueError(
            f"{path}: ArrayRecord files need a folder whose name is UTF-8: rename it, or choose "
            "another folder"
        )


def is_inside_root(path: str) -> bool:
    r"""Whether a path, read from a dataset's root folder, stays under that folder.

    An empty path, an absolute path, and a path with "..", a null character or "\" do not.
    """
    relative = pathlib.PurePosixPath(path)
    return (
        bool(path)
        and not relative.is_absolute()
        and ".." not in relative.parts
        and "\0" not in path
        and "\\" not in path
    )


def file_size(path: epath.Path) -> int:
    """Returns the bytes of a file; 0 where the path is missing or a folder."""
    return file_size_and_time(path)[0]


def file_size_and_time(path: epath.Path) -> tuple[int, int]:
    """Returns (bytes, time of the last change) of a file; (0, 0) where it is missing or a folder.

    The time is in ns for a local file. For an object store it is what `epath` tells.
    """
    try:
        if is_remote(path):
            status = path.stat()
            return (0, 0) if status.is_directory else (status.length, status.mtime)
        status = os.stat(path)  # epath's `stat` fails where the owner's number has no name
        return (0, 0) if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)
    except OSError:
        return 0, 0
