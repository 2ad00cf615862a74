"""The network of a run: backbones by flags, and weights from the hub."""

import sys
import types

import numpy as np
import pytest

from experiments.engine import config, network, pretrained
from rll_jax.networks import backbones, weights
from tests.helpers.networks import variables_of


def test_names_of_the_hub(tmp_path, monkeypatch):
    """Its client is installed or not, and the hub answers or not; the client is the test's own."""
    tiny = dict(backbone="resnet18", stage_sizes="1,1", width=4, embedding_dim=8, image_size=32)
    options = config.from_flat(**tiny, pretrained="timm/resnet50.tv_in1k")

    def refuse(text, options=options):
        return pytest.raises(ValueError, match=f"--pretrained={options.network.pretrained}: {text}")

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refuse("no such folder, and names of the hub need huggingface_hub"):
        pretrained.read_starting_weights(options)
    with refuse(
        "expected a file .* or a hub name such as timm/",
        mistyped := options.replace(pretrained="resnet50"),
    ):
        pretrained.read_starting_weights(mistyped)
    model = network.make_model(options.network)
    published = weights.to_named_arrays(variables_of(model, 32), model.backbone)
    weights.write_safetensors(
        tmp_path / "model.safetensors",
        {k: v for k, v in published.items() if not k.startswith("H_")} | {"fc.bias": np.ones(1000)},
    )
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(tmp_path / file)

    client = types.ModuleType("huggingface_hub")
    client.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    assert pretrained.read_starting_weights(options)["fc.bias"].shape == (1000,)
    assert asked == [("timm/resnet50.tv_in1k", "model.safetensors")]
    with refuse(r"the weights are not of this network: .* unexpected \(layer2.0"):
        pretrained.read_starting_weights(options.replace(stage_sizes="1"))
    for words in ("404 Client Error.\n\nRepository Not Found", ""):

        def fail(*_, words=words):
            raise OSError(words)

        client.hf_hub_download = fail
        with refuse(
            "no such folder, and model.safetensors of timm/.* cannot be had from the hub: "
            ".*(404 Client Error. Repository Not|OSError)"
        ):
            pretrained.read_starting_weights(options)


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(backbone="resnet_small"), backbones.BACKBONES["resnet_small"]),
        (
            dict(backbone="resnet50", stem="3x3"),
            backbones.ResNetConfig((3, 4, 6, 3), True, small_images=True),
        ),
        (
            dict(backbone="resnet50", stem="3x3_pooled"),
            backbones.ResNetConfig((3, 4, 6, 3), True, small_images=True, stem_pool=2),
        ),
        (dict(backbone="resnet_small", stem="7x7"), backbones.ResNetConfig((1, 1, 1), width=32)),
        (
            dict(backbone="resnet18", width=48, stage_sizes="1,2,1"),
            backbones.ResNetConfig((1, 2, 1), width=48),
        ),
    ],
)
def test_stem_width_and_stages_are_free(options, expected):
    assert network.make_model(config.from_flat(**options).network).backbone == expected


@pytest.mark.parametrize(
    "options, pixels, antialias",
    [
        (dict(), "half", False),
        (dict(pretrained="timm/vit_small_patch16_224.augreg_in21k"), "half", True),
        (dict(pretrained="timm/vit_small_patch16_224.dino"), "imagenet", True),
        (dict(pretrained="facebook/dino-vits16"), "imagenet", False),
        (dict(pretrained="dino/files/weights.safetensors"), "half", False),
        (dict(pretrained="files/dino_vits16.pth"), "imagenet", False),
        (dict(pretrained="files/dino_vits16.pth", pixel_norm="clip"), "clip", False),
        (dict(backbone="vit_small_14"), "imagenet", False),
        (dict(backbone="vit_small_14_reg4"), "imagenet", True),
        (dict(backbone="vit_base_16_clip", pretrained="a/clip-vit-base"), "clip", False),
        (dict(backbone="vit_base_16_siglip", pretrained="a/clip-siglip"), "half", False),
        (dict(backbone="resnet50", pretrained="a/dino_resnet50", pixel_norm="half"), "half", None),
    ],
)  # fmt: skip
def test_pixels_are_those_that_the_weights_expect(options, pixels, antialias):
    found = config.from_flat(**{"backbone": "vit_small_16", **options}).network.backbone_config
    assert (found.mean, found.std) == backbones.PIXELS[pixels]
    assert getattr(found, "antialias", None) == antialias


def test_vision_transformers_have_options_of_their_own():
    tiny = dict(backbone="vit_test", image_size=32)
    assert config.from_flat(**tiny, position_size=48).network.backbone_config.image_size == 48
    frozen = config.from_flat(**tiny, frozen_stages=2).network  # without --batch_norm=frozen
    assert [m for m in ("tokens", "blocks_1", "blocks_2", "H_dense") if frozen.is_frozen(m)] == [
        "tokens", "blocks_1"
    ]  # fmt: skip
    for wrong, text in (
        (dict(tiny, position_size=4), "--position_size=4: .*expected an image of one patch"),
        (dict(position_size=32), "--position_size=32 is of vision transformers"),
        (dict(tiny, frozen_stages=4), "expected at most the 3 stages of --backbone=vit_test$"),
        (dict(tiny, width=8), "are of ResNets"),
        (dict(frozen_stages=1), "and --batch_norm=frozen"),
    ):
        with pytest.raises(ValueError, match=text):
            config.from_flat(**wrong)
