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
