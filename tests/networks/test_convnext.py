"""ConvNeXts give what Hugging Face's networks give, under every published name."""

import functools
import re

import jax
import numpy as np
import pytest

from rll_jax.networks import backbones, convnext, embedding_net, weights
from tests.helpers.networks import random_variables, variables_of

SIZES = dict(stage_sizes=(1, 2, 1, 1), widths=(8, 16, 24, 32))
CASES = {
    "first": convnext.ConvNeXtConfig(**SIZES),
    "second": convnext.ConvNeXtConfig(**SIZES, response_norm=True),
    "dinov3": convnext.ConvNeXtConfig(**SIZES),
}
FAMILIES = {
    "first": ("ConvNextConfig", "ConvNextModel"),
    "second": ("ConvNextV2Config", "ConvNextV2Model"),
    "dinov3": ("DINOv3ConvNextConfig", "DINOv3ConvNextModel"),
}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="torch is not installed")
    return pytest.importorskip("transformers", reason="transformers is not installed")


def their_network(name, transformers, whole=False):
    """Hugging Face's network with random weights, all of them large enough to be seen."""
    import torch

    of_config, of_model = FAMILIES[name]
    of_model = of_model.replace("Model", "ForImageClassification") if whole else of_model
    config = getattr(transformers, of_config)(
        depths=[*SIZES["stage_sizes"]], hidden_sizes=[*SIZES["widths"]], layer_norm_eps=1e-6
    )
    theirs = getattr(transformers, of_model)(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            normed = "norm" in key and key.endswith("weight")
            taken = parameter[0].numel() if parameter.ndim in (2, 4) else 1
            parameter.normal_(1.0 if normed else 0.0, min(0.3, taken**-0.5))
    return theirs


def arrays_of(theirs):
    return {name: x.detach().numpy() for name, x in theirs.state_dict().items()}


def model_and_variables(config, levels=("H",)):
    model = embedding_net.EmbeddingNet(config, 8, levels)
    return model, random_variables(model)


def assert_close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("sides, train", [((64, 64), False), ((99, 70), True)])
@pytest.mark.parametrize("name", CASES)
def test_stages_are_those_of_hugging_face(name, sides, train, transformers):
    import torch

    config, theirs = CASES[name], their_network(name, transformers).train(train)
    model = embedding_net.EmbeddingNet(config, 8)
    variables = weights.from_named_arrays(
        arrays_of(theirs), variables_of(model), config, heads=False
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, *sides, 3), np.uint8)
    x = (pixels.astype(np.float32) - np.float32(config.mean)) / np.float32(config.std)
    with torch.no_grad():
        out = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)), output_hidden_states=True)
    ours = jax.jit(functools.partial(model.apply, features=True, train=train))(variables, pixels)
    for end, reference in zip(ours[:3], out.hidden_states[1:4], strict=True):
        assert_close(end, reference.numpy().transpose(0, 2, 3, 1))
    assert_close(config.pooled(ours[3]), out.pooler_output.numpy())
    places = config.to_map(ours[3], sides)
    assert places.shape == (2, sides[0] // 32, sides[1] // 32, 32)
    if name == "dinov3":  # the others do not normalise the map
        assert_close(ours[3], out.last_hidden_state.numpy())


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_classifier_is_left_out_and_the_last_norm_is_not(name, transformers):
    theirs = arrays_of(their_network(name, transformers, whole=True))
    model = embedding_net.EmbeddingNet(CASES[name], 8)
    variables = weights.from_named_arrays(theirs, variables_of(model), CASES[name], heads=False)
    (norm,) = (x for key, x in theirs.items() if re.search(r"^\w+\.layernorm\.weight", key))
    np.testing.assert_array_equal(variables["params"]["norm"]["scale"], norm)


def test_exports_are_read_by_hugging_face(transformers):
    import torch

    for name in ("first", "second"):
        _, variables = model_and_variables(CASES[name])
        named = CASES[name].to_huggingface(weights.to_named_arrays(variables, CASES[name]))
        state = {k: torch.from_numpy(x.copy()) for k, x in named.items() if not k.startswith("H_")}
        their_network(name, transformers).load_state_dict(state)


def published(kind):
    """A publisher's names of the layers of a network of `SIZES`, in the same order for each."""
    layers = {
        "timm": ("conv_dw", "norm", "mlp.fc1", "mlp.fc2", "mlp.grn", "gamma"),
        "torchvision": ("block.0", "block.2", "block.3", "block.5", None, "layer_scale"),
        "authors": ("dwconv", "norm", "pwconv1", "pwconv2", "grn", "gamma"),
    }
    places = {
        "timm": ("stem.{}.", "stages.{}.downsample.{}.", "stages.{}.blocks.{}.", "head.norm."),
        "torchvision": ("features.0.{}.", "features.{}.{}.", "features.{}.{}.", "classifier.0."),
        "authors": (
            "downsample_layers.0.{}.",
            "downsample_layers.{}.{}.",
            "stages.{}.{}.",
            "norm.",
        ),
    }
    stem, downsample, block, last = places[kind]
    tv = kind == "torchvision"
    names = [last, stem.format(0), stem.format(1)]
    for stage, count in enumerate(SIZES["stage_sizes"]):
        if stage:
            names += [downsample.format(2 * stage if tv else stage, k) for k in (0, 1)]
        for number in range(count):
            inside = block.format(2 * stage + 1 if tv else stage, number)
            names += [f"{inside}{layer}." for layer in layers[kind][:5]]
            names.append(inside + layers[kind][5])
    return names


@pytest.mark.parametrize("before", ["", "module.backbone.", "system.encoder."])
@pytest.mark.parametrize("kind", ["timm", "torchvision", "authors"])
@pytest.mark.parametrize("name", ["first", "second"])
def test_every_publishers_names_are_read(name, kind, before):
    config = CASES[name]
    if kind == "torchvision" and config.response_norm:
        pytest.skip("torchvision has the first version alone")
    model, variables = model_and_variables(config)
    theirs = dict(zip(published("timm"), published(kind), strict=True))
    arrays = {}
    for ours, array in weights.to_named_arrays(variables, config).items():
        if not ours.startswith("H_"):
            whole = theirs.get(ours)  # gamma
            head, _, leaf = ours.rpartition(".")
            new = whole or theirs[f"{head}."] + leaf
            if kind == "authors" and "grn" in new:
                new = new.replace("weight", "gamma").replace("bias", "beta")
                array = array.reshape(1, 1, 1, -1)
            if new.endswith("layer_scale"):
                array = array.reshape(-1, 1, 1)
            arrays[before + new] = array
    assert len(arrays) == len(jax.tree.leaves(variables["params"])) - 1
    arrays |= {f"{before}head.fc.weight": np.ones((5, 32)), f"{before}head.bias": np.ones(5)}
    if kind == "authors":  # DINOv3's files have the last norm twice
        arrays[f"{before}norms.3.weight"] = arrays[f"{before}norm.weight"]
    read = weights.from_named_arrays(arrays, variables_of(model), config, heads=False)
    expected = {key: x for key, x in variables["params"].items() if not key.startswith("H_")}
    jax.tree.map(
        np.testing.assert_array_equal, {key: read["params"][key] for key in expected}, expected
    )


@pytest.mark.parametrize("before", ["", "teacher.backbone.", "_orig_mod."])
def test_dinov3s_names_of_transformers_5_are_read(before):
    """They have "model." before the stages and not before the last norm."""
    config = CASES["dinov3"]
    model, variables = model_and_variables(config)
    arrays = {}
    for name, array in config.to_huggingface(weights.to_named_arrays(variables, config)).items():
        for old, new in (
            (r"^embeddings\.patch_embeddings\.", "model.stages.0.downsample_layers.0."),
            (r"^embeddings\.layernorm\.", "model.stages.0.downsample_layers.1."),
            (r"^encoder\.stages\.", "model.stages."),
            (r"downsampling_layer", "downsample_layers"),
            (r"\.dwconv\.", ".depthwise_conv."),
            (r"\.pwconv", ".pointwise_conv"),
            (r"layernorm\.", "layer_norm."),
            (r"layer_scale_parameter", "gamma"),
        ):
            name = re.sub(old, new, name)
        if not name.startswith("H_"):
            arrays[before + name] = array
    assert f"{before}layer_norm.weight" in arrays
    read = weights.from_named_arrays(arrays, variables_of(model), config, heads=False)["params"]
    jax.tree.map(
        np.testing.assert_array_equal,
        *(
            {key: x for key, x in params.items() if not key.startswith("H_")}
            for params in (read, variables["params"])
        ),
    )


def test_a_map_of_other_sides_than_square_is_refused():
    with pytest.raises(ValueError, match="ends with 8 places: expected 4 of square images"):
        CASES["first"].to_map(np.zeros((2, 9, 32)))


def test_levels_frozen_stages_and_their_cached_ends():
    """Cached ends give what images give. The gradient reaches all but frozen stages."""
    config = CASES["second"]
    model, variables = model_and_variables(config, ("L", "M", "H"))
    model = model.clone(frozen_stages=2)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    ends = jax.jit(functools.partial(model.apply, features=True))(variables, pixels)
    assert [end.shape for end in ends] == [(2, 16, 16, 8), (2, 8, 8, 16), (2, 4, 4, 24), (2, 5, 32)]

    def loss(params):
        levels = model.apply({**variables, "params": params}, pixels)
        return sum(x[:, 0].sum() for x in levels.values())

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    for module, tree in gradient.items():
        moved = any(np.any(x) for x in jax.tree.leaves(tree))
        frozen = not module.startswith(("L_", "M_", "H_")) and config.stage_of(module) <= 2
        assert moved != frozen, module
    cached = model.clone(cached_stages=((2, (8, 8, 16)),))
    again = jax.jit(cached.apply)(variables, np.asarray(ends[1]).reshape(2, -1))
    for level, expected in jax.jit(model.apply)(variables, pixels).items():
        np.testing.assert_allclose(again[level], expected, atol=1e-5)


def test_a_channel_that_is_silent_has_a_finite_gradient():
    norm = convnext.ResponseNorm()
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)
    x[0, :, :, 1] = 0
    params = {"params": {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}}
    gradient = jax.grad(lambda x: (norm.apply(params, x) ** 2).sum())(x)
    assert np.isfinite(gradient).all() and np.any(gradient)
    assert np.isfinite(jax.grad(lambda x: norm.apply(params, x).sum())(np.zeros_like(x))).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: convnext.ConvNeXtConfig((3, 3, 9)), r"stage_sizes=\(3, 3, 9\).*four numbers"),
        (lambda: convnext.ConvNeXtConfig(widths=(8, 8, 8, 0)), "at least 1 each"),
        (lambda: convnext.ConvNeXtConfig(drop_path=1.0), "drop_path=1.0"),
        (
            lambda: variables_of(
                embedding_net.EmbeddingNet(backbones.BACKBONES["convnext_test"]), 31
            ),
            "images of 31 x 31 pixels: expected sides of 32",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
