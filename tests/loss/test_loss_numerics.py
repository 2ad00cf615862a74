"""Floating point: dtypes, tiny distances, duplicates, extreme temperatures and lengths, NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rll_jax import loss
from tests.helpers import oracle
from tests.helpers.loss_batches import HYPER, KINDS, batch, compiled


def run(x, labels, dtype=jnp.float32, where=None, block_size=None, normalize=True, **changes):
    where = np.ones(len(x), bool) if where is None else where
    options = {k: changes.pop(k) for k in tuple(changes) if k not in HYPER}
    call = compiled(block_size=block_size, normalize=normalize, **options)
    value, (gradient, _) = call(
        jnp.asarray(x, dtype), None, {**HYPER, **changes}, {"labels": labels, "where": where}
    )
    return value, gradient


@pytest.mark.parametrize("kind", ["ragged", "collapsed classes", "masked", "zeros"])
def test_float32_within_1e_5_of_float64(kind):
    x, labels, where = batch(kind)
    x = np.where(where[:, None], x, 0).astype(np.float32).astype(np.float64)
    expected = oracle.ranked_list_loss(x, labels, where=where)
    value, gradient = run(x, labels, where=where)
    assert value.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(value, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(
        gradient, expected.gradient, atol=1e-5 * np.abs(expected.gradient).max()
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
def test_half_precision_is_worked_on_in_float32(dtype):
    x, labels, _ = batch("ragged")
    x = jnp.asarray(x, dtype)
    value, gradient = run(x, labels, dtype)
    exact, exact_gradient = run(x, labels)  # the same rounded embeddings
    assert value.dtype == jnp.float32 and gradient.dtype == dtype
    assert value == exact
    np.testing.assert_allclose(
        np.asarray(gradient, np.float32), exact_gradient, rtol=1e-2, atol=1e-6
    )
    unrounded = oracle.ranked_list_loss(*batch("ragged")[:2]).loss
    np.testing.assert_allclose(value, unrounded, rtol=1e-2)


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_tiny_distances_are_right_to_a_percent(distance, offset):
    # One pair of two classes, far from the origin, among others: the negative term is alpha - d.
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(12, 64)) + offset).astype(np.float32)
    step = rng.normal(size=64)
    x[1] = x[0] + distance * step / np.linalg.norm(step)
    true = np.linalg.norm(x[1].astype(np.float64) - x[0].astype(np.float64))
    alpha = 2 * distance  # no other pair is within it
    terms = loss.ranked_list_loss_terms(
        jnp.asarray(x), np.arange(12), alpha=alpha, margin=0.0, normalize=False
    )
    np.testing.assert_allclose(alpha - terms.negative[:2], true, rtol=1e-2)
    np.testing.assert_allclose(alpha - terms.negative[:2], true, rtol=1e-5)
    assert list(terms.num_negatives) == [1, 1] + 10 * [0]
    value, gradient = run(x, np.arange(12), alpha=alpha, margin=0.0, normalize=False, balance=1.0)
    np.testing.assert_allclose(
        gradient[0] * 12, (x[1] - x[0]) / true, atol=1e-5
    )  # the unit vector, exactly


def test_exact_duplicates_are_at_distance_0():
    rng = np.random.default_rng(0)
    x = np.tile(rng.normal(size=(10, 33)), (3, 1)).astype(np.float32)
    labels = np.arange(30)  # all copies are of other classes: the hardest negatives
    terms = loss.ranked_list_loss_terms(jnp.asarray(x), labels, temperature_neg=200.0)
    np.testing.assert_array_equal(terms.negative, np.float32(1.2))
    _, gradient = run(x, labels, temperature_neg=200.0, query_weighting="mass")
    assert not gradient.any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_and_below_their_weights(kind):
    x, labels, where = batch(kind)
    for temperature in (0.0, 10.0, 200.0):
        for pair_term in ("distance", "squared"):
            hyper = {
                "alpha": 2.0,
                "margin": 2.0,
                "temperature_pos": temperature,
                "temperature_neg": temperature,
            }
            value, gradient = run(x, labels, where=where, pair_term=pair_term, **hyper)
            assert np.isfinite(value) and np.isfinite(gradient).all()
            clean = np.where(where[:, None], x, 0)
            clean = oracle.unit(clean)[0]
            _, gradient = run(
                clean, labels, where=where, pair_term=pair_term, normalize=False, **hyper
            )
            # At most balance for each of the two lists, times 2 (the largest distance) for the
            # squared term, over the queries.
            limit = (1 if pair_term == "distance" else 2) / max(where.sum(), 1)
            assert np.linalg.norm(gradient, axis=1).max() <= limit * (1 + 1e-5)


def test_collapsed_batch():
    for n in (6, 21):
        x, labels = (
            np.tile(np.random.default_rng(0).normal(size=(1, 40)), (n, 1)),
            np.arange(n) // 3,
        )
        value, gradient = run(x, labels)
        np.testing.assert_allclose(
            value, 0.5 * 1.2, rtol=1e-6
        )  # every negative is at distance 0, every positive trivial
        assert not gradient.any()  # no pair has a direction
        # The smallest noise gives all pairs one.
        _, gradient = run(
            x + 1e-5 * np.random.default_rng(1).normal(size=x.shape), labels, normalize=False
        )
        assert np.linalg.norm(gradient, axis=1).min() > 0.01 / n


@pytest.mark.parametrize("scale", [1e-11, 1e-5, 1.0, 1e5, 1e26, 3e37])
def test_any_length_gives_the_same_loss(scale):
    x, labels, _ = batch("ragged")
    value, gradient = run(x * scale, labels)
    exact, exact_gradient = run(x, labels)
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    if 1e-30 < 1 / scale < 1e30:
        np.testing.assert_allclose(
            gradient * scale, exact_gradient, rtol=1e-3, atol=1e-5 * np.abs(exact_gradient).max()
        )
    assert np.isfinite(gradient).all()


def test_zero_vectors_get_no_gradient():
    x, labels, _ = batch("zeros")
    x[4] = 1e-14
    value, gradient = run(x, labels)
    assert not gradient[::4].any() and gradient[1].any() and value > 0


@pytest.mark.parametrize("weighting, block_size", [("uniform", None), ("mass", 8)])
def test_nan_is_not_hidden(weighting, block_size):
    x, labels, where = batch("ragged")
    x[5, 2] = np.nan
    value, gradient = run(x, labels, query_weighting=weighting, block_size=block_size)
    assert np.isnan(value) and np.isnan(gradient).any()
    value, gradient = run(
        x, labels, query_weighting=weighting, gallery_gradient=True, block_size=block_size
    )
    assert np.isnan(value) and np.isnan(gradient).any()
    where[5] = False
    value, gradient = run(x, labels, where=where, query_weighting=weighting, block_size=block_size)
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[5].any()


def test_nan_is_not_hidden_by_a_maximum_over_many():
    # XLA's maximum over an axis on the CPU drops NaN from a few hundred numbers on.
    x = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    x[7, 3] = np.nan
    labels = np.arange(300) // 3

    def sum_of_negative_terms(x, labels):
        return jnp.sum(loss.ranked_list_loss_terms(x, labels).negative)

    for function in (loss.ranked_list_loss, sum_of_negative_terms):
        value, gradient = jax.jit(jax.value_and_grad(function))(x, labels)
        assert np.isnan(value) and np.isnan(gradient).any()
        assert np.isnan(jax.jit(function)(x, labels))


@functools.cache
def clustered():
    """Two classes on a few lines, where differentiated weights pull negatives nearer."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 8)), np.arange(60) // 3


def test_constant_weights_push_every_active_negative_away():
    x, labels = clustered()
    x = oracle.unit(x)[0]

    def loss_of_first(gallery, weight_gradient):
        return loss.ranked_list_loss_of_query(
            jnp.asarray(x[0]),
            0,
            gallery,
            labels,
            balance=1.0,
            gallery_gradient=True,
            weight_gradient=weight_gradient,
            normalize=False,
            where=np.arange(60) != 0,
        )

    with jax.enable_x64(True):
        for differentiated, pulled in ((False, False), (True, True)):
            _, gradient = run(
                x, labels, jnp.float64, balance=1.0, normalize=False, weight_gradient=differentiated
            )
            # One query against one far active negative: the sign of dL/dd.
            one = jax.grad(loss_of_first)(jnp.asarray(x), differentiated)
            active = (np.linalg.norm(x - x[0], axis=1) < 1.2) & (labels != 0)
            # Descent moves the negative away.
            outward = np.sum(np.asarray(one) * (x - x[0]), axis=1)[active] < 0
            assert outward.all() != pulled
            assert np.isfinite(gradient).all()
