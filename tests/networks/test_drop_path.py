"""Drop path: which images skip which blocks in training, and none in tests."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.engine import config
from rll_jax.loss import rows
from rll_jax.networks import backbones, drop_path, embedding_net
from rll_jax.training import devices, steps
from tests.helpers.networks import variables_of

RNG = {drop_path.NAME: jax.random.key(3)}


class Branch(nn.Module):
    rate: float

    def __call__(self, x):
        return drop_path.drop(self, x, self.rate)


def test_a_branch_is_dropped_or_made_up_for():
    x = jnp.full((4000, 2, 3), 2.0, jnp.bfloat16)
    found = Branch(0.2).apply({}, x, rngs=RNG)
    dropped = np.asarray((found == 0).all(axis=(1, 2)))
    assert dropped.mean() == pytest.approx(0.2, abs=0.02) and found.dtype == x.dtype
    assert (np.asarray(found[~dropped], np.float32) == 2.5).all()
    assert Branch(0.2).apply({}, x) is x and Branch(0.0).apply({}, x, rngs=RNG) is x


def test_rates_grow_linearly():
    rates = [drop_path.rate_of(0.3, block, 4, frozen=False) for block in range(4)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])  # timm's linspace(0, rate, depth)
    assert drop_path.rate_of(0.3, 3, 4, frozen=True) == drop_path.rate_of(0.3, 0, 1, False) == 0


def network(backbone, **options):
    """A network that drops half of the last block, and variables drawn by chance."""
    found = dataclasses.replace(backbones.BACKBONES[backbone], drop_path=0.5)
    model = embedding_net.EmbeddingNet(found, 8, batch_norm="frozen", **options)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda x: abs(rng.normal(0.2, 0.1, x.shape)).astype(np.float32), variables_of(model, 16)
    )
    return model, drawn


IMAGES = np.random.default_rng(1).integers(0, 256, (16, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("backbone", ["resnet_tiny", "vit_test"])
def test_the_first_block_and_frozen_ones_are_never_skipped(backbone):
    model, variables = network(backbone)

    def ends(model, **given):
        found = jax.jit(lambda x: model.apply(variables, x, features=True, **given))(IMAGES)
        return [np.asarray(end) for end in found]

    def skip(some, others):
        axes = tuple(range(1, some.ndim))
        return ~np.isclose(some, others, rtol=1e-4).all(axis=axes)

    usual = ends(model)
    for ours, same in zip(ends(model, train=True), usual, strict=True):
        np.testing.assert_allclose(ours, same, rtol=1e-5)
    dropped = ends(model, train=True, rngs=RNG)
    np.testing.assert_allclose(dropped[0], usual[0], rtol=1e-5)
    assert skip(dropped[-1], usual[-1]).any()
    again = ends(model.clone(remat=(len(usual),)), train=True, rngs=RNG)
    np.testing.assert_allclose(again[-1], dropped[-1], rtol=1e-4)
    frozen = ends(model.clone(frozen_stages=len(usual)), train=True, rngs=RNG)
    np.testing.assert_allclose(frozen[-1], usual[-1], rtol=1e-4)


BATCH = {"image": IMAGES, "label": np.arange(16) // 2}


class Small(nn.Module):
    """{"H": (B, 8)} of unit length, by a branch that half of the images skip."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Dense(8)(images.reshape(len(images), -1) / 255 - 0.5)
        x = x + drop_path.drop(self, nn.Dense(8)(x), 0.5)
        return {"H": x / jnp.linalg.norm(x, axis=-1, keepdims=True)}


def a_loss(embeddings, labels, *, axis_name=None):
    embeddings = rows.gather(embeddings, axis_name)
    return jnp.mean((embeddings @ embeddings.T - 0.1) ** 2)


def a_state():
    return steps.create_train_state(Small(), optax.sgd(1.0), 16, seed=0)


def a_step(state, batch=BATCH, **options):
    new, metrics = steps.train_step(state, batch, loss=a_loss, drop_path_seed=0, **options)
    return new, metrics


def differ(some, others):
    same = jax.tree.map(np.array_equal, some.params, others.params)
    return not all(jax.tree.leaves(same))


def test_steps_differ_and_can_be_repeated():
    state, step = a_state(), jax.jit(a_step)
    first = step(state)[0]
    assert not differ(first, step(state)[0])
    assert differ(first, step(state.replace(step=1))[0])
    without = jax.jit(lambda state: steps.train_step(state, BATCH, loss=a_loss))(state)[0]
    assert differ(first, without)


def test_both_passes_of_a_chunk_skip_the_same():
    """The update in chunks is that of the whole batch, whose parts have the chunks' keys."""
    state = a_state()
    chunked = jax.jit(lambda state: a_step(state, embed_chunk=8))(state)[0].params
    both = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 2)
    parts = [(IMAGES[:8], both[0]), (IMAGES[8:], both[1])]

    @jax.grad
    def gradient(params):
        levels = [
            state.apply_fn({"params": params}, images, train=True, rngs={drop_path.NAME: key})
            for images, key in parts
        ]
        return a_loss(jnp.concatenate([level["H"] for level in levels]), BATCH["label"])

    expected = jax.tree.map(lambda p, g: p - g, state.params, gradient(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), chunked, expected)


def test_devices_skip_others_and_both_ways_are_one():
    ends = []
    for kind in ("pmap", "shard_map"):
        runner = devices.make_runner(kind, jax.devices()[:2])
        twice = {"image": np.tile(IMAGES[:8], (2, 1, 1, 1)), "label": BATCH["label"]}
        step = runner.train(functools.partial(a_step, watch=lambda e, _, axis_name: both(e)))
        new, metrics = step(runner.replicate(a_state()), runner.shard(twice))
        assert float(jax.device_get(metrics["apart_H"])) > 0.1
        ends.append(jax.device_get(new.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *ends)


def both(embeddings):
    """How far the embeddings of the same images on two devices are apart."""
    found = rows.gather(embeddings, devices.AXIS)
    return {"apart": jnp.abs(found[:8] - found[8:]).max()}


def test_the_option_is_of_networks_that_have_it():
    for backbone in ("resnet50", "vit_small_14"):
        options = config.from_flat(backbone=backbone, drop_path=0.1)
        assert options.network.backbone_config.drop_path == 0.1
    with pytest.raises(ValueError, match="--drop_path=0.1: --backbone=googlenet_v2 has no blocks"):
        config.from_flat(backbone="googlenet_v2", drop_path=0.1)
    with pytest.raises(ValueError, match="--drop_path=1.0: expected between 0 and 0.95"):
        config.from_flat(drop_path=1.0)
    with pytest.raises(ValueError, match="drop_path=1: expected at least 0, and below 1"):
        dataclasses.replace(backbones.BACKBONES["vit_test"], drop_path=1)
