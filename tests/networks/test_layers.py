"""The layers of the networks give what Flax's and XLA's give, by other programs on CPUs."""

import dataclasses
import functools
import re

from flax import linen as nn
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from rll_jax.networks import (
    backbones,
    convolution,
    efficientnet,
    embedding_net,
    googlenet,
    normalization,
    pooling,
    resnet,
)
from tests.helpers.networks import random_variables

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
PAIRS = st.tuples(st.integers(0, 2), st.integers(0, 2))


def maps(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def with_gradients(function, *inputs):
    """The value, and the gradients for a random gradient of the value."""

    @jax.jit
    def both(*inputs):
        value, pullback = jax.vjp(function, *inputs)
        return value, *pullback(maps(9, *value.shape).astype(value.dtype))

    return both(*inputs)


def assert_equal(ours, theirs, tolerance=2e-5):
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.shape == reference.shape and mine.dtype == reference.dtype
        scale = 1 + np.abs(reference).max(initial=0)
        np.testing.assert_allclose(mine / scale, reference / scale, atol=tolerance)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3), height=st.integers(1, 7), width=st.integers(1, 7),
    channels=st.integers(1, 4), features=st.integers(1, 4), kernel=st.sampled_from([1, 2, 3, 5]),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)), pads=st.tuples(PAIRS, PAIRS),
)  # fmt: skip
def test_a_convolution_is_that_of_xla(
    batch, height, width, channels, features, kernel, strides, pads
):
    assume(min(height + sum(pads[0]), width + sum(pads[1])) >= kernel)
    x, w = maps(0, batch, height, width, channels), maps(1, kernel, kernel, channels, features)

    def theirs(x, w):  # pads beyond the kernel's reach give NaN now and then in XLA's gradients
        padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        return lax.conv_general_dilated(padded, w, strides, "VALID", dimension_numbers=DIMENSIONS)

    ours = functools.partial(convolution.conv_general_dilated, window_strides=strides, padding=pads)
    assert_equal(with_gradients(ours, x, w), with_gradients(theirs, x, w))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 7), width=st.integers(1, 7), channels=st.integers(2, 4),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)), pads=st.tuples(PAIRS, PAIRS),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)  # fmt: skip
@example(2, 1, 3, (7, 7), (1, 1), ((3, 3), (3, 3)))
@example(9, 8, 2, (7, 3), (2, 3), ((3, 0), (0, 2)))
@example(6, 9, 2, (6, 7), (1, 1), ((0, 2), (3, 3)))
def test_a_depthwise_convolution_is_that_of_xla(height, width, channels, kernel, strides, pads):
    assume(height + sum(pads[0]) >= kernel[0] and width + sum(pads[1]) >= kernel[1])
    x, w = maps(0, 2, height, width, channels), maps(1, *kernel, 1, channels)

    def theirs(x, w):
        padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        return lax.conv_general_dilated(
            padded, w, strides, "VALID", dimension_numbers=DIMENSIONS, feature_group_count=channels
        )

    ours = functools.partial(
        convolution.conv_general_dilated,
        window_strides=strides,
        padding=pads,
        feature_group_count=channels,
    )
    assert_equal(with_gradients(ours, x, w), with_gradients(theirs, x, w))


@pytest.mark.parametrize(
    "size, stride, channels, error",
    [(1, 1, 48, 3e-3), (1, 2, 48, 3e-3), (3, 1, 16, 3e-3), (3, 2, 16, 3e-3), (3, 1, 128, 7e-3)],
)
def test_a_convolution_of_bfloat16_sums_in_float32(size, stride, channels, error):
    x, w = maps(0, 6, 9, 8, channels), maps(1, size, size, channels, 136)
    x, w = (array.astype(jnp.bfloat16) for array in (jax.nn.relu(x), w))
    pads = [(size // 2, size // 2)] * 2
    convolve = functools.partial(
        convolution.conv_general_dilated, window_strides=(stride, stride), padding=pads
    )
    ours = with_gradients(convolve, x, w)
    wide = [array.astype(jnp.float32) for array in (x, w)]
    program = jax.jit(convolve).lower(x, w).compile()
    assert (" convolution(" in program.as_text()) == (channels == 16)
    theirs = with_gradients(
        lambda x, w: lax.conv_general_dilated(
            x, w, (stride, stride), pads, dimension_numbers=DIMENSIONS
        ),
        *wide,
    )
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.dtype == jnp.bfloat16
        gap = mine.astype(jnp.float32) - reference
        assert np.sqrt(np.mean(gap**2) / np.mean(reference**2)) < error


@pytest.mark.parametrize("size, batch", [(1, "batch"), (1, "8"), (3, "batch"), (3, "8")])
def test_a_convolution_of_bfloat16_is_exported(size, batch):
    w = jnp.ones((size, size, 128, 128), jnp.bfloat16)
    (images,) = jax.export.symbolic_shape(batch)
    shape = jax.ShapeDtypeStruct((images, 8, 8, 128), w.dtype)
    convolve = functools.partial(
        convolution.conv_general_dilated, window_strides=(1, 1), padding="VALID"
    )
    exported = jax.export.export(jax.jit(lambda x: convolve(x, w)))(shape)
    found = exported.call(jnp.ones((8, 8, 8, 128), w.dtype))
    assert (found == 128 * size**2).all()


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_of_flax_takes_the_convolution(padding, dtype, groups):
    x = maps(0, 2, 5, 6, 4)
    layer = functools.partial(
        nn.Conv, 4, (3, 3), (2, 1), padding, feature_group_count=groups, dtype=dtype
    )
    ours = layer(conv_general_dilated=convolution.conv_general_dilated)
    variables = layer().init(jax.random.key(0), x)
    assert_equal([ours.apply(variables, x)], [layer().apply(variables, x)], 1e-2)


@pytest.mark.parametrize(
    "options",
    [{"feature_group_count": 2}, {"batch_group_count": 2}, {"rhs_dilation": (2, 2)},
     {"lhs_dilation": (1, 2)}],
)  # fmt: skip
def test_groups_and_dilations_are_refused(options):
    with pytest.raises(ValueError, match="one group or a group and a feature for each channel"):
        convolution.conv_general_dilated(
            maps(0, 1, 4, 4, 4), maps(1, 3, 3, 2, 4), (1, 1), "SAME", **options
        )


def test_other_dimensions_are_refused():
    with pytest.raises(ValueError, match="expected .*NHWC"):
        convolution.conv_general_dilated(
            maps(0, 1, 2, 4, 4), maps(1, 3, 3, 2, 2), (1, 1), "SAME",
            dimension_numbers=("NCHW", "HWIO", "NCHW"),
        )  # fmt: skip


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 8), width=st.integers(1, 8), kind=st.sampled_from(["max", "avg"]),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 4), st.integers(1, 4)), inside=st.booleans(), data=st.data(),
)  # fmt: skip
def test_a_pool_is_that_of_flax(height, width, kind, window, strides, inside, data):
    pads = tuple(
        data.draw(st.tuples(st.integers(0, side - 1), st.integers(0, side - 1))) for side in window
    )
    assume(height + sum(pads[0]) >= window[0] and width + sum(pads[1]) >= window[1])
    x = jnp.round(maps(0, 2, height, width, 3))  # with equal maxima
    more = {"count_include_pad": not inside} if kind == "avg" else {}
    ours = functools.partial(getattr(pooling, f"{kind}_pool"), **more)
    theirs = functools.partial(getattr(nn, f"{kind}_pool"), **more)
    assert_equal(
        with_gradients(lambda x: ours(x, window, strides, pads), x),
        with_gradients(lambda x: theirs(x, window, strides=strides, padding=pads), x),
    )


def averages_rounded_up(x, window, strides):
    padding = pooling.last_window_padding(x.shape[1:3], window, strides, "up")
    return pooling.avg_pool(x, window, strides, padding, count_include_pad=False)


@pytest.mark.parametrize(
    "sides, window, strides",
    [
        ((7, 7), (5, 5), (3, 3)), ((14, 14), (5, 5), (3, 3)), ((8, 9), (5, 5), (3, 3)),
        ((5, 4), (5, 4), (3, 3)), ((33, 32), (2, 2), (2, 2)), ((6, 7), (2, 3), (4, 5)),
        ((28, 13), (5, 5), (3, 3)), ((1, 2), (1, 2), (3, 3)), ((10, 11), (3, 4), (2, 3)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_average_pool_that_rounds_up_is_that_of_pytorch(sides, window, strides, dtype):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = maps(0, 2, *sides, 3).astype(dtype)
    value, gradient = with_gradients(lambda x: averages_rounded_up(x, window, strides), x)
    theirs = torch.tensor(np.asarray(x, np.float32)).permute(0, 3, 1, 2).requires_grad_()
    pooled = torch.nn.functional.avg_pool2d(
        theirs, window, strides, ceil_mode=True, count_include_pad=False
    )
    pooled.backward(torch.tensor(np.asarray(maps(9, *value.shape))).permute(0, 3, 1, 2))
    expected = [x.permute(0, 2, 3, 1).numpy() for x in (pooled.detach(), theirs.grad)]
    assert value.dtype == gradient.dtype == x.dtype
    assert_equal(
        [np.asarray(x, np.float32) for x in (value, gradient)],
        expected,
        2e-5 if dtype == "float32" else 2e-2,
    )


def test_pools_of_a_resnet_lose_no_edge():
    """Neither those of L and M, nor the one in the stem for small images of odd sides."""
    config = backbones.ResNetConfig((1, 1, 1), width=4, small_images=True, stem_pool=2)

    def inputs_of_dense(rounding, side):
        backbone = dataclasses.replace(config, pool_rounding=rounding)
        model = embedding_net.EmbeddingNet(backbone, 8, ("L", "M"), pool_rounding=rounding)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
        kernels = (shapes["params"][name]["kernel"] for name in ("L_dense", "M_dense"))
        return [kernel.shape[0] // 128 for kernel in kernels]

    # maps of 17 and 9, or of 16 and 8
    assert inputs_of_dense("up", 33) == [25, 9] and inputs_of_dense("down", 33) == [16, 4]
    # maps of 12 and 6, or of 11 and 6
    assert inputs_of_dense("up", 23) == [16, 4] and inputs_of_dense("down", 23) == [9, 1]
    with pytest.raises(ValueError, match="pool_rounding='even': expected one of up, down"):
        pooling.last_window_padding((7, 7), (5, 5), (3, 3), "even")


def test_the_heads_of_the_paper_see_maps_of_the_authors_sizes():
    """L pools 14x14 to 4x4 and M 7x7 to 2x2, where rounding down gives M one window."""
    for rounding, of_m in (("up", 512), ("down", 128)):
        model = embedding_net.EmbeddingNet(
            backbones.BACKBONES["googlenet_v2"], 64, ("L", "M", "H"), pool_rounding=rounding
        )
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 227, 227, 3)))
        sizes = {name: shapes["params"][name]["kernel"].shape for name in ("L_dense", "M_dense")}
        assert sizes == {"L_dense": (2048, 1024), "M_dense": (of_m, 1024)}


def test_running_statistics_keep_the_share_that_the_network_says():
    """All of it: they stay as they are, also in the heads."""
    model = embedding_net.EmbeddingNet(
        backbones.BACKBONES["resnet_tiny"], 8, ("M", "H"), batch_norm_momentum=1.0
    )
    variables = random_variables(model, 16)
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    _, new = jax.jit(apply)(variables, maps(0, 4, 16, 16, 3))
    assert {"bn1", "M_bn1", "M_bn2"} <= new["batch_stats"].keys()
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("shape", [(4, 5, 7, 3), (13, 6), (2, 16, 16, 8), (1, 1, 1, 4)])
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_batch_norm_is_that_of_flax(shape, running, dtype):
    x = (3 * maps(0, *shape) + 1).astype(dtype)
    options = {"use_running_average": running, "epsilon": 1e-5, "dtype": dtype}
    theirs = nn.BatchNorm(momentum=0.9, **options)
    variables = theirs.init(jax.random.key(0), x)
    channels = shape[-1:]
    variables["params"] = {"scale": maps(1, *channels), "bias": maps(2, *channels)}
    variables["batch_stats"] = {"mean": maps(3, *channels), "var": maps(4, *channels) ** 2}

    @functools.partial(jax.jit, static_argnums=0)
    def apply(module, params, x):
        def normalized(params, x):
            y, new = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return y, new

        y, pullback, new = jax.vjp(normalized, params, x, has_aux=True)
        gradients = pullback(maps(9, *y.shape).astype(y.dtype))
        return jax.tree.leaves((y, gradients, new))

    ours = normalization.BatchNorm(**options)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x),
                 theirs.init(jax.random.key(0), x))  # fmt: skip
    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2
    mine, reference = (apply(module, variables["params"], x) for module in (ours, theirs))
    assert_equal(mine, reference, tolerance)


@pytest.mark.parametrize("rows, first", [(50_176, 0.0), (50_176, 10.0), (50_177, 100.0)])
def test_statistics_of_many_rows_are_exact(rows, first):
    """Also where the number of rows is prime, and where the first row is unlike the others."""
    x = np.random.default_rng(0).normal(5, 0.1, (rows, 3)).astype(np.float32)
    x[0] += first
    layer = normalization.BatchNorm(use_running_average=False, momentum=0.0)
    variables = layer.init(jax.random.key(0), x)
    _, new = layer.apply(variables, x, mutable=["batch_stats"])
    exact = x.astype(np.float64)
    np.testing.assert_allclose(new["batch_stats"]["mean"], exact.mean(0), rtol=1e-6)
    # a mean square of 25 has an ulp of 2e-6
    np.testing.assert_allclose(new["batch_stats"]["var"], exact.var(0), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_networks_are_trained_in_jax_of_float64_too(dtype):
    model = embedding_net.EmbeddingNet(backbones.BACKBONES["resnet_tiny"], 8, dtype=dtype)
    with jax.enable_x64(True):
        images = jnp.zeros((2, 16, 16, 3), jnp.uint8)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
        variables = random_variables(model, 16)

        def loss(params):
            given = {**variables, "params": params}
            embeddings, _ = model.apply(given, images, train=True, mutable=["batch_stats"])
            return embeddings["H"].sum()

        gradients = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_large_pads_of_a_pool_are_refused():
    with pytest.raises(ValueError, match="below the window's sides"):
        pooling.max_pool(maps(0, 1, 4, 4, 1), (2, 2), (1, 1), [(2, 0), (0, 0)])


@pytest.mark.parametrize("name, edges", [("relu", [-0.0, 0.0]), ("relu6", [6.0])])
def test_a_relu_is_that_of_flax(name, edges):
    x = jnp.array([-2.0, *edges, 1.5, 7.0, np.inf, -np.inf, np.nan])
    ours, theirs = getattr(normalization, name), getattr(nn, name)
    assert_equal(with_gradients(ours, x), with_gradients(theirs, x))


def test_two_devices_give_the_gradient_of_one():
    """Under shard_map's check, with parameters that are the same on both devices."""
    x = maps(0, 4, 6, 6, 3)
    model = embedding_net.EmbeddingNet(backbones.BACKBONES["resnet_tiny"], 8)
    variables = random_variables(model, 6, 0.3)

    def loss(params, x, axis_name=None):
        distributed = model.clone(axis_name=axis_name)
        embeddings, _ = distributed.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return (embeddings["H"] ** 2 * maps(1, 8)).sum()

    def sharded(params, x):
        return lax.psum(loss(params, x, "batch"), "batch")

    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    on_both = jax.shard_map(sharded, mesh=mesh, in_specs=(spec(), spec("batch")), out_specs=spec())
    expected = jax.jit(jax.grad(loss))(variables["params"], x)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(expected))
    gradient = jax.jit(jax.grad(on_both))(variables["params"], x)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4), gradient, expected
    )


@pytest.mark.parametrize(
    "platform, name, dtype",
    [
        ("cuda", "googlenet_v2", jnp.float32),
        ("tpu", "resnet_small", jnp.bfloat16),
        ("cuda", "efficientnet_lite0", jnp.float32),
    ],
)
def test_programs_for_other_platforms_are_those_of_flax(platform, name, dtype, monkeypatch):
    model = embedding_net.EmbeddingNet(backbones.BACKBONES[name], 8, dtype=dtype)
    images = jnp.zeros((2, 64, 64, 3), jnp.uint8)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)

    def operations():
        def loss(params, images):
            variables = {**shapes_as_zeros, "params": params}
            embeddings, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return embeddings["H"].sum()

        shapes_as_zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        traced = jax.jit(jax.grad(loss)).trace(shapes["params"], images)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        found = re.findall(r"stablehlo\.(\w+)", text)
        kinds = ("convolution", "dot_general", "reduce_window", "select_and_scatter", "reduce")
        return {kind: found.count(kind) for kind in kinds}

    ours = operations()
    monkeypatch.setattr(embedding_net, "conv_general_dilated", None)
    monkeypatch.setattr(embedding_net, "BatchNorm", nn.BatchNorm)
    for module in (resnet, googlenet, embedding_net):
        monkeypatch.setattr(module, "relu", nn.relu)
        monkeypatch.setattr(module, "avg_pool", nn.avg_pool)
    for module in (resnet, googlenet):
        monkeypatch.setattr(module, "max_pool", nn.max_pool)
    monkeypatch.setattr(efficientnet, "relu6", nn.relu6)
    theirs = operations()
    assert ours.pop("reduce") <= theirs.pop("reduce")  # a batch norm's gradient has one sum less
    assert ours == theirs and ours["convolution"] > 20


@pytest.mark.parametrize("backbone", ["resnet_tiny", "vit_test"])
@pytest.mark.parametrize("pooling", embedding_net.POOLINGS[1:])
def test_pools_and_the_norm_before_the_last_layer(backbone, pooling):
    config = backbones.BACKBONES[backbone]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    model = embedding_net.EmbeddingNet(config, 4, pooling=pooling, head_norm=True)
    variables = random_variables(model, 32, 0.3)
    params = variables["params"]
    if pooling == "gem":
        params["H_gem"]["p"][:] = 3
    found, end = jax.jit(
        lambda v: (model.apply(v, pixels)["H"], model.apply(v, pixels, features=True)[-1])
    )(variables)
    x = np.asarray(end, np.float64)
    x = x[:, 1:] if backbone == "vit_test" else x.reshape(3, -1, x.shape[-1])  # no class token
    power = 3.0
    x = {
        "avg": x.mean(1),
        "max": x.max(1),
        "avg+max": x.mean(1) + x.max(1),
        "gem": (np.maximum(x, 1e-6) ** power).mean(1) ** (1 / power),
    }[pooling]
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    x = x * params["H_norm"]["scale"] + params["H_norm"]["bias"]
    x = x @ params["H_embedding"]["kernel"]
    np.testing.assert_allclose(found, x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-4)
    assert ("H_gem" in params) == (pooling == "gem")
    if pooling == "gem":
        gradient = jax.jit(
            jax.grad(lambda p: model.apply({**variables, "params": p}, pixels)["H"].sum())
        )
        assert np.abs(gradient(params)["H_gem"]["p"]) > 0


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 0.01)])
def test_the_exact_gelu_is_that_of_jax(dtype, tolerance):
    x = jnp.linspace(-9, 9, 400).astype(dtype)
    expected = with_gradients(functools.partial(nn.gelu, approximate=False), x)
    for ours, theirs in zip(with_gradients(normalization.gelu, x), expected, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(
            ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=tolerance, atol=tolerance
        )
    _, along = jax.jvp(normalization.gelu, (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(along, jax.vmap(jax.grad(normalization.gelu))(x))
