"""A user's mistake ends a benchmark in one line on stderr and exit code 2, before it measures."""

import subprocess
import sys

import pytest

from tests.helpers.commands import refused
from tests.helpers.paths import ROOT

OF_EACH = {  # a value out of range, and a value that the command itself checks
    "loss": [
        ("--rounds=0", "flag --rounds=0: 0 is not a positive integer"),
        ("--sizes=64,no", "--sizes=64,no: found 'no', expected integers from 1"),
    ],
    "evaluation": [
        ("--n=1", "flag --n=1: 1 is not integer >= 2"),
        ("--kinds=ours,theirs", "--kinds=ours,theirs: found 'theirs', expected some of products"),
    ],
    "model": [
        ("--models=resnet", "--models=resnet: found 'resnet', expected some of resnet_tiny"),
        ("--sizes=30", "--sizes=30: found '30', expected multiples of 4"),
    ],
    "data": [
        ("--kb=4", "flag --kb=4: 4 is not integer >= 5"),
        ("--images=7", "flag --images=7: 7 is not integer >= 8"),
    ],
}


@pytest.mark.parametrize("name", OF_EACH)
def test_a_mistake_gets_one_line_and_exit_code_2(name, tmp_path):
    command = f"benchmarks.{name}"
    refused("Unknown command line flag 'bogus'", "--bogus=1", name=command)
    refused("unexpected argument 'now'", "now", name=command)
    for flag, text in OF_EACH[name]:
        refused(text, flag, name=command)
    table = tmp_path / "table.md"
    table.write_text("of another run")
    refused(f"--table={table} exists", f"--table={table}", name=command)
    assert table.read_text() == "of another run"


@pytest.mark.parametrize("name", OF_EACH)
def test_a_process_that_measures_imports_only_what_it_measures(name):
    """Its memory and its first seconds count: the module must not load JAX or PyTorch by itself."""
    code = f"import sys, experiments.benchmarks.{name}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {module.split(".")[0] for module in done.stdout.split()}
    assert not loaded & {"jax", "torch", "flax", "cv2", "grain", "faiss"}
