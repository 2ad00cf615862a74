"""What is checked before a run begins."""

import os

import pytest

from experiments.engine import checks, config, options
from experiments.engine.datasets import DataOptions
from experiments.engine.runtime import RuntimeOptions
from rll_jax.data import cache, image_dataset, listings
from tests.helpers.benchmark_trees import jpeg


def test_a_cache_that_does_not_fit_into_memory(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    data = image_dataset.from_rows(tmp_path, [listings.Row("a.jpg", 0, "train")])["train"]
    monkeypatch.setattr(cache, "estimated_bytes", lambda *_: 2**50)
    data_options = DataOptions(dataset="folder", cache="memory")
    with pytest.raises(ValueError, match="--cache=memory would take 1048576.0 GiB"):
        checks.cached_splits({"train": data}, data_options, RuntimeOptions())
    assert [p.name for p in tmp_path.iterdir()] == ["a.jpg"]


def test_a_run_from_before_the_rounding_of_pools_goes_on_with_its_own(tmp_path, capsys):
    now = config.from_flat(workdir=str(tmp_path))
    lines = now.as_flagfile().splitlines(keepends=True)
    old = "".join(line for line in lines if "--pool_rounding" not in line)
    (tmp_path / "flags.txt").write_text(old)
    begun = checks._check_workdir(tmp_path, now)
    assert begun.network.pool_rounding == "down"
    said = f"the run in {tmp_path} goes on as it began: --pool_rounding=down\n"
    assert capsys.readouterr().out == said
    assert checks._check_workdir(tmp_path, begun) == begun and not capsys.readouterr().out
    with pytest.raises(ValueError, match="holds another run .*go on with that run by --flagfile="):
        checks._check_workdir(tmp_path, now.replace(batch_norm_momentum=0.5))


def test_more_steps_are_not_blamed_for_another_difference(tmp_path):
    before = config.from_flat(workdir=str(tmp_path), schedule="step", steps=10)
    (tmp_path / "flags.txt").write_text(before.as_flagfile())
    with pytest.raises(ValueError, match=r"holds another run \(--weight_decay="):
        checks._check_workdir(tmp_path, before.replace(steps=20, weight_decay=0.5))
    falling = before.replace(schedule="cosine")
    (tmp_path / "flags.txt").write_text(falling.as_flagfile())
    with pytest.raises(ValueError, match="its learning rate falls by a cosine"):
        checks._check_workdir(tmp_path, falling.replace(steps=20))


def test_a_workdir_of_any_name_is_resumed(tmp_path):
    workdir = tmp_path / os.fsdecode(b"r\xff")
    workdir.mkdir()
    now = config.from_flat(workdir=str(workdir))
    options.write_flagfile(workdir / "flags.txt", now.as_flagfile())
    assert checks._check_workdir(workdir, now) == now
