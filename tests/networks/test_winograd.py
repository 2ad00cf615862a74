"""Winograd's convolution against XLA's, in float64."""

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from rll_jax.networks import convolution, winograd

ONE = ((1, 1), (1, 1))


def direct(x, kernel, pads):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in shapes]


def floats(*shapes):
    return [jnp.asarray(array, jnp.float32) for array in arrays(*shapes)]


def convolve(x, kernel, strides=(1, 1), pads=ONE):
    return convolution.conv_general_dilated(x, kernel, strides, pads)


@pytest.mark.parametrize(
    ("shape", "pads"),
    [
        ((8, 8, 8, 128), ONE),
        ((5, 7, 10, 130), ONE),
        ((6, 9, 8, 128), ((0, 0), (0, 0))),
        ((6, 9, 8, 128), ((2, 0), (0, 1))),
        ((6, 32, 32, 128), ONE),  # two chunks of three images
        ((20, 3, 3, 140), ONE),
    ],
)
def test_value_and_gradients(shape, pads):
    x, kernel = arrays(shape, (3, 3, shape[3], 136))
    assert winograd.suits(x, kernel, pads)
    assert winograd._chunk(x, winograd._num_tiles(x, pads)) == (3 if shape[1] == 32 else shape[0])
    with jax.enable_x64(True):
        expected, pull = jax.vjp(lambda *a: direct(*a, pads), jnp.asarray(x), jnp.asarray(kernel))
        (gradient,) = arrays(expected.shape)
        expected = [np.asarray(a) for a in (expected, *pull(jnp.asarray(gradient)))]
    found, pull = jax.vjp(
        lambda *a: convolve(*a, pads=pads),
        jnp.asarray(x, jnp.float32),
        jnp.asarray(kernel, jnp.float32),
    )
    found = [found, *pull(jnp.asarray(gradient, jnp.float32))]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == jnp.float32
        assert np.abs(one - other).max() < 4e-6 * np.abs(other).max()


def test_it_is_what_a_cpu_runs():
    x, kernel = floats((8, 8, 8, 128), (3, 3, 128, 128))
    run = jax.jit(convolve)
    assert " convolution(" not in run.lower(x, kernel).compile().as_text()
    few = x[..., :64], kernel[:, :, :64]
    assert " convolution(" in run.lower(*few).compile().as_text()
    gradients = jax.jit(jax.grad(lambda *a: run(*a).sum(), argnums=(0, 1)))
    assert " convolution(" not in gradients.lower(x, kernel).compile().as_text()


def test_strides_are_xlas():
    x, kernel = floats((8, 8, 8, 128), (3, 3, 128, 128))
    found = convolve(x, kernel, (2, 2))
    assert np.abs(found - direct(x, kernel, ONE)[:, ::2, ::2]).max() < 1e-3


@pytest.mark.parametrize(
    ("shape", "sides", "pads"),
    [
        ((8, 8, 8, 128), (1, 3), ONE),
        ((8, 8, 8, 128), (3, 3), ((-1, 1), (1, 1))),
        ((8, 2, 8, 128), (3, 3), ONE),
        ((1, 8, 8, 128), (3, 3), ONE),  # 16 tiles
        ((37, 64, 8, 128), (3, 3), ONE),  # nothing but 1 divides the batch
        ((8, 8, 8, 64), (3, 3), ONE),
    ],
)
def test_others_are_xlas(shape, sides, pads):
    x, kernel = arrays(shape, (*sides, shape[3], 128))
    assert not winograd.suits(x, kernel, pads)


def test_batches_without_a_number_and_without_images():
    (batch,) = jax.export.symbolic_shape("N")
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, 8, 8, 128), (3, 3, 128, 128))
    ]
    exported = jax.export.export(jax.jit(convolve))(*shapes)
    x, kernel = floats((8, 8, 8, 128), (3, 3, 128, 128))
    assert np.abs(exported.call(x, kernel) - convolve(x, kernel)).max() < 1e-3
    assert convolve(x[:0], kernel).shape == (0, 8, 8, 128)


def test_devices_and_vmap(monkeypatch):
    x, kernel = floats((32, 8, 8, 128), (3, 3, 128, 128))
    monkeypatch.setattr(winograd, "_CHUNK_COMPONENTS", 1 << 14)  # 64 x 4 tiles: 16 images, or 2
    monkeypatch.setattr(winograd, "_LEAST_TILES", 1)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def gradients(x, kernel):
        def loss(*a):
            return (convolve(*a) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(x, kernel)

    batch, everywhere = PartitionSpec("data"), PartitionSpec()
    divided = jax.shard_map(
        gradients, mesh=mesh, in_specs=(batch, everywhere), out_specs=(batch, everywhere)
    )
    expected = gradients(x, kernel)
    by_vmap = jax.vmap(gradients, in_axes=(0, None))(x.reshape(8, 4, 8, 8, 128), kernel)
    by_vmap = (by_vmap[0].reshape(x.shape), by_vmap[1].sum(axis=0))
    for found in (jax.jit(divided)(x, kernel), by_vmap):
        for one, other in zip(found, expected, strict=True):
            assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()


def test_a_batch_on_a_mesh_stays_divided():
    x, kernel = floats((32, 16, 16, 128), (3, 3, 128, 128))
    assert winograd._chunk(x, 64) == 16

    expected = convolve(x, kernel)
    kinds = [jax.sharding.AxisType.Auto]
    if jax.__version_info__ >= (0, 12):  # before, explicit axes are refused by any convolution here
        kinds.append(jax.sharding.AxisType.Explicit)
    for kind in kinds:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        divided = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec("data")))
        everywhere = jax.device_put(kernel, jax.NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(convolve).lower(divided, everywhere).compile()
        assert "all-gather" not in compiled.as_text()
        assert np.abs(compiled(divided, everywhere) - expected).max() < 1e-3


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="networks have no explicit axes there")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [1, 3])
def test_gradients_on_explicit_axes(size, dtype):
    x, kernel = (array.astype(dtype) for array in floats((8, 6, 6, 128), (size, size, 128, 128)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    divided = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec("data")))
    everywhere = jax.device_put(kernel, jax.NamedSharding(mesh, PartitionSpec()))
    gradient = jax.jit(jax.grad(lambda *a: (convolve(*a) ** 2).astype(jnp.float32).sum(), (0, 1)))
    for one, other in zip(gradient(divided, everywhere), gradient(x, kernel), strict=True):
        assert np.abs(one - other).max() < 0.02 * np.abs(other).max()
