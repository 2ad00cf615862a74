"""The train step beyond an update: a memory to rank, distances to watch, chunks, other machines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rll_jax import loss
from rll_jax.networks import backbones, embedding_net
from rll_jax.training import devices, steps
from tests.helpers.networks import Linear


def test_a_step_promotes_no_ranks():
    """JAX_NUMPY_RANK_PROMOTION=raise: traced alone, as ranks are looked at in tracing."""
    network = embedding_net.EmbeddingNet(
        backbone=backbones.BACKBONES["resnet_tiny"], levels=("M", "H"), embedding_dim=4
    )
    watch = functools.partial(steps.watch_distances, alpha=1.2, margin=0.4)
    one = functools.partial(steps.train_step, loss=loss.ranked_list_loss, watch=watch)
    batch = {"image": np.zeros((8, 16, 16, 3), np.uint8), "label": np.arange(8) // 2}
    make = functools.partial(
        steps.create_train_state, network, optax.adamw(0.1), 16, seed=0, memory_size=16
    )
    with jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(make)
        for chunk in (0, 4):
            state, metrics = jax.eval_shape(functools.partial(one, embed_chunk=chunk), state, batch)
        assert jax.eval_shape(steps.embed_step, state, batch["image"])["H"].shape == (8, 4)
        assert "positive_distances_H" in metrics


@pytest.mark.parametrize("backbone", ["resnet_tiny", "vit_test", "convnext_test"])
def test_every_family_has_a_step_under_shard_map(backbone):
    """Traced alone: shard_map looks in tracing at what varies between devices."""
    network = embedding_net.EmbeddingNet(
        backbone=backbones.BACKBONES[backbone], embedding_dim=4, axis_name=devices.AXIS
    )
    one = functools.partial(steps.train_step, loss=loss.ranked_list_loss)
    state = jax.eval_shape(
        functools.partial(steps.create_train_state, network, optax.adamw(0.1), 64, seed=0)
    )
    batch = {
        "image": jax.ShapeDtypeStruct((16, 64, 64, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((16,), np.int32),
    }
    step = devices.make_runner("shard_map").train(one)
    assert jax.eval_shape(step, state, batch)[1]["loss"].shape == ()


BOTH_ENDS = functools.partial(loss.ranked_list_loss, gallery_gradient=True)


def with_memory(kind, batches, size=96, embed_chunk=0, function=loss.ranked_list_loss):
    """The states from the first to that after the last batch, and the losses on the way."""
    one, runner = (
        functools.partial(steps.train_step, loss=function, embed_chunk=embed_chunk),
        devices.make_runner(kind) if kind else None,
    )
    state, one = (
        steps.create_train_state(Linear(), optax.sgd(0.5), 16, seed=0, memory_size=size),
        runner.train(one) if kind else jax.jit(one),
    )
    states, losses = [jax.device_get(state)], []
    state = runner.replicate(state) if kind else state
    for batch in batches:
        state, metrics = one(state, runner.shard(batch) if kind else batch)
        losses.append(float(metrics["loss"]))
        states.append(jax.device_get(state))
    return states, losses


@pytest.fixture(scope="module")
def few_classes():
    """Batches of 12 of 20 classes, so that a memory holds others of a query's class.

    The last batch has images of NaN.
    """
    rng = np.random.default_rng(1)
    made = [
        {
            "image": rng.integers(0, 255, (48, 16, 16, 3)).astype(np.float32),
            "label": np.repeat(rng.permutation(20)[:12], 4).astype(np.int32),
        }
        for i in range(5)
    ]
    return [*made[:4], {**made[4], "image": np.full_like(made[4]["image"], np.nan)}]


@pytest.fixture(scope="module")
def remembered(few_classes):
    return with_memory(None, few_classes)


def test_a_memory_is_ranked(few_classes, remembered):
    """The last 96 rows, as they were when stored, this batch's among them; nothing not finite."""
    states, losses = remembered
    rows = [
        np.asarray(Linear().apply({"params": s.params}, b["image"])["H"])
        for s, b in zip(states[:-1], few_classes, strict=True)
    ]
    rank = jax.jit(loss.ranked_list_loss)
    for n in range(4):
        gallery, labels = (
            np.concatenate(x[max(n - 1, 0) : n + 1])
            for x in (rows, [b["label"] for b in few_classes])
        )
        value = rank(rows[n], few_classes[n]["label"], gallery=gallery, gallery_labels=labels)
        assert losses[n] == pytest.approx(float(value), rel=1e-5)
    alone = rank(
        rows[3], few_classes[3]["label"], gallery=rows[3], gallery_labels=few_classes[3]["label"]
    )
    assert abs(losses[3] / float(alone) - 1) > 0.005
    jax.tree.map(np.testing.assert_array_equal, states[5].memory, states[4].memory)
    assert states[5].skipped.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind, embed_chunk", [("pmap", 0), ("shard_map", 3)])
def test_a_memory_is_the_same_on_many_devices(kind, embed_chunk, few_classes, remembered):
    states, losses = with_memory(kind, few_classes, embed_chunk=embed_chunk)
    np.testing.assert_allclose(losses, remembered[1], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        (states[-1].params, states[-1].memory),
        (remembered[0][-1].params, remembered[0][-1].memory),
    )
    with pytest.raises(ValueError, match=r"multiple of the 8 devices: found \[100\]"):
        with_memory(kind, few_classes, 100)


@pytest.fixture(scope="module")
def remembered_at_both_ends(few_classes):
    return with_memory(None, few_classes, function=BOTH_ENDS)


def test_both_ends_of_a_pair_move_but_those_of_earlier_batches(
    few_classes, remembered, remembered_at_both_ends
):
    states, losses = remembered_at_both_ends
    assert losses[0] == remembered[1][0]

    def embed(params, n):
        return Linear().apply({"params": params}, few_classes[n]["image"])["H"]

    for n in range(4):
        earlier = [embed(states[n - 1].params, n - 1)] if n else []
        labels = [few_classes[i]["label"] for i in range(max(n - 1, 0), n + 1)]

        @jax.jit
        @jax.grad
        def expected(params, n=n, earlier=earlier, labels=labels):
            rows = embed(params, n)
            gallery = jnp.concatenate([*earlier, rows])
            return BOTH_ENDS(
                rows, labels[-1], gallery=gallery, gallery_labels=jnp.concatenate(labels)
            )

        found = jax.tree.map(lambda a, b: (a - b) / 0.5, states[n].params, states[n + 1].params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max()),
            found,
            jax.device_get(expected(states[n].params)),
        )
    difference = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), states[1].params, remembered[0][1].params
    )
    assert max(jax.tree.leaves(difference)) > 1e-4


@pytest.mark.parametrize("kind, embed_chunk", [("pmap", 3), ("shard_map", 0)])
def test_both_ends_of_a_memory_are_the_same_on_many_devices(
    kind, embed_chunk, few_classes, remembered_at_both_ends
):
    states, losses = with_memory(kind, few_classes, embed_chunk=embed_chunk, function=BOTH_ENDS)
    np.testing.assert_allclose(losses, remembered_at_both_ends[1], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        (states[-1].params, states[-1].memory),
        (remembered_at_both_ends[0][-1].params, remembered_at_both_ends[0][-1].memory),
    )


@pytest.mark.parametrize("axis", [None, "batch"])
def test_watched_distances(axis):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 5)).astype(np.float32)
    x, labels = x / np.linalg.norm(x, axis=1, keepdims=True), np.repeat(np.arange(12), 4)
    order = rng.permutation(48)
    x, labels = x[order], labels[order]
    watch = functools.partial(steps.watch_distances, alpha=1.2, margin=0.4, axis_name=axis)
    if axis is None:
        found = watch(x, labels)
    else:
        found = jax.pmap(watch, axis)(x.reshape(8, 6, 5), labels.reshape(8, 6))
        found = jax.tree.map(lambda a: np.asarray(a).mean(axis=0), found)
    distance = np.linalg.norm(x[:, None].astype(float) - x, axis=2)
    same = (labels[:, None] == labels) & ~np.eye(48, dtype=bool)
    other = labels[:, None] != labels
    scale = 1 if axis is None else 8  # means over the devices, each with an eighth of the pairs
    assert found["nontrivial_positives"] == pytest.approx((distance[same] > 0.8).mean(), rel=1e-5)
    assert found["nontrivial_negatives"] == pytest.approx((distance[other] < 1.2).mean(), rel=1e-2)
    for name, pairs in (("positive", same), ("negative", other)):
        expected, _ = np.histogram(distance[pairs], bins=40, range=(0, 2))
        np.testing.assert_allclose(found[f"{name}_distances"] * scale, expected, atol=2)
