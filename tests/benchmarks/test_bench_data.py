"""The data pipeline's benchmark: its table, and that PyTorch's side does the same work."""

import io
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from rll_jax.data import images, views
from tests.helpers.paths import ROOT


@pytest.mark.slow
def test_the_table_holds_finite_positive_numbers(tmp_path):
    flags = (
        "--images=8",
        "--rounds=1",
        "--kb=26",
        "--seconds=0.02",
        f"--table={tmp_path / 'table.md'}",
    )
    command = [sys.executable, "-m", "experiments.benchmarks.data", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.md").read_text() == done.stdout
    about, table = done.stdout.split("\n\n")
    assert (
        "8 images of 640 x 640: 2" in about and "noise of 0.0" in about and "load before" in about
    )
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    assert head == ["what", "26 kB", "PyTorch", "ratio"] and len(rows) == 8
    for _, ours, theirs, ratio in rows:
        assert 0 < float(ours.replace(",", "")) < np.inf
        if theirs not in ("", "not installed"):
            assert 0 < float(theirs.replace(",", "")) < np.inf and 0 < float(ratio) < np.inf
    assert "**train batches, whole**" in (row[0] for row in rows)


def test_pytorchs_views_are_ours():
    pytest.importorskip("torch", reason="torch is not installed")
    from experiments.benchmarks import data_torch

    x, y = np.mgrid[:320, :320]
    Image.fromarray(np.stack([x * 0.7, y * 0.7, (x + y) * 0.35], -1).astype(np.uint8)).save(
        out := io.BytesIO(), "JPEG", quality=95
    )
    theirs = data_torch.test_view(out, 56, 64).numpy()
    ours = views.resize_center_crop(images.EncodedImage(out.getvalue(), "x"), 56, 64)
    assert theirs.dtype == ours.dtype and np.abs(theirs.astype(int) - ours).max() <= 4
    seen = [data_torch.train_view(io.BytesIO(out.getvalue()), 56).numpy() for _ in range(20)]
    assert {(view.shape, view.dtype) for view in seen} == {((56, 56, 3), np.dtype(np.uint8))}
    spans = [
        np.ptp(view[..., 0].astype(int)) / np.ptp(ours[..., 0].astype(int)) * 56 / 64
        for view in seen
    ]
    assert min(spans) > 0.55 and max(spans) < 1.1  # sides of windows of half the area or more
