"""What a command says while it takes its time: a line for a phase of more than two seconds."""

from collections.abc import Iterator
import contextlib
import sys
import threading
from typing import TextIO

import tqdm

_SECONDS = 2.0


@contextlib.contextmanager
def told(text: str, stream: TextIO | None = None) -> Iterator[None]:
    """Prints `text` once the block has taken more than two seconds.

    Args:
      text: what the block does.
      stream: where to print; by default stdout. Where a command's results are on stdout, stderr,
        which gets the line where it is a terminal.
    """

    def tell() -> None:
        tqdm.tqdm.write(f"{text} ...", file=out)
        out.flush()

    out = stream or sys.stdout
    seen = out is not sys.stderr or out.isatty()
    timer = threading.Timer(_SECONDS, tell if seen else lambda: None)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
