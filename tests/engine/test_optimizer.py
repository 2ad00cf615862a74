"""Learning rates over the steps, the heads' own, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.engine import config, optimizer
from experiments.engine.optimizer import OptimizerOptions


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
