"""The network of a run: backbones by flags, and weights from the hub."""

import dataclasses
import sys
import types

import numpy as np
import pytest

from experiments.engine import config, network, pretrained
from rll_jax.data import views
from rll_jax.networks import backbones, weights
from tests.helpers.networks import variables_of
from tests.helpers.recipes import recipe


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


TINY = dict(backbone="resnet18", stage_sizes="1,1", width=4, embedding_dim=8, image_size=32)


@pytest.fixture(scope="module")
def published():
    model = network.make_model(config.from_flat(**TINY).network)
    arrays = weights.to_named_arrays(variables_of(model, 32), model.backbone)
    return {name: array for name, array in arrays.items() if not name.startswith("H_")}


@pytest.mark.parametrize("ending", ["", ".pth.tar", ".ckpt", ".bin", ".weights"])
def test_a_file_that_is_there_is_read_whatever_its_ending(ending, published, tmp_path, capsys):
    path = tmp_path / f"w{ending}"
    arrays = {f"module.backbone.{name}": array for name, array in published.items()}
    arrays |= {"module.head.mlp.weight": np.ones((2, 2)), "queue": np.ones(3)}
    weights.write_safetensors(path, arrays)
    options = config.from_flat(**TINY, pretrained=str(path))
    assert pretrained.read_starting_weights(options).keys() == published.keys()
    said = capsys.readouterr().out
    assert said == (
        f'--pretrained={path}: took off "module.backbone."; left out 2 arrays whose names begin '
        "otherwise\n"
    )
    weights.write_safetensors(path, published)
    assert pretrained.read_starting_weights(options).keys() == published.keys()
    assert not capsys.readouterr().out


def test_a_prefix_that_is_named(published, tmp_path, capsys):
    path = tmp_path / "w.bin"
    arrays = {
        f"{who}.backbone.{name}": array + shift
        for who, shift in (("student", 0), ("teacher", 1))
        for name, array in published.items()
    }
    weights.write_safetensors(path, arrays)
    for prefix, value in (("", 1), ("student", None), ("student.backbone.", 0), ("backbone.", 1)):
        options = config.from_flat(**TINY, pretrained=str(path), pretrained_prefix=prefix)
        if value is None:
            with pytest.raises(ValueError, match=r"unexpected \(backbone.bn1.bias, .*--pretr"):
                pretrained.read_starting_weights(options)
            continue
        read = pretrained.read_starting_weights(options)
        assert (read["bn1.weight"] == value).all()
        assert f'took off "{("student", "teacher")[value]}.backbone."' in capsys.readouterr().out
    options = config.from_flat(**TINY, pretrained=str(path), pretrained_prefix="net.")
    with pytest.raises(ValueError, match="no name begins with 'net.'; names begin with student"):
        pretrained.read_starting_weights(options)


def test_weights_of_another_network_say_a_few_names_and_what_to_do(published, tmp_path):
    path = tmp_path / "w.ckpt"
    weights.write_safetensors(path, {f"blocks.{i}.weight": np.ones(3) for i in range(40)})
    options = config.from_flat(**TINY, pretrained=str(path))
    with pytest.raises(ValueError) as raised:
        pretrained.read_starting_weights(options)
    text = str(raised.value)
    assert " missing (" in text and "40 unexpected (blocks.0.weight, " in text
    assert "choose --backbone" in text and "--pretrained_prefix" in text and len(text) < 600
    with pytest.raises(ValueError, match="none.ckpt: no such file"):
        pretrained.read_starting_weights(options.replace(pretrained=str(tmp_path / "none.ckpt")))
    with pytest.raises(ValueError, match="the folder holds no run and no weights"):
        pretrained.read_starting_weights(options.replace(pretrained=str(tmp_path)))
    weights.write_safetensors(tmp_path / "model.safetensors", published)  # a folder of the hub's
    read = pretrained.read_starting_weights(options.replace(pretrained=str(tmp_path)))
    assert read.keys() == published.keys()


def test_heads_of_maps_that_were_rounded_down_say_so(tmp_path):
    tiny = dict(backbone="resnet_smaller", levels="L,M,H", embedding_dim=8, image_size=32)
    old = network.make_model(config.from_flat(**tiny, pool_rounding="down").network)
    path = tmp_path / "exported"
    weights.write_safetensors(path, weights.to_named_arrays(variables_of(old, 32), old.backbone))
    options = config.from_flat(**tiny, pretrained=str(path), pretrained_head=True)
    with pytest.raises(
        ValueError, match=r"1 of another shape \(L_dense.weight .*pool_rounding, which was down"
    ):
        pretrained.read_starting_weights(options)
    assert pretrained.read_starting_weights(options.replace(pool_rounding="down"))
    assert pretrained.read_starting_weights(options.replace(pretrained_head=False))


def test_the_recipes_networks_are_the_authors():
    for name in ("sop_2019", "cub_2019", "cars_2020", "inshop_2020"):
        one = recipe(name)
        model = network.make_model(one.network)
        assert model.backbone.mean == (104, 117, 123) and model.backbone.bgr
        assert (model.pool_rounding, model.batch_norm_momentum) == ("up", 0.999)
        view = one.data.train_view()
        expected = views.ScaledCrop if name.endswith("2020") else views.BorderCrop
        assert type(view) is expected and view.interpolation == "bicubic"
        assert one.data.test_view().keywords["interpolation"] == "bicubic"
    converted = config.from_flat(backbone="googlenet_v2").network.backbone_config
    assert converted.mean == (104, 117, 128)  # of PyTorch's conversion of the weights


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            dict(backbone="resnet50", pixel_mean="1,2,3", pool_rounding="down"),
            dataclasses.replace(
                backbones.BACKBONES["resnet50"], mean=(1.0, 2.0, 3.0), pool_rounding="down"
            ),
        ),
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
        (dict(backbone="vit_large_16_dinov3", pretrained="a/dinov3.sat493m"), "satellite", False),
        (dict(backbone="vit_base_16_clip", pretrained="a/clip-vit-base"), "clip", False),
        (dict(backbone="vit_base_16_siglip", pretrained="a/clip-siglip"), "half", False),
        (dict(backbone="resnet50", pretrained="a/dino_resnet50", pixel_norm="half"), "half", None),
        (dict(backbone="convnext_base", pretrained="a/convnext_base.clip_laion2b"), "clip", None),
        (dict(backbone="convnext_base", pretrained="a/convnext_laion2b_augreg"), "clip", None),
        (dict(backbone="convnext_tiny", pretrained="a/convnext_tiny_in21k"), "imagenet", None),
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
        (
            dict(backbone="vit_small_16_dinov3", position_size=32),
            "--backbone=vit_small_16_dinov3 has no position embeddings: leave it out",
        ),
        (dict(tiny, frozen_stages=4), "expected at most the 3 stages of --backbone=vit_test$"),
        (dict(tiny, width=8), "are of ResNets"),
        (dict(frozen_stages=1), "and --batch_norm=frozen"),
    ):
        with pytest.raises(ValueError, match=text):
            config.from_flat(**wrong)
