"""What the README of the data room says is what happens."""

import re

import rll_jax.data
from tests.helpers.paths import ROOT
from tests.helpers.snippets import check_snippets

FOLDER = ROOT / "rll_jax/data"
TEXT = (FOLDER / "README.md").read_text()


def test_snippets_print_what_they_say():
    check_snippets(TEXT)


def test_the_files_of_its_table_are_there():
    named = set(re.findall(r"`(\w+\.py)`", TEXT))
    assert len(named) > 10 and named <= {path.name for path in FOLDER.glob("*.py")}


def test_functions_it_names_are_there():
    named = set(re.findall(r"`(\w+)\.(\w+)(?:\(.*?\))?`", TEXT)) - {
        (file.stem, "py") for file in FOLDER.glob("*.py")
    }
    assert ("pipeline", "train_batches") in named
    files = {"csv", "mat", "txt"}  # endings of the names of files
    for module, name in ((module, name) for module, name in named if name not in files):
        assert hasattr(getattr(rll_jax.data, module), name), f"{module}.{name}"
