"""A step that ranks its memory of the last embeddings: the right ones, the same on many devices."""
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rll_jax import loss, parallel, train
from test_train import batches, step  # noqa: F401, a fixture


class Linear(nn.Module):
    """A network that compiles at once."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Dense(8, use_bias=False)(images.reshape(len(images), -1) / 255 - 0.5)
        return {"H": x / jnp.linalg.norm(x, axis=-1, keepdims=True)}


def with_memory(kind, batches, size=96, embed_chunk=0):
    """The states from the first to that after the last batch, and the losses on the way."""
    one, runner = functools.partial(step, embed_chunk=embed_chunk), parallel.make_runner(kind) if kind else None
    state, one = train.create_train_state(Linear(), optax.sgd(0.5), 16, seed=0, memory_size=size), runner.train(one) if kind else jax.jit(one)
    states, losses = [jax.device_get(state)], []
    state = runner.replicate(state) if kind else state
    for batch in batches:
        state, metrics = one(state, runner.place(batch) if kind else batch)
        losses.append(float(metrics["loss"]))
        states.append(jax.device_get(state))
    return states, losses


@pytest.fixture(scope="module")
def few_classes(batches):
    """Batches of 12 of 20 classes, so that a memory holds others of a query's class; the last cannot be used."""
    rng = np.random.default_rng(1)
    made = [{"image": batches[i % 3]["image"].astype(np.float32), "label": np.repeat(rng.permutation(20)[:12], 4).astype(np.int32)} for i in range(5)]
    return [*made[:4], {**made[4], "image": np.full_like(made[4]["image"], np.nan)}]


@pytest.fixture(scope="module")
def remembered(few_classes):
    return with_memory(None, few_classes)


def test_a_memory_is_ranked(few_classes, remembered):
    """The last 96 rows, as they were when they were stored, this batch's among them; nothing that is not finite is stored."""
    states, losses = remembered
    rows = [np.asarray(Linear().apply({"params": s.params}, b["image"])["H"]) for s, b in zip(states, few_classes)]
    rank = jax.jit(loss.ranked_list_loss)
    for n in range(4):
        gallery, labels = (np.concatenate(x[max(n - 1, 0) : n + 1]) for x in (rows, [b["label"] for b in few_classes]))
        value = rank(rows[n], few_classes[n]["label"], gallery=gallery, gallery_labels=labels)
        assert losses[n] == pytest.approx(float(value), rel=1e-5)
    alone = rank(rows[3], few_classes[3]["label"], gallery=rows[3], gallery_labels=few_classes[3]["label"])
    assert abs(losses[3] / float(alone) - 1) > 0.005
    jax.tree.map(np.testing.assert_array_equal, states[5].memory, states[4].memory)
    assert states[5].skipped.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind, embed_chunk", [("pmap", 0), ("shard_map", 3)])
def test_a_memory_is_the_same_on_many_devices(kind, embed_chunk, few_classes, remembered):
    states, losses = with_memory(kind, few_classes, embed_chunk=embed_chunk)
    np.testing.assert_allclose(losses, remembered[1], rtol=1e-5)
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(same, (states[-1].params, states[-1].memory), (remembered[0][-1].params, remembered[0][-1].memory))
    with pytest.raises(ValueError, match=r"multiple of the 8 devices: found \[100\]"):
        with_memory(kind, few_classes, 100)
