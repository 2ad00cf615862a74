"""The networks' benchmark: its tables, and that PyTorch's side does the same work."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rll_jax import loss
from rll_jax.networks import backbones, embedding_net, weights
from tests.helpers.paths import ROOT


@pytest.mark.slow
def test_both_tables_hold_finite_positive_numbers(tmp_path):
    flags = (
        "--models=resnet_tiny",
        "--sizes=8",
        "--batch=8",
        "--dim=8",
        "--seconds=0",
        "--rounds=2",
        f"--table={tmp_path / 'table.md'}",
    )
    command = [sys.executable, "-m", "experiments.benchmarks.model", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.md").read_text() == done.stdout
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()
        if "resnet_tiny" in line
    ]
    forward, training, step = rows
    assert forward[:3] == ["resnet_tiny", "8", "forward"] and training[:3] == [
        "resnet_tiny",
        "8",
        "train step",
    ]
    assert step[:2] == ["resnet_tiny", "8"] and len(step) == 12
    for row in (forward, training):
        least, _, most = row.pop().partition(", ")  # of the ratio, where PyTorch is installed
        assert not row[5] or float(least) <= float(row[5]) <= float(most)
    for cell in forward[3:] + training[3:] + step[2:]:
        assert cell in ("", "not installed") or 0 < float(cell) < np.inf
    assert float(step[2]) > float(step[3])  # the cache is used


@pytest.mark.parametrize(
    "name",
    [
        "resnet_small",
        "resnet18",
        "resnet50",
        "resnet50_v1",
        "googlenet_v2",
        "efficientnet_lite0",
        "convnext_test",
        "vit_test",
    ],
)
def test_pytorchs_side_is_the_same_network(name):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from experiments.benchmarks import model_torch

    config = backbones.BACKBONES[name]
    narrow = {"googlenet_v2": 0.125, "efficientnet_lite0": 0.5, "vit_test": 24}.get(name, 8)
    if name != "convnext_test":
        config = dataclasses.replace(config, width=narrow)
    if name in ("convnext_test", "vit_test"):
        pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    theirs = model_torch.embedding_network(config, 16)
    arrays = {
        key.removeprefix("convnext."): value.numpy() for key, value in theirs.state_dict().items()
    }
    head = {"H_embedding.weight": arrays.pop("embedding.weight")}
    published = config.from_published(arrays) | head
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    channels = pixels[..., ::-1] if config.bgr else pixels
    x = (channels.astype(np.float32) - np.float32(config.mean)) / np.float32(config.std)
    x = torch.from_numpy(x.transpose(0, 3, 1, 2))
    # float64: the last maps have one pixel, and fifty batch norms over twelve values make
    # float32's rounding, which every machine does in its own way, 1e-4
    model = embedding_net.EmbeddingNet(config, 16, dtype=jnp.float64)
    with jax.enable_x64(True):
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        empty = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), dict(shapes))
        variables = weights.from_named_arrays(published, empty, config, heads=True)
        ours, _ = jax.jit(lambda v, p: model.apply(v, p, train=True, mutable=["batch_stats"]))(
            variables, pixels
        )
    np.testing.assert_allclose(ours["H"], theirs.double()(x.double()).detach(), atol=1e-4)


def test_pytorchs_side_is_the_same_loss():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from experiments.benchmarks import model_torch

    x, labels = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32), np.arange(24) // 4
    rows = torch.from_numpy(x).requires_grad_()
    value = model_torch.ranked_list_loss(
        torch.nn.functional.normalize(rows), torch.from_numpy(labels)
    )
    value.backward()
    expected, gradient = jax.value_and_grad(loss.ranked_list_loss)(x, labels)
    assert value.item() == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(rows.grad, gradient, atol=1e-5)
