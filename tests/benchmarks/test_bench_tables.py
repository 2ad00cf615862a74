"""The tables of the loss's and the evaluation's benchmarks hold finite positive numbers."""

import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.paths import ROOT


def table_of(name, path, *flags):
    command = [sys.executable, "-m", f"experiments.benchmarks.{name}", f"--table={path}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(path.read_text())
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in path.read_text().splitlines()
        if line.startswith("|")
    ]
    return head, rows


@pytest.mark.slow
def test_the_table_of_the_loss(tmp_path):
    flags = ("--sizes=12", "--dim=8", "--nolarge", "--rounds=1", "--seconds=0.05")
    plot = tmp_path / "plot.png"
    head, rows = table_of("loss", tmp_path / "table.md", *flags, f"--out={plot}")
    assert head[:5] == ["N", "D", "what", "best ms", "median ms"] and plot.stat().st_size > 1000
    names = ["two products", "rll_jax", "rll_jax, clustered batch", "plain JAX"]
    assert [row[2] for row in rows[:4]] == names
    for row in rows:
        assert row[:2] == ["12", "8"] and 0 < float(row[3]) <= float(row[4]) < np.inf


@pytest.mark.slow
def test_the_table_of_the_evaluation(tmp_path):
    flags = ("--n=300", "--classes=60", "--dim=8", "--levels")
    head, rows = table_of("evaluation", tmp_path / "table.md", *flags)
    assert head[:2] == ["what", "seconds"]
    assert [row[0] for row in rows[:2]] == ["blocks of the full product", "rll_jax.metrics"]
    assert "all seven combinations" in rows[-1][0]
    for row in rows:
        assert row[1] == "seconds" or "-" in row[1] or 0 <= float(row[1]) < np.inf
