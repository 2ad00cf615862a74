"""Runs the Python snippets of a document and compares what they print with what they say."""

import re
import subprocess
import sys

from tests.helpers.paths import ROOT


def snippets(text: str) -> list[str]:
    """Returns the ```python blocks of a Markdown text."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def check_snippets(text: str) -> None:
    """Runs each block on its own and compares its output with its `print(...)  # output` lines."""
    blocks = snippets(text)
    assert blocks
    for block in blocks:
        result = subprocess.run(
            [sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines() == re.findall(r"print\(.*\)  # (.*)", block)
