"""What the README of the data room says is what happens."""

import re
import subprocess
import sys

import pytest

import rll_jax.data
from tests.helpers.paths import ROOT

FOLDER = ROOT / "rll_jax/data"
TEXT = (FOLDER / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_there_is_a_snippet():
    assert SNIPPETS


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_print_what_they_say(snippet):
    result = subprocess.run(
        [sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == re.findall(r"print\(.*\)  # (.*)", snippet)


def test_the_files_of_its_table_are_there():
    named = set(re.findall(r"`(\w+\.py)`", TEXT))
    assert len(named) > 10 and named <= {path.name for path in FOLDER.glob("*.py")}


def test_functions_it_names_are_there():
    named = set(re.findall(r"`(\w+)\.(\w+)(?:\(.*?\))?`", TEXT)) - {
        (file.stem, "py") for file in FOLDER.glob("*.py")
    }
    assert ("pipeline", "train_batches") in named
    for module, name in named:
        assert hasattr(getattr(rll_jax.data, module), name), f"{module}.{name}"
