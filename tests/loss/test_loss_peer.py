"""pytorch-metric-learning 2.9 next to ours: where it agrees, and each known difference.

PML's `RankedListLoss(margin, Tn, imbalance, alpha, Tp)` is our `margin`, `temperature_neg`,
`balance`, `alpha`, `temperature_pos`, with gallery_gradient=True and weight_gradient=True.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rll_jax import loss
from tests.helpers import oracle

torch = pytest.importorskip("torch", reason="needs torch and pytorch-metric-learning")
losses = pytest.importorskip(
    "pytorch_metric_learning.losses", reason="needs pytorch-metric-learning"
)

SAME = {"gallery_gradient": True, "weight_gradient": True}  # what it differentiates
PML = {"epsilon": 1e-5, "drop_zero": True, **SAME}  # what it does beside the paper's formula


def embeddings(n=48, dim=16, per_class=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim)), np.arange(n) // per_class


def pml(
    x,
    labels,
    dtype=torch.float64,
    temperature_pos=0.0,
    temperature_neg=10.0,
    alpha=1.2,
    margin=0.4,
    balance=0.5,
):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of the paper's T_n
        their_loss = losses.RankedListLoss(
            margin=margin, Tn=temperature_neg, imbalance=balance, alpha=alpha, Tp=temperature_pos
        )
    x = torch.tensor(np.asarray(x), dtype=dtype, requires_grad=True)
    value = their_loss(x, torch.as_tensor(np.asarray(labels)))
    value.backward()
    return value.item(), x.grad.double().numpy()


@functools.cache
def jitted(**options):
    return jax.jit(
        jax.value_and_grad(
            lambda x, labels, hyper: loss.ranked_list_loss(x, labels, **hyper, **options)
        )
    )


def ours(x, labels, hyper=None, **options):
    with jax.enable_x64(True):
        value, gradient = jitted(**options)(jnp.asarray(x, jnp.float64), labels, hyper or {})
    return float(value), np.asarray(gradient)


HYPERS = [
    {},
    {"temperature_neg": 2.0, "temperature_pos": 3.0, "balance": 0.3},
    {"alpha": 1.4, "margin": 0.2},
]


@pytest.mark.parametrize("hyper", HYPERS, ids=str)
def test_it_is_the_formula_with_its_two_changes(hyper):
    x, labels = embeddings()
    value, gradient = pml(x, labels, **hyper)
    expected = oracle.ranked_list_loss(x, labels, **hyper, **PML)
    np.testing.assert_allclose(value, expected.loss, rtol=1e-9)
    np.testing.assert_allclose(
        gradient, expected.gradient, atol=1e-9 * np.abs(expected.gradient).max()
    )


@pytest.mark.parametrize("hyper", HYPERS, ids=str)
def test_ours_agrees_but_for_its_epsilon(hyper):
    x, labels = embeddings()
    value, gradient = pml(x, labels, **hyper)
    actual, actual_gradient = ours(x, labels, hyper, **SAME)
    assert 0 < actual - value < 1e-3 * actual  # epsilon makes its sums of weights larger
    np.testing.assert_allclose(actual_gradient, gradient, atol=1e-3 * np.abs(gradient).max())
    clean = oracle.ranked_list_loss(x, labels, **hyper, **SAME)
    np.testing.assert_allclose(actual, clean.loss, rtol=1e-9)
    np.testing.assert_allclose(
        actual_gradient, clean.gradient, atol=1e-9 * np.abs(clean.gradient).max()
    )


def test_difference_its_epsilon_grows_with_the_batch():
    for n, low, high in ((180, 5e-4, 1.2e-3), (2048, 5e-3, 1.5e-2)):
        x, labels = embeddings(n, 128)
        actual, value = ours(x, labels)[0], pml(x, labels)[0]
        assert low < (actual - value) / actual < high
        # One positive per query and T_p = 0: L_P is too small by N * 1e-5, 2 % at N = 2048.
        x, labels = embeddings(n, 128, per_class=2)
        actual, value = ours(x, labels, {"balance": 0.0})[0], pml(x, labels, balance=0.0)[0]
        np.testing.assert_allclose((actual - value) / actual, n * 1e-5 / (1 + n * 1e-5), rtol=1e-6)


def test_difference_it_ignores_the_hardest_negative():
    # A copy in another class, at distance 0. Few rows: torch.cdist works by products for more than
    # 25, and misses the 0.
    x, labels = embeddings(12, 16)
    x[11] = x[0]
    with_copy, moved = pml(x, labels)[0], pml(x + 1e-6 * np.eye(12, 16)[::-1], labels)[0]
    actual, actual_moved = ours(x, labels)[0], ours(x + 1e-6 * np.eye(12, 16)[::-1], labels)[0]
    assert moved > 1.2 * with_copy
    np.testing.assert_allclose(actual, actual_moved, rtol=1e-4)
    collapsed = np.tile(x[:1], (12, 1))
    assert pml(collapsed, labels)[0] == 0 and ours(collapsed, labels)[0] == pytest.approx(0.6)


def test_difference_its_weights_are_differentiated():
    """At T = 10 in 8 dimensions it pulls most active negatives nearer; the published pushes all."""
    x, labels = embeddings(180, 8)
    x = oracle.unit(x)[0]
    d = np.linalg.norm(x[:, None] - x[None], axis=2)
    active = (labels[:, None] != labels[None]) & (d < 1.2)
    weight = np.where(active, np.exp(10 * (1.2 - d)), 0)
    weight /= weight.sum(1, keepdims=True)
    hinge = 1.2 - d
    slope = -weight * (
        1 + 10 * (hinge - (weight * hinge).sum(1, keepdims=True))
    )  # dL_N / dd of each pair
    pulled = (slope > 0)[active].mean()
    assert pulled > 0.7
    # That slope is its gradient, and ours with both switches.
    unit = (x[:, None] - x[None]) / np.where(d == 0, 1, d)[:, :, None]
    by_query = np.einsum("ij,ijk->ik", slope, unit) - np.einsum("ij,ijk->jk", slope, unit)
    expected = oracle.through_unit(x, by_query / 180)
    for gradient in (ours(x, labels, {"balance": 1.0}, **SAME)[1], pml(x, labels, balance=1.0)[1]):
        np.testing.assert_allclose(gradient, expected, atol=1e-3 * np.abs(expected).max())
    published = oracle.through_unit(x, np.einsum("ij,ijk->ik", -weight, unit) / 180)
    np.testing.assert_allclose(ours(x, labels, {"balance": 1.0})[1], published, atol=1e-9)
    assert np.abs(published - expected).max() > 0.1 * np.abs(published).max()


def test_difference_float16_overflows_at_the_papers_temperature():
    x, labels = embeddings(30, 16)
    x[29] = x[0] + 1e-2  # exp(10 * 1.2) is beyond 65504
    value, gradient = pml(x, labels, torch.float16)
    assert not np.isfinite(value) or not np.isfinite(gradient).all()
    actual, actual_gradient = jax.value_and_grad(loss.ranked_list_loss)(
        jnp.asarray(x, jnp.float16), labels
    )
    assert np.isfinite(actual) and np.isfinite(actual_gradient).all()
    np.testing.assert_allclose(actual, ours(x, labels)[0], rtol=1e-2)


def test_difference_it_warns_of_the_papers_temperature():
    with pytest.warns(UserWarning):
        losses.RankedListLoss(margin=0.4, Tn=10.0)
