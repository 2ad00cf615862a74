"""Learning rates over the steps, the heads' own, and what decays."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.engine import config, network, optimizer
from experiments.engine.optimizer import OptimizerOptions
from tests.helpers.recipes import recipe

# The authors' prototxts: base rate, multiplier of the last linear layers, decay, the rate's falls.
SOP_2019 = (0.01, 10, 1e-5, 0.5, (5000, 10000, 15000))
CUB = (0.001, 100, 2e-5, 0.5, (2000, 4000, 6000, 8000))
RATES = {
    "sop_2019": SOP_2019, "inshop_2019": SOP_2019, "cub_2019": CUB, "cars_2019": CUB,
    "sop_2020": (0.01, 10, 2e-5, 0.2, (12000, 22000)), "cub_2020": CUB, "cars_2020": CUB,
    "inshop_2020": (0.01, 10, 2e-5, 0.2, (12000, 24000)),
}  # fmt: skip


@functools.cache
def shapes_of_the_papers_network(embedding_dim):
    model = network.make_model(recipe("sop_2019").network).clone(embedding_dim=embedding_dim)
    model = model.clone(axis_name=None)
    images = jax.ShapeDtypeStruct((1, 227, 227, 3), np.uint8)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


@pytest.mark.parametrize("name", RATES)
def test_every_parameter_of_a_recipe_moves_at_the_authors_rate(name):
    """An update without momentum: the gradient alone, and the decay alone, of every parameter."""
    base, multiplier, decay, factor, falls = RATES[name]
    one = recipe(name)
    shapes = shapes_of_the_papers_network(one.network.embedding_dim)
    assert shapes["M_dense"]["kernel"].shape == (512, 1024)
    # One value stands for an array: the optimiser goes by names and numbers of dimensions.
    zeros = jax.tree.map(lambda leaf: np.zeros((1,) * leaf.ndim, np.float32), shapes)
    ones = jax.tree.map(np.ones_like, zeros)
    tx = optimizer.make_optimizer(one.optimizer, one.network, one.schedule.steps)
    moved, _ = tx.update(ones, tx.init(zeros), zeros)
    decayed, _ = tx.update(zeros, tx.init(ones), ones)
    fast = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        module = path[0].key
        expected = base * (multiplier if module.endswith("_embedding") else 1)
        assert leaf == pytest.approx(-expected), path
        fast |= {module} if expected > base else set()
    assert fast == {"L_embedding", "M_embedding", "H_embedding"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, decay * b, rtol=1e-5), decayed, moved)
    rate = optimizer.learning_rate(one.optimizer, one.schedule.steps)
    for step in range(0, one.schedule.steps, 500):
        passed = sum(fall <= step for fall in falls)
        assert math.isclose(rate(step), base * factor**passed, rel_tol=1e-5)


def test_schedules():
    falls = OptimizerOptions(schedule="step", learning_rate=0.8, decay_at=(3, 5), decay_factor=0.25)
    step = optimizer.learning_rate(falls, 10)
    np.testing.assert_allclose(
        [step(i) for i in range(7)], [0.8, 0.8, 0.8, 0.2, 0.2, 0.05, 0.05], rtol=1e-6
    )
    rises = OptimizerOptions(schedule="cosine", learning_rate=0.8, warmup=0.2)
    cosine = optimizer.learning_rate(rises, 100)
    found = np.array([cosine(i) for i in range(101)])
    np.testing.assert_allclose(found[:21], 0.8 * np.arange(21) / 20, atol=1e-6)
    np.testing.assert_allclose(
        found[20:], 0.4 * (1 + np.cos(np.pi * np.arange(81) / 80)), atol=1e-6
    )


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_heads_rate_and_the_decay(name):
    params = {
        "conv1": {"kernel": jnp.ones((2, 2))},
        "bn1": {"scale": jnp.ones(2)},
        "H_embedding": {"kernel": jnp.ones((2, 2))},
    }
    options = dict(optimizer=name, schedule="step", learning_rate=0.1, weight_decay=0.5)

    def update(gradient, **more):
        one = config.from_flat(**options, **more)
        tx = optimizer.make_optimizer(one.optimizer, one.network, one.schedule.steps)
        updates, _ = tx.update(
            jax.tree.map(lambda p: gradient * jnp.ones_like(p), params), tx.init(params), params
        )
        return {name: float(jax.tree.leaves(u)[0].ravel()[0]) for name, u in updates.items()}

    plain, multiplied = update(1.0), update(1.0, head_lr_multiplier=10.0)
    assert multiplied["conv1"] == plain["conv1"] and multiplied["H_embedding"] == pytest.approx(
        10 * plain["H_embedding"]
    )
    decayed, all_decayed = update(0.0), update(0.0, decay_norm_and_bias=True)
    assert decayed["bn1"] == 0 and decayed["conv1"] == all_decayed["bn1"] == pytest.approx(-0.05)
    frozen = update(
        1.0, frozen_stages=1, batch_norm="frozen", decay_norm_and_bias=True, head_lr_multiplier=10.0
    )
    assert frozen == {"conv1": 0, "bn1": 0, "H_embedding": multiplied["H_embedding"]}
    if name == "sgd":
        assert update(1.0, clip_gradient=1.0)["bn1"] == pytest.approx(-0.1 / np.sqrt(10))


def updates_of(steps_taken, **options):
    """The last update of each module; AdamW's for gradients of 1 is -rate times the factors."""
    params = {
        name: {"kernel": jnp.ones((2, 2))}
        for name in ("tokens", "blocks_0", "blocks_2", "norm", "H_embedding")
    }
    one = config.from_flat(
        backbone="vit_test", optimizer="adamw", schedule="step", learning_rate=0.1,
        **{"weight_decay": 0, **options},
    )  # fmt: skip
    tx = optimizer.make_optimizer(one.optimizer, one.network, one.schedule.steps)
    state = tx.init(params)
    for _ in range(steps_taken):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    return {name: float(module["kernel"][0, 0]) for name, module in updates.items()}


def test_rates_decay_from_stage_to_stage():
    found = updates_of(1, layer_decay=0.5)
    expected = dict(tokens=2**-4, blocks_0=2**-3, blocks_2=2**-1, norm=2**-1, H_embedding=1)
    assert found == pytest.approx({name: -0.1 * by for name, by in expected.items()}, rel=1e-4)
    frozen = updates_of(1, layer_decay=0.5, frozen_stages=1)
    assert frozen == pytest.approx(found | dict(tokens=0, blocks_0=0))


def test_the_heads_train_alone_at_first():
    alone, together = (updates_of(steps, head_warmup_steps=2) for steps in (2, 3))
    assert [name for name, update in alone.items() if update] == ["H_embedding"]
    assert together == pytest.approx(dict.fromkeys(alone, -0.1), rel=1e-4)


def test_lora_and_the_heads_train_alone():
    found = updates_of(2, lora_rank=2, weight_decay=0.1, head_lr_multiplier=2.0)
    assert [name for name, update in found.items() if update] == ["H_embedding"]
    assert found["H_embedding"] < -0.2
    one = config.from_flat(backbone="vit_test", lora_rank=2, frozen_stages=1, learning_rate=0.1)
    tx = optimizer.make_optimizer(one.optimizer, one.network, 10)
    block = {"attn_qkv": jnp.ones((2, 2)), "attn_lora": {"a": jnp.ones((2, 2))}}
    params = {"blocks_0": block, "blocks_1": block, "proxies": {"H": jnp.ones((2, 2))}}
    state = tx.init(params)
    for _ in range(2):  # the first step of the warm-up has a rate of 0
        updates, state = tx.update(params, state, params)
    moved = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
        if leaf.any()
    }
    assert moved == {"['blocks_1']['attn_lora']['a']", "['proxies']['H']"}
