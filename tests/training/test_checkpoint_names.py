"""Checkpoints in folders of any name, and what is read back of the first one."""

import os
import re

import jax
import numpy as np
import optax
import pytest

from rll_jax.training import checkpoint, steps
from tests.helpers.networks import Linear


@pytest.fixture(scope="module")
def state():
    return steps.create_train_state(Linear(), optax.adam(0.1), 16, seed=0)


@pytest.mark.parametrize(
    "name", ["plain", "runs[v2]/a*b?", "{c}\\d", "~x~", "a\nb", "ü 100%", os.fsdecode(b"\xff")]
)
def test_saved_kept_removed_and_restored(name, state, tmp_path):
    folder = tmp_path / name
    with checkpoint.Checkpoints(folder, keep=2) as saved:
        for step in (1, 2, 3):
            saved.save(step, state.replace(step=step), {"step": step})
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    with checkpoint.Checkpoints(folder, read_only=True) as saved:
        assert saved.all_steps() == [2, 3] and saved.metadata(3) == {"step": 3}
        restored = saved.restore(3, state)
    assert int(restored.step) == 3
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    assert [path.name for path in tmp_path.iterdir()] == [name.partition("/")[0]]


def test_one_that_cannot_be_restored_is_an_error_at_once(state, tmp_path, monkeypatch):
    """orbax writes no manifest below a name that it takes for a pattern."""
    monkeypatch.setattr(checkpoint, "_PLAIN", re.compile(".*"))
    saved = checkpoint.Checkpoints(tmp_path / "a[b]")
    with pytest.raises(OSError, match=r"cannot be read back in .*/a\[b\]"):
        saved.save(1, state)
    saved.close()


def test_a_name_without_descriptors_is_a_link(state, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_DESCRIPTORS", tmp_path / "nowhere")
    with checkpoint.Checkpoints(tmp_path / "a[b]") as saved:
        saved.save(1, state)
        saved.wait()
        assert int(saved.restore(1, state).step) == 0
