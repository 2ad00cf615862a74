"""The record of a measurement: a page, numbers and a plot; how, when and where it was made."""

from collections.abc import Callable
import json
import pathlib
import shlex
import sys
import time
from typing import Any

from experiments.engine import environment, measuring
from rll_jax.data import files


def circumstances(module: str) -> dict[str, str]:
    """Returns the command, date, hardware and commit of what this process measures.

    Args:
      module: the module that was run.
    """
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": time.strftime("%F"),
        "hardware": measuring.machine().rpartition(",")[0],
        "commit": environment.commit() or "unknown",
    }


def write(
    folder: pathlib.Path,
    name: str,
    text: str,
    numbers: Any,
    plot: Callable[[pathlib.Path], None],
) -> None:
    """Writes NAME.md, NAME.json and NAME.png, each whole or not at all.

    Args:
      folder: an existing folder.
      name: the name of the files, without ending.
      text: the page.
      numbers: what JSON can hold.
      plot: draws the plot into a PNG file.
    """
    for ending, content in (("md", text), ("json", json.dumps(numbers, indent=1) + "\n")):
        with files.atomic_write(folder / f"{name}.{ending}") as temporary:
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    with files.atomic_write(folder / f"{name}.png") as temporary:
        plot(temporary)
