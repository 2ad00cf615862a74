"""What the README says is what happens."""

import re

from tests.helpers.paths import ROOT
from tests.helpers.snippets import check_snippets

TEXT = (ROOT / "README.md").read_text()


def test_snippets_print_what_they_say():
    check_snippets(TEXT)


def test_files_it_names_are_there():
    named = re.findall(r"`((?:rll_jax|experiments)/[\w/.]+)`", TEXT)
    assert named and all((ROOT / name).exists() for name in named)
    flagfiles = re.findall(r"`(\w+\.flags)`", TEXT)
    assert flagfiles and all((ROOT / "experiments/flagfiles" / name).exists() for name in flagfiles)
