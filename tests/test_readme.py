"""What the README says is what happens."""

import re
import subprocess
import sys

from tests.helpers.paths import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_snippets_print_what_they_say():
    snippets = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert snippets
    for snippet in snippets:
        result = subprocess.run(
            [sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == re.findall(r"print\(.*\)  # (.*)", snippet)


def test_files_it_names_are_there():
    named = re.findall(r"`((?:rll_jax|experiments)/[\w/.]+)`", TEXT)
    assert named and all((ROOT / name).exists() for name in named)
    flagfiles = re.findall(r"`(\w+\.flags)`", TEXT)
    assert flagfiles and all((ROOT / "experiments/flagfiles" / name).exists() for name in flagfiles)
