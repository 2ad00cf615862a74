"""What holds for any batch, and under JAX's transformations."""

import functools
import itertools
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rll_jax import loss
from tests.helpers import oracle
from tests.helpers.loss_batches import HYPER, D, M, N, batch, close, compiled

seeds = st.integers(0, 10_000)
hypers = st.fixed_dictionaries(
    {
        "alpha": st.floats(0.5, 2.0),
        "margin": st.floats(0.0, 0.5),
        "temperature_pos": st.floats(0.0, 20.0),
        "temperature_neg": st.floats(0.0, 20.0),
        "balance": st.floats(0.0, 1.0),
    }
)
weightings = st.sampled_from(["uniform", "mass"])
checked = settings(max_examples=25, derandomize=True, deadline=None)


def run(x, labels, where=None, hyper=HYPER, **options):
    where = np.ones(N, bool) if where is None else where
    with jax.enable_x64(True):
        value, (gradient, _) = compiled(**options)(
            x, None, hyper, {"labels": labels, "where": where}
        )
    return np.asarray(value), np.asarray(gradient)


@checked
@given(seeds, hypers, weightings)
def test_order_names_and_rotation_do_not_matter(seed, hyper, weighting):
    rng = np.random.default_rng(seed)
    x, labels, where = batch("masked", seed)
    value, gradient = run(x, labels, where, hyper, query_weighting=weighting)
    order = rng.permutation(N)
    permuted, permuted_gradient = run(
        x[order], labels[order], where[order], hyper, query_weighting=weighting
    )
    close(permuted, value, 1e-9)
    close(permuted_gradient, gradient[order], 1e-9)
    names = rng.permutation(50)[:6] * 1000 - 7
    close(run(x, names[labels], where, hyper, query_weighting=weighting)[0], value, 1e-12)
    turn = np.linalg.qr(rng.normal(size=(D, D)))[0]
    rotated, rotated_gradient = run(x @ turn, labels, where, hyper, query_weighting=weighting)
    close(rotated, value, 1e-8)
    close(rotated_gradient, gradient @ turn, 1e-6)


@checked
@given(seeds, hypers, weightings)
def test_balance_is_linear_and_the_loss_not_negative(seed, hyper, weighting):
    x, labels, where = batch("ragged", seed)
    positive, negative, mixed = (
        run(x, labels, where, {**hyper, "balance": balance}, query_weighting=weighting)[0]
        for balance in (0.0, 1.0, hyper["balance"])
    )
    assert positive >= 0 and negative >= 0
    close(mixed, (1 - hyper["balance"]) * positive + hyper["balance"] * negative, 1e-9, scale=1e-3)


@checked
@given(seeds, hypers)
def test_zero_without_non_trivial_examples_alone(seed, hyper):
    x, labels, where = batch("ragged", seed)
    hyper = {**hyper, "balance": 0.5}
    with jax.enable_x64(True):
        terms = jitted_terms()(x, labels, hyper)
        some = np.asarray(terms.num_positives + terms.num_negatives) > 0
    assert (run(x, labels, where, hyper)[0] > 0) == some.any()
    np.testing.assert_array_equal(np.asarray(terms.positive + terms.negative) > 0, some)


@functools.cache
def jitted_terms():
    return jax.jit(lambda x, labels, hyper: loss.ranked_list_loss_terms(x, labels, **hyper))


@pytest.mark.parametrize("weighting", ["uniform", "mass"])
def test_a_mask_is_a_deletion(weighting):
    x, labels, where = batch("masked")
    for filler in (np.nan, np.inf, 0.0, x[where][0]):
        filled = np.where(where[:, None], x, filler)
        value, gradient = run(filled, labels, where, query_weighting=weighting)
        with jax.enable_x64(True):
            short = jax.value_and_grad(
                lambda x: loss.ranked_list_loss(x, labels[where], query_weighting=weighting)
            )
            kept, kept_gradient = short(jnp.asarray(x[where]))
        close(value, kept, 1e-12)
        close(gradient[where], kept_gradient, 1e-9)
        assert not gradient[~where].any()


def test_the_batch_as_its_own_gallery():
    # Pairs with oneself are at distance 0 of the own class: trivial.
    x, labels, _ = batch("ragged")
    with jax.enable_x64(True):
        arrays = {"labels": labels, "gallery_labels": labels}
        value, (on_query, on_gallery) = compiled(gallery_gradient=True)(x, x, HYPER, arrays)
    expected, gradient = run(x, labels, gallery_gradient=True)
    close(value, expected, 1e-12)
    close(on_query + on_gallery, gradient, 1e-9)
    with jax.enable_x64(True):
        fixed = compiled()(x, x, HYPER, arrays)[1]
    close(fixed[0], on_query, 1e-12)
    assert not fixed[1].any()


@pytest.mark.parametrize(
    "options",
    [{}, {"gallery_gradient": True, "query_weighting": "mass", "weight_gradient": True}],
    ids=str,
)
def test_vmap_over_a_stack_and_scan(options):
    stack = np.stack([batch(kind)[0] for kind in ("ragged", "near", "duplicates")])
    labels = batch("ragged")[1]
    each = [run(x, labels, block_size=8, **options) for x in stack]
    with jax.enable_x64(True):
        batch_loss = jax.value_and_grad(
            lambda x: loss.ranked_list_loss(x, labels, block_size=8, **options)
        )
        mapped = jax.jit(jax.vmap(batch_loss))(stack)
        scanned = jax.lax.scan(lambda c, x: (c, batch_loss(x)), 0, stack)[1]
        temperatures = jax.vmap(
            lambda t: loss.ranked_list_loss(stack[0], labels, temperature_neg=t)
        )(jnp.array([0.0, 10.0]))
    for actual in (mapped, scanned):
        close(actual[0], [v for v, _ in each], 1e-12)
        close(actual[1], [g for _, g in each], 1e-9)
    close(temperatures[1], run(stack[0], labels)[0], 1e-12)
    assert temperatures[0] != temperatures[1]


def test_a_schedule_does_not_recompile():
    traces = []

    @jax.jit
    @jax.grad
    def gradient(x, hyper):
        traces.append(1)
        return loss.ranked_list_loss(x, batch("ragged")[1], **hyper)

    x = jnp.asarray(batch("ragged")[0], jnp.float32)
    actual = [
        gradient(x, {**HYPER, name: value})
        for name, value in (("margin", 0.1), ("margin", 0.3), ("alpha", 1.0), ("balance", 0.9))
    ]
    assert len(traces) == 1
    assert all((a != b).any() for a, b in itertools.pairwise(actual))


def test_no_matrix_of_all_pairs_with_blocks():
    n = 2048
    batch_loss = jax.jit(
        jax.value_and_grad(lambda x: loss.ranked_list_loss(x, np.arange(n) // 3, block_size=64))
    )
    memory = batch_loss.lower(jax.ShapeDtypeStruct((n, 8), jnp.float32)).compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes < 4 * n * n / 2


@pytest.mark.parametrize(
    "name, other",
    [
        ("alpha", 1.0),
        ("margin", 0.1),
        ("temperature_pos", 5.0),
        ("temperature_neg", 1.0),
        ("balance", 0.1),
        ("pair_term", "squared"),
        ("query_weighting", "mass"),
        ("gallery_gradient", True),
        ("weight_gradient", True),
        ("normalize", False),
    ],
)
def test_every_option_changes_the_gradient(name, other):
    x, labels, _ = batch("ragged")
    hyper = {**HYPER, name: other} if name in HYPER else HYPER
    options = {} if name in HYPER else {name: other}
    assert np.abs(run(x, labels, None, hyper, **options)[1] - run(x, labels)[1]).max() > 1e-4


def test_recipes():
    x, labels, _ = batch("ragged")
    recipes = {
        loss.cvpr2019: {},
        loss.caffe2019: {"pair_term": "squared", "query_weighting": "mass"},
        loss.tpami2020: {"query_weighting": "mass"},  # margin 0.4: alpha = 1.2
    }
    with jax.enable_x64(True):
        for recipe, options in recipes.items():
            close(
                recipe(jnp.asarray(x), labels),
                oracle.ranked_list_loss(x, labels, **options).loss,
                1e-9,
            )
            changed = {"margin": 0.2, "temperature_neg": 3.0}
            alpha = 1.1 if recipe is loss.tpami2020 else 1.2
            expected = oracle.ranked_list_loss(x, labels, alpha=alpha, **changed, **options).loss
            close(recipe(jnp.asarray(x), labels, **changed), expected, 1e-9)


def test_importing_the_loss_imports_jax_and_numpy_alone():
    code = """
import sys, jax, numpy
import jax.numpy, jax.lax
before = {name.partition('.')[0] for name in sys.modules}
import rll_jax.loss, rll_jax.loss.memory
print(sorted({name.partition('.')[0] for name in sys.modules} - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['rll_jax']"


def test_shapes():
    assert (
        jax.eval_shape(loss.ranked_list_loss, np.ones((N, D), np.float32), np.arange(N)).shape == ()
    )
    terms = loss.ranked_list_loss_terms(
        np.ones((N, D), np.float32),
        np.arange(N),
        gallery=np.ones((M, D)),
        gallery_labels=np.arange(M),
    )
    assert {x.shape for x in terms} == {(N,)}
