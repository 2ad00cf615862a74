"""The cross-batch memory against a list that keeps the last rows."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from rll_jax import loss
from rll_jax.loss import memory
from tests.helpers import oracle

CAPACITY, DIM = 7, 3


def rows(k, n):
    return np.random.default_rng(k).normal(size=(n, DIM)).astype(np.float32), np.arange(n) + 100 * k


def same(bank, kept):
    """The bank holds the rows of `kept`, oldest first, from the cursor on."""
    order = (int(bank.cursor) + np.arange(CAPACITY)) % CAPACITY
    order = order[np.asarray(bank.valid)[order]]
    np.testing.assert_array_equal(np.asarray(bank.labels)[order], [label for _, label in kept])
    np.testing.assert_array_equal(
        np.asarray(bank.embeddings)[order], np.array([x for x, _ in kept]).reshape(-1, DIM)
    )


@pytest.mark.parametrize("n", [1, 3, 7, 16])
def test_keeps_the_last_rows_in_ring_order(n):
    push = jax.jit(lambda *args: memory.push(*args), donate_argnums=0)
    bank, kept = memory.init(CAPACITY, DIM), []
    same(bank, kept)
    for k in range(6):
        x, labels = rows(k, n)
        bank = push(bank, x, labels)
        kept = (kept + list(zip(x, labels, strict=True)))[-CAPACITY:]
        same(bank, kept)
    assert push._cache_size() == 1


def test_masked_rows_are_not_stored():
    push, bank, kept = jax.jit(memory.push), memory.init(CAPACITY, DIM), []
    for k in range(6):
        x, labels = rows(k, 10)
        where = np.random.default_rng(k).random(10) < (0.0, 0.3, 1.0)[k % 3]
        bank = push(bank, np.where(where[:, None], x, np.nan), labels, where)
        kept = (kept + [(a, b) for a, b, w in zip(x, labels, where, strict=True) if w])[-CAPACITY:]
        same(bank, kept)


def test_is_a_gallery():
    bank = memory.push(memory.init(CAPACITY, DIM), *rows(0, 4))  # three places are empty
    x, labels = rows(1, 6)
    labels = labels % 4

    @jax.jit
    @jax.value_and_grad
    def batch_loss(x, bank):
        bank = bank._replace(labels=bank.labels % 4)
        return loss.ranked_list_loss(
            x, labels, gallery=bank.embeddings, gallery_labels=bank.labels, gallery_where=bank.valid
        )

    value, gradient = batch_loss(jnp.asarray(x), bank)
    expected = oracle.ranked_list_loss(
        x, labels, gallery=rows(0, 4)[0], gallery_labels=rows(0, 4)[1] % 4
    )
    np.testing.assert_allclose(value, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected.gradient, atol=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "mass"])
def test_empty_memory_gives_no_loss(weighting):
    bank = memory.init(CAPACITY, DIM)
    gallery = {
        "gallery": bank.embeddings,
        "gallery_labels": bank.labels,
        "gallery_where": bank.valid,
    }

    @jax.jit
    @jax.value_and_grad
    def batch_loss(x):
        return loss.ranked_list_loss(x, np.arange(4), query_weighting=weighting, **gallery)

    value, gradient = batch_loss(rows(0, 4)[0])
    assert value == 0 and not gradient.any()


def test_under_scan_without_gradient():
    xs, labels = (np.stack(a) for a in zip(*(rows(k, 4) for k in range(5)), strict=True))

    def batch_loss(scale):
        def step(bank, batch):
            bank = memory.push(bank, batch[0] * scale, batch[1])
            return bank, jnp.sum(bank.embeddings)

        return jnp.sum(jax.lax.scan(step, memory.init(CAPACITY, DIM), (xs, labels))[1])

    assert jax.grad(batch_loss)(2.0) == 0  # what is stored is a constant


def test_stored_rows_carry_a_gradient_where_that_is_asked_for():
    x, labels = rows(1, 6)
    bank = memory.push(memory.init(CAPACITY, DIM), *rows(0, 4))

    def sum_of_squares(x):
        return jnp.sum(memory.push(bank, x, labels, constant=False).embeddings ** 2)

    np.testing.assert_allclose(jax.grad(sum_of_squares)(x), 2 * x)


def test_dtypes_are_kept():
    bank = memory.init(CAPACITY, DIM, jnp.bfloat16, jnp.int16)
    bank = memory.push(bank, *rows(0, 4))
    assert bank.embeddings.dtype == jnp.bfloat16 and bank.labels.dtype == jnp.int16


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: memory.init(0, 3), "capacity and dim must be at least 1: found 0 and 3"),
        (
            lambda: memory.push(memory.init(4, 3), jnp.ones((2, 5)), jnp.arange(2)),
            r"embeddings must be \(N, 3\).*found shape \(2, 5\)",
        ),
        (
            lambda: memory.push(memory.init(4, 3), jnp.ones((2, 3)), jnp.arange(3)),
            r"labels must go with embeddings: found shape \(3,\)",
        ),
        (
            lambda: memory.push(
                memory.init(4, 3), jnp.ones((2, 3)), jnp.arange(2), jnp.ones(3, bool)
            ),
            r"where must go with embeddings",
        ),
    ],
    ids=["init", "embeddings", "labels", "where"],
)
def test_bad_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: memory.init(4, 2, label_dtype=jnp.float32),
            TypeError,
            "label_dtype must be an integer dtype: found float32",
        ),
        (
            lambda: push(jnp.ones((2, 2)), jnp.ones(2)),
            TypeError,
            "labels must be integers: use numpy.unique.*float32",
        ),
        (
            lambda: push(jnp.ones((2, 2)), np.array([2**32 + 1, 1])),
            ValueError,
            "labels must fit int32",
        ),
        (
            lambda: push(jnp.ones((2, 2)), jnp.arange(2), jnp.array([2, 0])),
            TypeError,
            "where must be bool: found int32",
        ),
        (lambda: push(jnp.ones((0, 2)), jnp.arange(0)), ValueError, "embeddings must not be empty"),
        (
            lambda: memory.push(
                memory.init(4, 2, label_dtype=jnp.int8), jnp.ones((1, 2)), np.array([300])
            ),
            ValueError,
            "fit the memory's int8",
        ),
    ],
)
def test_rows_that_cannot_be_kept(call, error, message):
    with pytest.raises(error, match=message):
        call()


def push(*rows):
    return memory.push(memory.init(4, 2), *rows)


@pytest.mark.parametrize("spec", [None, P(), P("data")], ids=["elsewhere", "whole", "divided"])
def test_rows_on_a_mesh_of_explicit_axes(spec):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: JAX_NUM_CPU_DEVICES=8")
    mesh = jax.make_mesh(
        (8,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:8]
    )
    x, labels, where = jnp.arange(48.0).reshape(16, 3), jnp.arange(16), jnp.arange(16) % 3 > 0
    bank = memory.push(memory.init(24, 3), -x, labels)
    expected = jax.jit(memory.push)(bank, x, labels, where)
    if spec is not None:
        bank = memory.CrossBatchMemory(
            *(jax.device_put(a, NamedSharding(mesh, spec if a.ndim else P())) for a in bank)
        )
    lying = jax.device_put((x, labels, where), NamedSharding(mesh, P("data")))
    actual = jax.jit(memory.push)(bank, *lying)
    for found, right in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(found, right)
