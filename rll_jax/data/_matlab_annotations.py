"""Reads the annotations of CARS196 from MATLAB files, in a process of its own.

scipy's reader crashes on some damaged files, and takes as much memory as they claim to need. Such a
file must end that process, not this one. This file is therefore also the script of that process.
"""

import io
import json
import pathlib
import subprocess
import sys

_TIMEOUT = 120  # seconds


def read(data: bytes, column: str) -> list[tuple[str, float]]:
    """Returns (path, class) of every annotation in a .mat file, neither of them checked.

    Args:
      data: the bytes of the file.
      column: the column that holds the paths.

    Raises:
      ValueError: the file has no such annotations, or its reader crashed or did not end in time.
    """
    # -P: the folder of this file is not searched for modules.
    command = [sys.executable, "-P", str(pathlib.Path(__file__)), column]
    try:
        child = subprocess.run(command, input=data, capture_output=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise ValueError("its reader did not end") from None
    if child.returncode:
        words = child.stderr.decode(errors="replace").split()[:30]
        raise ValueError(" ".join(words) or f"its reader ended with {child.returncode}")
    return [(path, label) for path, label in json.loads(child.stdout)]


def _print_annotations(data: bytes, column: str) -> None:
    """Prints the annotations as JSON; ends the process with the reason where it cannot."""
    import numpy as np
    from scipy import io as scipy_io

    try:
        columns = scipy_io.loadmat(
            io.BytesIO(data), squeeze_me=True, variable_names=["annotations"]
        )["annotations"]
        pairs = zip(np.atleast_1d(columns[column]), np.atleast_1d(columns["class"]), strict=True)
        annotations = [[str(path), float(label)] for path, label in pairs]
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}"[:200])
    print(json.dumps(annotations))


if __name__ == "__main__":
    _print_annotations(sys.stdin.buffer.read(), sys.argv[1])
