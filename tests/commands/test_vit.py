"""A vision transformer from published weights through training, export and back."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.engine import network, trained_network
from rll_jax.networks import backbones, embedding_net, weights
from tests.helpers.commands import FEW, refused, run, scores
from tests.helpers.networks import random_variables

VIT = [*FEW, "--backbone=vit_test", "--image_size=32", "--steps=2", "--eval_every=2"]


@pytest.fixture(scope="module")
def workdir(pictures, tmp_path_factory):
    """A run on weights in Hugging Face's names whose first block is frozen."""
    folder = tmp_path_factory.mktemp("vit")
    config = backbones.BACKBONES["vit_test"]
    variables = random_variables(embedding_net.EmbeddingNet(config, 16), 32, 0.1)
    arrays = weights.to_named_arrays(variables, config)
    del arrays["H_embedding.weight"]
    weights.write_safetensors(folder / "dino.safetensors", config.to_huggingface(arrays))
    flags = [f"--workdir={folder / 'run'}", f"--pretrained={folder / 'dino.safetensors'}"]
    ended = run(*VIT, *flags, "--frozen_stages=1", "--remat=2")
    assert ended.returncode == 0, ended.stderr
    found = trained_network.load(str(folder / "run"))
    before, after = variables["params"], found.variables["params"]
    for name in before:
        same = jax.tree.map(np.array_equal, before[name], jax.device_get(after[name]))
        assert all(jax.tree.leaves(same)) == (name in ("tokens", "patch_embed", "blocks_0")), name
    return folder / "run"


def export(workdir, out, *flags):
    ended = run(f"--workdir={workdir}", f"--out={out}", *flags, name="export")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("names", ["published", "huggingface"])
def test_what_export_writes_starts_a_run(workdir, names, tmp_path):
    export(workdir, out := tmp_path / "model.safetensors", f"--names={names}")
    start = [f"--workdir={tmp_path / 'again'}", f"--pretrained={out}", "--pretrained_head"]
    assert run(*VIT, *start, "--steps=1", "--pixel_norm=imagenet").returncode == 0
    last, first = scores(workdir)[-1], scores(tmp_path / "again")[0]
    assert first["recall@1"] == last["recall@1"]


def test_pixels_of_another_run_must_be_the_same(workdir, tmp_path):
    start = [f"--workdir={tmp_path / 'again'}", f"--init_from={workdir}"]
    refused("standard deviation", *VIT, *start)
    refused("give --pixel_norm=imagenet", *VIT, *start)


def test_names_of_hugging_face_are_of_vision_transformers(pictures, tmp_path):
    assert run(*FEW, f"--workdir={tmp_path / 'run'}", "--steps=1").returncode == 0
    asked = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'a'}", "--names=huggingface"]
    refused("--names=huggingface is of vision transformers and ConvNeXts", *asked, name="export")


def test_stablehlo(workdir, tmp_path):
    export(workdir, out := tmp_path / "model.stablehlo", "--format=stablehlo")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    code = (
        "import sys, numpy as np; from jax import export; pixels = np.load(sys.argv[2]);"
        "call = export.deserialize(bytearray(open(sys.argv[1], 'rb').read())).call;"
        "np.save(sys.argv[2], call(pixels))"
    )
    subprocess.run([sys.executable, "-c", code, out, tmp_path / "pixels.npy"], check=True)
    trained = trained_network.load(str(workdir))
    model = network.make_model(trained.config.network).clone(axis_name=None)
    levels = jax.jit(model.apply)(trained.variables, pixels)
    expected = embedding_net.concatenate_levels(levels)
    np.testing.assert_allclose(np.load(tmp_path / "pixels.npy"), expected, atol=1e-5)


def test_adapters_are_merged_into_what_export_writes(workdir, tmp_path):
    head = ["--pooling=gem", "--head_norm", "--pixel_norm=imagenet"]
    trains = [
        "--lora_rank=2",
        "--head_warmup_steps=1",
        "--layer_decay=0.9",
        "--steps=3",
        "--drop_path=0.5",
    ]
    start = [f"--workdir={tmp_path / 'lora'}", f"--pretrained={workdir}"]
    ended = run(*VIT, *head, *trains, *start, "--learning_rate=0.1", "--augment=wide_crop")
    assert ended.returncode == 0, ended.stderr
    trained = trained_network.load(str(tmp_path / "lora")).variables["params"]
    assert np.asarray(trained["blocks_0"]["attn_lora"]["b"]).any()
    before = trained_network.load(str(workdir)).variables["params"]
    np.testing.assert_array_equal(
        trained["blocks_0"]["attn_qkv"]["kernel"], before["blocks_0"]["attn_qkv"]["kernel"]
    )
    np.testing.assert_array_equal(trained["norm"]["bias"], before["norm"]["bias"])
    export(tmp_path / "lora", out := tmp_path / "model.safetensors")
    again = [f"--workdir={tmp_path / 'again'}", f"--pretrained={out}", "--pretrained_head"]
    ended = run(*VIT, *head, *again, "--steps=1", "--augment=wide_crop")
    assert ended.returncode == 0, ended.stderr
    last, first = scores(tmp_path / "lora")[-1], scores(tmp_path / "again")[0]
    assert first["recall@1"] == pytest.approx(last["recall@1"], abs=0.02)
