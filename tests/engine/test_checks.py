"""What is checked before a run begins."""

import pytest

from experiments.engine import checks
from experiments.engine.datasets import DataOptions
from experiments.engine.runtime import RuntimeOptions
from rll_jax.data import cache, image_dataset, listings
from tests.helpers.benchmark_trees import jpeg


def test_a_cache_that_does_not_fit_into_memory(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    data = image_dataset.from_rows(tmp_path, [listings.Row("a.jpg", 0, "train")])["train"]
    monkeypatch.setattr(cache, "estimated_bytes", lambda *_: 2**50)
    options = DataOptions(dataset="folder", cache="memory")
    with pytest.raises(ValueError, match="--cache=memory would take 1048576.0 GiB"):
        checks.cached_splits({"train": data}, options, RuntimeOptions())
    assert [p.name for p in tmp_path.iterdir()] == ["a.jpg"]
