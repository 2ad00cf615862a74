"""A ConvNeXt from published weights through training, export and back."""

import jax
import numpy as np

from experiments.engine import trained_network
from rll_jax.networks import backbones, embedding_net, weights
from tests.helpers.commands import FEW, run, scores
from tests.helpers.networks import random_variables

CONVNEXT = [*FEW, "--backbone=convnext_test", "--image_size=64", "--steps=2", "--eval_every=2"]


def test_a_run_and_its_export(pictures, tmp_path):
    config = backbones.BACKBONES["convnext_test"]
    variables = random_variables(embedding_net.EmbeddingNet(config, 16), scale=0.1)
    arrays = weights.to_named_arrays(variables, config)
    del arrays["H_embedding.weight"]
    weights.write_safetensors(tmp_path / "start.safetensors", config.to_huggingface(arrays))
    start = [f"--workdir={tmp_path / 'run'}", f"--pretrained={tmp_path / 'start.safetensors'}"]
    options = ["--frozen_stages=1", "--remat=4", "--drop_path=0.2", "--layer_decay=0.9"]
    ended = run(*CONVNEXT, *start, *options)
    assert ended.returncode == 0, ended.stderr
    before = variables["params"]
    after = jax.device_get(trained_network.load(str(tmp_path / "run")).variables["params"])
    for name in before:
        same = all(jax.tree.leaves(jax.tree.map(np.array_equal, before[name], after[name])))
        assert same == name.startswith(("stem_", "stages_0_")), name
    out = tmp_path / "model.safetensors"
    asked = [f"--workdir={tmp_path / 'run'}", f"--out={out}", "--names=huggingface"]
    assert run(*asked, name="export").returncode == 0
    start = [f"--workdir={tmp_path / 'again'}", f"--pretrained={out}", "--pretrained_head"]
    assert run(*CONVNEXT, *start, *options, "--steps=1").returncode == 0
    assert scores(tmp_path / "again")[0]["recall@1"] == scores(tmp_path / "run")[-1]["recall@1"]
