"""A run's train step: on machines that are not here, and in little memory."""

import functools

import jax
import numpy as np
import pytest

from experiments.engine import build, config, network, run_parts
from rll_jax.training import devices


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
    "options",
    [{}, {"embed_chunk": 2, "batch_norm": "frozen", "memory_size": 2048, "dtype": "bfloat16"}],
)
def test_the_step_lowers_for_machines_that_are_not_here(platform, options):
    """The whole train step, over a pod of 256 chips: nothing in it is for CPUs alone."""
    options = (
        dict(
            backbone="resnet_tiny",
            image_size=32,
            embedding_dim=16,
            levels="M,H",
            optimizer="sgd",
            ema=0.9,
        )
        | options
    )
    settings = config.from_flat(**options)
    state = jax.eval_shape(functools.partial(build.create_state, settings))
    images = {
        "image": jax.ShapeDtypeStruct((1024, 32, 32, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((1024,), np.int32),
    }
    pod = jax.sharding.AbstractMesh(
        (256,), (devices.AXIS,), axis_types=(jax.sharding.AxisType.Auto,)
    )
    whole, rows = jax.P(), jax.P(devices.AXIS)
    make_step = run_parts.make_train_step(settings, np.arange(2))
    step = functools.partial(make_step, axis_name=devices.AXIS)
    mapped = jax.jit(
        jax.shard_map(step, mesh=pod, in_specs=(whole, rows), out_specs=(whole, whole)),
        donate_argnums=0,
    )
    text = mapped.trace(state, images).lower(lowering_platforms=(platform,)).as_text()
    assert (
        "all_gather" in text and "all_reduce" in text and "tensor<1024x16xf32>" in text
    )  # a query's gallery is the pod's


def test_a_state_that_compiles_quickly_is_the_same():
    settings = config.from_flat(
        backbone="resnet_tiny", image_size=16, embedding_dim=8, ema=0.9, memory_size=64
    )
    one = devices.make_runner("shard_map", jax.devices()[:1])
    quick, plain = build.make_state(settings, one, proxies=3), build.create_state(settings, 3)
    for ours, theirs in zip(jax.tree.leaves(quick), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_chunks_take_the_memory_of_one():
    """Eight times the images take little more memory in chunks, eight times as much at once."""

    def taken(images, chunk):
        settings = config.from_flat(
            backbone="resnet_tiny", batch_norm="frozen", embed_chunk=chunk, optimizer="sgd"
        )
        state = jax.eval_shape(functools.partial(build.create_state, settings))
        state = state.replace(
            apply_fn=network.make_model(settings.network).clone(axis_name=None).apply
        )
        batch = {
            "image": jax.ShapeDtypeStruct((images, 32, 32, 3), np.uint8),
            "label": jax.ShapeDtypeStruct((images,), np.int32),
        }
        return (
            jax.jit(run_parts.make_train_step(settings, np.arange(2)))
            .lower(state, batch)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    few, chunked, at_once = taken(64, 0), taken(512, 64), taken(512, 0)
    assert at_once > 6 * few and chunked < 2 * few
