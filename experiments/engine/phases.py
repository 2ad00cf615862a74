"""What a command says while it takes its time: a line for a phase of more than two seconds."""

from collections.abc import Iterator
import contextlib
import sys
import threading
from typing import TextIO

import jax
import tqdm

from experiments.engine import processes

_SECONDS = 2.0


@contextlib.contextmanager
def told(text: str, stream: TextIO | None = None) -> Iterator[None]:
    """Prints `text` once the block has taken more than two seconds.

    Of several processes the first alone prints.

    Args:
      text: what the block does.
      stream: where to print; by default stdout. Where a command's results are on stdout, stderr,
        which gets the line where it is a terminal.
    """

    def tell() -> None:
        # Alone, `jax.process_index` would start a backend that the command may not need.
        if jax.distributed.is_initialized() and not processes.is_first():
            return
        tqdm.tqdm.write(f"{text} ...", file=out)
        out.flush()

    # Made by two threads at once, tqdm's lock may never be free again.
    tqdm.tqdm.get_lock()
    out = stream or sys.stdout
    seen = out is not sys.stderr or out.isatty()
    timer = threading.Timer(_SECONDS, tell if seen else lambda: None)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
