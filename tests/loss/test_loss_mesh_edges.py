"""On meshes of eight devices: odd numbers of rows, vmap, arguments by name, and no compiling again.

`test_loss_meshes.py` has the values and the work of plain jit.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from rll_jax import loss

DEVICES, N, D = 8, 64, 16
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.fixture(scope="module")
def eight():
    if jax.device_count() < DEVICES:
        pytest.skip(f"needs {DEVICES} devices, found {jax.device_count()}: JAX_NUM_CPU_DEVICES=8")


def data(n=N):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, D)).astype(np.float32), np.arange(n) // 3


def on_mesh(kind, x, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(KINDS[kind],) * 2)
    return jax.device_put(x, NamedSharding(mesh, spec))


def check(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("n", [3, 61])
def test_terms_of_any_number_of_rows(kind, compiled, n):
    x, labels = data(n)

    def terms(x):
        return loss.ranked_list_loss_terms(x, labels)

    actual = (jax.jit(terms) if compiled else terms)(on_mesh(kind, x, P()))
    assert all(column.shape == (n,) for column in actual)
    check(actual, terms(x))


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_batches_and_over_numbers(kind):
    x, labels = data()
    batches, alphas = np.stack([x, x**3]), np.float32([0.8, 1.2])

    def step(x, alpha):
        return jax.value_and_grad(loss.ranked_list_loss)(x, labels, alpha=alpha)

    by_number = jax.vmap(step, in_axes=(None, 0))
    check(jax.jit(by_number)(on_mesh(kind, x, P("a")), alphas), by_number(x, alphas))
    by_batch = jax.vmap(step, in_axes=(0, None))
    rows = on_mesh(kind, batches, P(None, "a"))
    check(jax.jit(by_batch)(rows, 1.2), by_batch(batches, 1.2))


@pytest.mark.usefixtures("eight")
def test_vmap_within_shard_map():
    x, labels = data()
    mesh = jax.make_mesh((DEVICES,), ("a",), axis_types=(AxisType.Auto,))
    alphas = jnp.float32([0.8, 1.2])

    def of_device(x, labels):
        by_number = jax.vmap(
            lambda alpha: loss.ranked_list_loss(x, labels, alpha=alpha, axis_name="a")
        )
        return jax.lax.pmean(by_number(alphas), "a")

    mapped = jax.shard_map(of_device, mesh=mesh, in_specs=(P("a"), P("a")), out_specs=P())
    expected = [loss.ranked_list_loss(x, labels, alpha=alpha) for alpha in alphas]
    check(mapped(x, labels), np.stack(expected))


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gallery_on_a_mesh_of_queries_that_are_on_none(kind):
    x, labels = data()
    bank, bank_labels = data(56)
    ranked = functools.partial(
        loss.two_tower_ranked_list_loss, labels_a=labels, labels_b=bank_labels
    )
    check(jax.jit(ranked)(x, on_mesh(kind, bank, P(("a", "b")))), ranked(x, bank))


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("kind", KINDS)
def test_baselines_take_embeddings_by_name(kind):
    x, labels = data()

    def by_name(x):
        return loss.contrastive_loss(labels=labels, embeddings=x, neg_margin=1.2)

    check(jax.jit(by_name)(on_mesh(kind, x, P("a"))), by_name(x))


@pytest.mark.parametrize(
    "batch_loss", [loss.ranked_list_loss, loss.ranked_list_loss_terms, loss.contrastive_loss]
)
def test_a_second_call_outside_jit_compiles_nothing(batch_loss, caplog):
    x, labels = data()
    jax.block_until_ready(batch_loss(x, labels))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        batch_loss(x, labels)
    assert not [message for message in caplog.messages if "XLA compilation" in message]
