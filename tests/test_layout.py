"""What may import what: a pure core, one direction, experiments on top."""
import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Each module of the package and those of the package it may import.
MAY_IMPORT = {
    "__init__": set(),
    "_pairs": set(),
    "_inputs": {"_pairs"},
    "_blocks": {"_pairs"},
    "loss": {"_blocks", "_inputs"},
    "losses_baseline": {"_inputs", "_pairs"},
    "memory": {"_inputs"},
    "_ranks": set(),
    "metrics": {"_ranks"},
    "sampler": set(),
    "images": set(),
    "views": {"images"},
    "published": set(),
    "archives": {"published"},
    "folders": {"published"},
    "datasets": {"images", "published"},
    "prepared": {"datasets", "published"},
    "cache": {"datasets", "images"},
    "pipeline": {"datasets", "images"},
    "backbones": set(),
    "models": {"_inputs"},
    "weights": set(),
    "train": {"memory"},
    "parallel": set(),
    "checkpoint": set(),
    "frozen": {"models"},
    "evaluate": {"models", "parallel", "pipeline"},
}
CORE = ("loss", "losses_baseline", "memory", "metrics", "sampler")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_is_listed():
    assert {p.stem for p in (ROOT / "rll_jax").glob("*.py")} == MAY_IMPORT.keys()


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_go_one_way(module):
    names = set(imported(ROOT / "rll_jax" / f"{module}.py"))
    ours = {name.split(".")[1] for name in names if name.startswith("rll_jax.")}
    assert ours & MAY_IMPORT.keys() <= MAY_IMPORT[module]
    assert not any(name.split(".")[0] in ("experiments", "absl", "tests") for name in names)


@pytest.mark.parametrize("module", CORE)
def test_the_core_needs_jax_and_numpy_alone(module):
    code = f"import sys, rll_jax.{module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    heavy = {"flax", "optax", "orbax", "absl", "grain", "tensorflow", "tensorflow_datasets", "PIL", "tensorboardX"}
    assert "jax" in loaded.split() or module == "sampler"
    assert not heavy & set(loaded.split())


def test_files_fit_in_a_head():
    long = {str(p): n for p in ROOT.glob("*/*.py") if (n := len(p.read_text().splitlines())) > 320}
    assert not long
