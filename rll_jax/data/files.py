"""Files that are complete or absent, and locks between processes."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import sys
from typing import BinaryIO
import uuid


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`, which replaces `path` when the block ends.

    A block that fails removes the temporary file and leaves `path` as it was.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with errors_of(path, temporary):
            yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def errors_of(
    path: str | os.PathLike[str], temporary: pathlib.Path | None = None
) -> Iterator[None]:
    """Names the path in an OSError that names none, as that of a full disk, or `temporary`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary, str(temporary)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `path`, which is renamed to `path` when the block ends.

    The result is either complete or absent. A folder that is at `path` by then is left untouched.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path.parent, f".{path.name}.") as temporary:
        with errors_of(path):
            yield temporary
        temporary.chmod(0o755)  # a temporary folder is its owner's alone
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise


@contextlib.contextmanager
def temporary_folder(directory: pathlib.Path, prefix: str) -> Iterator[pathlib.Path]:
    """Yields a new folder of a hidden name, which is removed when the block ends.

    Folders of that kind that a killed process has left are removed before, and told of on stderr.
    The folder is locked while it is used, so that none in use is removed.

    Args:
      directory: where the folder is made.
      prefix: the beginning of its name.
    """
    for leftover in _leftovers(directory, prefix):
        print(f"removing {leftover}, which an interrupted process left", file=sys.stderr)
        shutil.rmtree(leftover, ignore_errors=True)
    # The name is known before: a signal that comes while the folder is made leaves nothing.
    folder = directory / f"{prefix}{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(mode=0o700)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _lock(descriptor, wait=False)
            yield folder
        finally:
            os.close(descriptor)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _leftovers(directory: pathlib.Path, prefix: str) -> list[pathlib.Path]:
    """Returns the folders that `temporary_folder` made and that no process holds."""
    found = []
    for path in directory.iterdir():
        is_made_here = re.fullmatch(r"[a-z0-9_]{8}", path.name.removeprefix(prefix))
        if not path.name.startswith(prefix) or not is_made_here or not path.is_dir():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if _lock(descriptor, wait=False):
                found.append(path)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
    return sorted(found)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Locks an open file or folder; returns whether its file system has locks.

    Raises:
      BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextlib.contextmanager
def exclusive_lock(path: str | os.PathLike[str], *, wait: bool) -> Iterator[BinaryIO]:
    """Holds a lock file that one process at a time can hold; a killed process loses it.

    Yields the file, open to append. A child process that inherits it holds the lock too, as long as
    it lives. File systems without locks are taken as unlocked.

    Args:
      path: the lock file, which is created and stays.
      wait: wait for the other process; otherwise BlockingIOError is raised.
    """
    with pathlib.Path(path).open("ab") as file:
        _lock(file.fileno(), wait=wait)
        yield file


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its name where it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
