"""Values and gradients against float64 loops, the authors' layers and hand arithmetic."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rll_jax import loss
from tests.helpers import oracle
from tests.helpers.loss_batches import HYPER, KINDS, M, N, batch, close, compiled
from tests.helpers.paths import SHARED

HYPERS = [
    HYPER,
    {**HYPER, "alpha": 1.4, "margin": 0.2, "temperature_pos": 5.0, "balance": 0.3},
    {**HYPER, "alpha": 2.0, "margin": 2.0, "temperature_pos": 200.0, "temperature_neg": 200.0},
    {**HYPER, "alpha": 0.8, "margin": 0.0, "temperature_neg": 0.0, "balance": 1.0},
]
VARIANTS = list(
    itertools.product(("distance", "squared"), ("uniform", "mass"), (False, True), (False, True))
)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_equals_the_loops_in_float64(variant):
    names = ("pair_term", "query_weighting", "gallery_gradient", "weight_gradient")
    options = dict(zip(names, variant, strict=True))
    with jax.enable_x64(True):
        run = compiled(block_size=8, **options)  # three blocks, the last one padded
        for kind, hyper in itertools.product(KINDS, HYPERS):
            x, labels, where = batch(kind)
            expected = oracle.ranked_list_loss(
                np.where(where[:, None], x, 0), labels, where=where, **hyper, **options
            )
            value, (gradient, _) = run(x, None, hyper, {"labels": labels, "where": where})
            assert value.dtype == gradient.dtype == jnp.float64
            # A scale for gradients that cancel: each query's is a sum of unit vectors of total
            # weight 1, over its raw length.
            close(value, expected.loss, 1e-9)
            scale = np.abs(expected.gradient).max() + 1e-4
            assert np.abs(gradient - expected.gradient).max() <= 1e-9 * scale, (kind, hyper)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[7], VARIANTS[10]], ids=str)
def test_gallery_equals_the_loops(variant):
    names = ("pair_term", "query_weighting", "gallery_gradient", "weight_gradient")
    options = dict(zip(names, variant, strict=True))
    x, labels, where = batch("masked")
    gallery, gallery_labels, gallery_where = batch("masked", seed=1, n=M)
    gallery[3], gallery_labels[3], gallery_where[3] = (
        x[where][0],
        99,
        True,
    )  # a query's copy of another class
    arrays = {"where": where, "gallery_labels": gallery_labels, "gallery_where": gallery_where}
    expected = oracle.ranked_list_loss(x, labels, gallery=gallery, **arrays, **HYPER, **options)
    with jax.enable_x64(True):
        value, gradients = compiled(**options)(x, gallery, HYPER, {"labels": labels, **arrays})
    close(value, expected.loss, 1e-9)
    close(gradients[0], expected.gradient, 1e-9)
    close(gradients[1], expected.gallery_gradient, 1e-9)
    assert variant[2] == bool(np.abs(gradients[1]).max() > 0)


def test_terms_equal_the_loops_and_sum_to_the_loss():
    x, labels, where = batch("masked")
    for weighting in ("uniform", "mass"):
        expected = oracle.ranked_list_loss(x, labels, where=where, query_weighting=weighting)
        with jax.enable_x64(True):
            terms = loss.ranked_list_loss_terms(
                jnp.asarray(x), labels, where=where, query_weighting=weighting, block_size=8
            )
        terms = jax.tree.map(np.asarray, terms)
        for name in terms._fields:
            close(getattr(terms, name), getattr(expected, name), 1e-9)
        assert terms.num_positives.dtype == terms.num_negatives.dtype == jnp.int32
        close(
            np.sum(np.asarray(terms.weight) * np.asarray(terms.positive + terms.negative)) / 2,
            expected.loss,
            1e-9,
        )


def test_terms_are_differentiable_one_by_one():
    x, labels, _ = batch("ragged")
    with jax.enable_x64(True):
        pull = jax.vjp(lambda x: loss.ranked_list_loss_terms(x, labels)[:2], jnp.asarray(x))[1]
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(2, N))
        actual = pull((a, b))[0]

        @jax.vmap
        @jax.grad
        def one(q, label, others, a, b):
            def term(balance):
                return loss.ranked_list_loss_of_query(
                    q, label, x, labels, balance=balance, where=others
                )

            return a * term(0.0) + b * term(1.0)

        close(actual, jax.jit(one)(x, labels, ~np.eye(N, dtype=bool), a, b), 1e-9)


def test_true_derivative_equals_finite_differences():
    x, labels, _ = batch("ragged")
    options = {
        "query_weighting": "mass",
        "gallery_gradient": True,
        "weight_gradient": True,
        "temperature_pos": 3.0,
    }
    with jax.enable_x64(True):
        batch_loss = jax.jit(lambda x: loss.ranked_list_loss(x, labels, **options))
        gradient = jax.grad(batch_loss)(jnp.asarray(x))
        step = np.random.default_rng(1).normal(size=x.shape)
        slope = (batch_loss(x + 1e-6 * step) - batch_loss(x - 1e-6 * step)) / 2e-6
    np.testing.assert_allclose(np.sum(np.asarray(gradient) * step), np.asarray(slope), rtol=1e-6)


def test_hand_arithmetic():
    # On the axes every distance is sqrt(2): beyond alpha = 1.2 for negatives, and beyond 0.8 for
    # positives.
    x, labels = jnp.eye(4), np.array([0, 0, 1, 1])
    np.testing.assert_allclose(loss.cvpr2019(x, labels), (2**0.5 - 0.8) / 2, rtol=1e-6)
    np.testing.assert_allclose(loss.caffe2019(x, labels), (2 - 0.8**2) / 4, rtol=1e-6)
    np.testing.assert_allclose(loss.tpami2020(x, labels, margin=0.2), (2**0.5 - 0.9) / 2, rtol=1e-6)
    np.testing.assert_allclose(
        loss.tpami2020(x, labels, margin=0.2, alpha=1.2), (2**0.5 - 1.0) / 2, rtol=1e-6
    )
    assert loss.cvpr2019(x, labels, alpha=2.0, margin=0.0) == pytest.approx((2 - 2**0.5) / 2)
    # Opposite points of two classes within alpha = 2: the hinge is 0 and so is the gradient's list.
    assert loss.ranked_list_loss(jnp.array([[1.0], [-1.0]]), np.arange(2), alpha=2.0) == 0


@pytest.mark.parametrize("layer", ["grad_2019", "grad_2020"])
def test_golden_gradients_of_the_authors_layers(layer):
    path = SHARED / "golden" / "rll_caffe.npz"
    if not path.exists():
        pytest.skip(f"no golden gradients at {path}")
    data = np.load(path)
    pair_term = {"grad_2019": "squared", "grad_2020": "distance"}[layer]
    with jax.enable_x64(True):
        run = compiled(pair_term=pair_term, query_weighting="mass", normalize=False)
        cases = json.loads(str(data["meta"]))
        assert len(cases) == 36
        for k, case in enumerate(cases):
            x, labels, expected = (data[f"{k}/{name}"] for name in ("embeddings", "labels", layer))
            n, dim = x.shape
            d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
            tolerance = 2e-6 + (2e-6 / d[d > 0].min() if layer == "grad_2020" else 0)
            # Padded to one shape: rows by `where`, dimensions by zeros, which change no distance.
            padded = np.pad(x, [(0, 90 - n), (0, 64 - dim)])
            alpha = case["alpha"] if layer == "grad_2019" else 1 + case["margin"] / 2
            hyper = {name: case[name] for name in ("margin", "temperature_pos", "temperature_neg")}
            arrays = {"labels": np.pad(labels, (0, 90 - n)), "where": np.arange(90) < n}
            _, (actual, _) = run(padded, None, {**hyper, "alpha": alpha, "balance": 0.5}, arrays)
            assert (
                np.abs(actual[:n, :dim] - expected).max() <= tolerance * np.abs(expected).max()
            ), case
            assert not actual[n:].any() and not actual[:, dim:].any()


@pytest.mark.parametrize(
    "options",
    [{}, {"pair_term": "squared"}, {"gallery_gradient": True, "weight_gradient": True}],
    ids=str,
)
def test_one_query_under_vmap_equals_the_fast_path(options):
    x, labels, where = batch("duplicates")
    with jax.enable_x64(True):

        @jax.jit
        @jax.value_and_grad
        def readable(x):
            def one(q, label, w):
                return loss.ranked_list_loss_of_query(q, label, x, labels, where=w, **options)

            return jnp.mean(jax.vmap(one)(x, labels, ~np.eye(N, dtype=bool)))

        value, gradient = readable(x)
        fast, (fast_gradient, _) = compiled(block_size=8, **options)(
            x, None, HYPER, {"labels": labels, "where": where}
        )
    close(fast, value, 1e-12)
    close(fast_gradient, gradient, 1e-9)


def test_block_sizes_agree():
    x, labels, where = batch("masked")
    with jax.enable_x64(True):
        results = [
            compiled(block_size=size, query_weighting="mass")(
                x, None, HYPER, {"labels": labels, "where": where}
            )
            for size in (1, 8, None, 100)
        ]
    for value, (gradient, _) in results[1:]:
        close(value, results[0][0], 1e-12)
        close(gradient, results[0][1][0], 1e-12)
