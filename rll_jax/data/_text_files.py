"""Text files of a dataset, read line by line so that an error can name the line."""

from collections.abc import Iterator
import pathlib

from etils import epath


def read_lines(path: pathlib.Path | epath.Path) -> Iterator[tuple[int, str]]:
    r"""Yields (line number from 1, text) for each line of a UTF-8 file that is not blank.

    Lines may end with \n, \r\n or \r. A byte order mark is skipped.

    Raises:
      ValueError: the file cannot be read, or a line is not UTF-8 (which one).
    """
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{path}, line {number}: not UTF-8: {line[:80]!r}") from None
        if text.strip():
            yield number, text
