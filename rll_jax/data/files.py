"""Files that are complete or absent, and locks between processes."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import tempfile
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
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `path`, which is renamed to `path` when the block ends.

    The result is either complete or absent. A folder that is at `path` by then is left untouched.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as name:
        temporary = pathlib.Path(name)
        yield temporary
        temporary.chmod(0o755)  # a temporary folder is its owner's alone
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
        else:
            temporary.mkdir()  # for the clean-up to find


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
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield file
