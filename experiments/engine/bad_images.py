"""bad_images.txt: the images that a run skipped or replaced, up to a limit."""

from collections.abc import Sequence
import pathlib
import sys

import tqdm

from experiments.engine.errors import RunError
from rll_jax.data import files, images
from rll_jax.data.image_dataset import EncodedImageDataset


class BadImagesFile:
    """Lists bad images in a file, each once."""

    def __init__(self, path: pathlib.Path, limit: int, skipped: Sequence[str]) -> None:
        """Lists the images that were skipped before the first step.

        Args:
          path: the file; lines of an earlier part of the run stay.
          limit: the number of images that may turn out bad later, --max_bad_images.
          skipped: a line for each image skipped before the first step.
        """
        self._path, self._limit = path, limit
        self._lines = set(whole_lines(path))
        self._bad: set[str] = set()
        for reason in skipped:
            self._add(f"left out: {reason}")

    def add(self, data: EncodedImageDataset, row: int) -> None:
        """Lists an image that turned out bad during the run.

        Raises:
          RunError: there are more of them than the limit.
        """
        name = str(data.paths[row])
        if name in self._bad:
            return
        self._bad.add(name)
        reason = _reason(data, row)
        self._add(f"broken: {reason}")
        tqdm.tqdm.write(f"left out: {reason}", file=sys.stderr)
        if len(self._bad) > self._limit:
            raise RunError(
                f"{len(self._bad)} images could not be read, more than "
                f"--max_bad_images={self._limit}: see {self._path}; the last is {reason}"
            )

    def _add(self, line: str) -> None:
        if line not in self._lines:
            self._lines.add(line)
            with (
                files.errors_of(self._path),
                self._path.open("a", encoding="utf-8", errors="backslashreplace") as file,
            ):
                file.write(line + "\n")


def _reason(data: EncodedImageDataset, row: int) -> str:
    try:
        data.decoded_image(row)
    except images.BadImageError as error:
        return " ".join(str(error).split())
    return f"{data.paths[row]}: could not be read for a while"


def whole_lines(path: pathlib.Path) -> list[str]:
    """Returns the complete lines of a file. A kill may have cut off the last one."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
