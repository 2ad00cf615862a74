"""CONTRIBUTING.md: one of each kind, added by its recipe to a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from tests.helpers.commands import TINY
from tests.helpers.paths import ROOT

TABLES = {
    "LOSSES": "experiments/engine/losses.py",
    "BACKBONES": "rll_jax/networks/backbones.py",
    "DATASETS": "experiments/engine/datasets.py",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with what CONTRIBUTING.md adds."""
    root = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__", "emoji", "results")
    for package in ("rll_jax", "experiments"):
        shutil.copytree(ROOT / package, root / package, ignore=ignored)
    text = (ROOT / ".github/CONTRIBUTING.md").read_text()
    for path, code in re.findall(r"```python\n# (\S+)\n(.*?)```", text, re.DOTALL):
        (root / path).write_text(code)
    for table, path in TABLES.items():
        lines = text.partition(f"in the table `{table}`")[2].partition("```python\n")[2]
        imported, _, entry = lines.partition("```")[0].partition("\n\n")
        source = (root / path).read_text()
        head, opening, rest = re.split(rf"^({table}\b.*{{\n)", source, maxsplit=1, flags=re.M)
        (root / path).write_text(f"{head}{imported}\n{opening}{entry}{rest}")
    row = re.search(r"```markdown\n(.*?)```", text, re.DOTALL)[1]
    readme = root / "experiments/README.md"
    readme.write_text(readme.read_text().replace("| `compare` |", f"{row}| `compare` |"))
    images = root / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for row in range(32):
        pixels = rng.integers(0, 255, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"class{row // 2:02}_{row % 2}.png")
    return root


def run(project, module, *arguments):
    environment = os.environ | {"PYTHONPATH": str(project), "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


def test_a_loss_a_backbone_a_dataset_and_a_command_are_added(project):
    tiny = [flag for flag in TINY if not flag.startswith(("--backbone", "--memory", "--steps"))]
    added = ["--loss=cosine", "--loss_options=margin=0.3", "--backbone=plain", "--levels=M,H"]
    added += ["--dataset=flat_folder", f"--data_dir={project / 'images'}", "--workdir=run"]
    ended = run(project, "experiments.folder", *tiny, *added, "--steps=2")
    assert ended.returncode == 0, ended.stderr
    assert "train: 16 images of 8 classes" in ended.stdout
    lines = [json.loads(line) for line in (project / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2 and 0 <= lines[-1]["recall@1"] <= 1
    counted = run(project, "experiments.count", "--workdir=run")
    assert counted.returncode == 0, counted.stderr
    assert int(counted.stdout) > 3 * 3 * 3 * 8
    assert (
        run(project, "experiments.export", "--workdir=run", "--out=w.safetensors").returncode == 0
    )
    again = [*added[:-1], "--workdir=again", "--pretrained=w.safetensors", "--steps=1"]
    ended = run(project, "experiments.folder", *tiny, *again)
    assert ended.returncode == 0, ended.stderr
    wrong = run(project, "experiments.folder", *tiny, *added, "--loss_options=margn=1")
    assert wrong.returncode == 2 and "expected NAME=VALUE,... of margin" in wrong.stderr


def test_what_is_added_keeps_the_rules(project):
    ruff = shutil.which("ruff")
    if not ruff:
        pytest.skip("ruff is not installed")
    files = ["rll_jax/loss/cosine.py", "rll_jax/networks/plain.py", "rll_jax/data/flat_folder.py"]
    config = ["--config", str(ROOT / "pyproject.toml")]
    for arguments in (["check"], ["format", "--check"]):
        command = [ruff, *arguments, *config, *files, "experiments/count.py"]
        checked = subprocess.run(command, cwd=project, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
