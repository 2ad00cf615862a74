"""Runs the Python snippets of a document and compares what they print with what they say."""

import contextlib
import io
import re
import subprocess
import sys

from tests.helpers.paths import ROOT


def blocks_of(text: str) -> list[str]:
    """The Python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def check_snippets(text: str) -> None:
    """Runs each block on its own and compares its output with its `print(...)  # output` lines."""
    blocks = blocks_of(text)
    assert blocks
    for block in blocks:
        check_block(block)


def check_block(block: str) -> None:
    """Runs one block and compares its output with its `print(...)  # output` lines."""
    # JAX is configured before its backend starts, which it has done in this process.
    own = "jax.config" in block or "os.environ" in block
    output = _in_own_process(block) if own else _in_this_process(block)
    assert output.splitlines() == re.findall(r"print\(.*\)  # (.*)", block)


def _in_this_process(block: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "snippet", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def _in_own_process(block: str) -> str:
    command = [sys.executable, "-c", block]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout
