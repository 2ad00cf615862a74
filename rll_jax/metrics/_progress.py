"""How far a long count is: whom it tells, and a file that lets an interrupted one go on."""

from collections.abc import Callable, Sequence
import hashlib
import os
import pathlib
import tempfile
import time
import zipfile

import jax
import numpy as np

from rll_jax.metrics._problem import Problem

Progress = Callable[[str, int, int], None]  # (what is done, how much of it, of how much)

_SAVE_SECONDS = 60.0
_HASHED_ROWS = 65536  # rows of a file that are read at once


class Watch:
    """Hears how far a count is, tells it on, and keeps the counts in a file."""

    def __init__(
        self,
        problem: Problem,
        settings: Sequence[object],
        progress: Progress | None,
        state_file: str | os.PathLike[str] | None,
    ) -> None:
        """Prepares the watch.

        Args:
          problem: what is counted.
          settings: all else on which the counts depend.
          progress: whom to tell, or None.
          state_file: the file that keeps the counts, or None.

        Raises:
          ValueError: the folder of the file does not exist.
        """
        self._progress = progress
        self._path = None if state_file is None else pathlib.Path(state_file)
        if self._path is None:
            return
        if not self._path.parent.is_dir():
            raise ValueError(f"state_file={self._path}: no folder {self._path.parent}")
        self._digest = _digest(problem, settings)
        self._last_saved = time.monotonic()

    def tell(self, what: str, done: int, total: int) -> None:
        """Tells how much of a stage is done."""
        if self._progress is not None:
            self._progress(what, done, total)

    def saved_counts(self) -> tuple[int, tuple[np.ndarray, np.ndarray]] | None:
        """Returns the number of tiles and the counts that the file keeps; None without a file.

        Raises:
          ValueError: the file is of another count, or not such a file.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            with np.load(self._path, allow_pickle=False) as saved:
                digest, done = str(saved["digest"]), int(saved["done"])
                counts = saved["may_be"], saved["surely"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"state_file={self._path} holds no counts: {error}; choose another name, or remove "
                "it"
            ) from error
        if digest != self._digest:
            raise ValueError(
                f"state_file={self._path} holds the counts of other embeddings, labels or "
                "settings: choose another name, or remove it"
            )
        return done, counts

    def counted(self, done: int, counts: tuple[jax.Array, jax.Array], total: int) -> None:
        """Hears that so many tiles of each device are counted."""
        self.tell("ranks", done, total)
        if self._path is not None and time.monotonic() - self._last_saved > _SAVE_SECONDS:
            self.keep_counts(done, counts)

    def keep_counts(self, done: int, counts: tuple[jax.Array, jax.Array]) -> None:
        """Writes the counts so far into the file, if there is one; it is whole or as before."""
        if self._path is None:
            return
        may_be, surely = (np.asarray(count) for count in counts)
        descriptor, temporary = tempfile.mkstemp(
            dir=self._path.parent, prefix=f".{self._path.name}."
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, digest=self._digest, done=done, may_be=may_be, surely=surely)
            os.replace(temporary, self._path)
        except BaseException:
            pathlib.Path(temporary).unlink(missing_ok=True)
            raise
        self._last_saved = time.monotonic()

    def finished(self) -> None:
        """Removes the file: all is counted."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _digest(problem: Problem, settings: Sequence[object]) -> str:
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    arrays = [problem.query_labels, problem.gallery_labels]
    arrays += [*problem.query_codes, *problem.gallery_codes]
    for level in problem.levels:
        arrays += [level.gallery] if problem.symmetric else [level.queries, level.gallery]
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        for first in range(0, len(array), _HASHED_ROWS):
            digest.update(np.ascontiguousarray(array[first : first + _HASHED_ROWS]).data)
    return digest.hexdigest()
