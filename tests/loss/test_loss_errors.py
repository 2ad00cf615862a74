"""Bad input: one case for each message, raised while tracing, with found and expected."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rll_jax import loss

X, Y, MASK = jnp.ones((6, 3)), jnp.arange(6), jnp.ones(6, bool)
GALLERY = {"gallery": jnp.ones((4, 3)), "gallery_labels": jnp.arange(4)}

CASES = [
    (
        (X[0], Y),
        {},
        ValueError,
        r"embeddings must be 2-dimensional: found shape \(3,\), expected \(N, D\)",
    ),
    (
        (X[:0], Y[:0]),
        {},
        ValueError,
        r"embeddings must not be empty: found shape \(0, 3\), expected N >= 1",
    ),
    ((X[:, :0], Y), {}, ValueError, r"embeddings must not be empty: found shape \(6, 0\)"),
    ((X.astype(int), Y), {}, TypeError, "embeddings must be floating: found int32"),
    (([[1.0]], Y), {}, TypeError, "embeddings must be an array: found list"),
    ((X, [0] * 6), {}, TypeError, "labels must be an array: found list"),
    (
        (X, Y[:5]),
        {},
        ValueError,
        r"labels must go with embeddings: found shape \(5,\), expected \(6,\)",
    ),
    ((X, Y[:, None]), {}, ValueError, r"labels must go with embeddings: found shape \(6, 1\)"),
    (
        (X, Y.astype(float)),
        {},
        TypeError,
        "labels must be integers: use numpy.unique.*float32",
    ),
    (
        (X, np.arange(6) + 2**33),
        {},
        ValueError,
        "labels must fit int32 .*: found 8589934592 to 8589934597",
    ),
    ((X, Y), {"where": Y}, TypeError, "where must be bool: found int32"),
    (
        (X, Y),
        {"where": MASK[:3]},
        ValueError,
        r"where must go with embeddings: found shape \(3,\), expected \(6,\)",
    ),
    (
        (X, Y),
        {"alpha": 0.0, "margin": 0.0},
        ValueError,
        "alpha out of range: found 0.0, expected 0 < alpha <= 2",
    ),
    ((X, Y), {"alpha": 2.5}, ValueError, "alpha out of range: found 2.5"),
    ((X, Y), {"alpha": np.float32("nan")}, ValueError, "alpha out of range: found nan"),
    ((X, Y), {"alpha": jnp.ones(3)}, ValueError, r"alpha must be a scalar: found shape \(3,\)"),
    (
        (X, Y),
        {"alpha": None},
        TypeError,
        "alpha must be a real number: found NoneType, expected 0 < alpha <= 2",
    ),
    ((X, Y), {"balance": "0.5"}, TypeError, "balance must be a real number: found str"),
    ((X, Y), {"margin": True}, TypeError, "margin must be a real number: found bool"),
    (
        (X, Y),
        {"temperature_neg": np.inf},
        ValueError,
        "temperature_neg out of range: found inf, expected .* at most 1e30",
    ),
    (
        (X, Y),
        {"margin": -0.1},
        ValueError,
        "margin out of range: found -0.1, expected 0 <= margin <= alpha = 1.2",
    ),
    (
        (X, Y),
        {"margin": 1.3},
        ValueError,
        "margin out of range: found 1.3, expected 0 <= margin <= alpha = 1.2",
    ),
    (
        (X, Y),
        {"balance": 1.01},
        ValueError,
        "balance out of range: found 1.01, expected 0 <= balance <= 1",
    ),
    ((X, Y), {"balance": -1}, ValueError, "balance out of range: found -1"),
    (
        (X, Y),
        {"temperature_pos": -1.0},
        ValueError,
        "temperature_pos out of range: found -1.0, expected temperature_pos >= 0",
    ),
    (
        (X, Y),
        {"temperature_neg": -1.0},
        ValueError,
        "temperature_neg out of range: found -1.0, expected temperature_neg >= 0",
    ),
    (
        (X, Y),
        {"pair_term": "cosine"},
        ValueError,
        "pair_term: found 'cosine', expected 'distance' or 'squared'",
    ),
    (
        (X, Y),
        {"query_weighting": "max"},
        ValueError,
        "query_weighting: found 'max', expected 'uniform' or 'mass'",
    ),
    ((X, Y), {"gather": "rign"}, ValueError, "gather: found 'rign', expected 'all' or 'ring'"),
    (
        (X, Y),
        {"block_size": 0},
        ValueError,
        "block_size out of range: found 0, expected block_size >= 1",
    ),
    ((X, Y), {"block_size": 2.0}, TypeError, "block_size must be an integer: found float"),
    (
        (X, Y),
        {"gallery": GALLERY["gallery"]},
        ValueError,
        "a gallery needs gallery_labels: found gallery_labels=None",
    ),
    (
        (X, Y),
        {"gallery_labels": Y},
        ValueError,
        "gallery_labels and gallery_where need a gallery: found gallery=None",
    ),
    (
        (X, Y),
        {"gallery_where": MASK},
        ValueError,
        "gallery_labels and gallery_where need a gallery: found gallery=None",
    ),
    (
        (X, Y),
        {**GALLERY, "gallery": jnp.ones((4, 2))},
        ValueError,
        "the same dimension: found 2, expected 3",
    ),
    (
        (X, Y),
        {**GALLERY, "gallery": jnp.ones(4)},
        ValueError,
        r"gallery must be 2-dimensional: found shape \(4,\)",
    ),
    ((X, Y), {**GALLERY, "gallery": jnp.ones((0, 3))}, ValueError, "gallery must not be empty"),
    (
        (X, Y),
        {**GALLERY, "gallery": jnp.ones((4, 3), int)},
        TypeError,
        "gallery must be floating: found int32",
    ),
    (
        (X, Y),
        {**GALLERY, "gallery_labels": jnp.ones(4)},
        TypeError,
        "gallery_labels must be integers: use numpy.unique.*float32",
    ),
    (
        (X, Y),
        {**GALLERY, "gallery_labels": jnp.arange(4, dtype=jnp.uint32)},
        TypeError,
        "share a dtype: found int32 and uint32",
    ),
    (
        (X, Y),
        {**GALLERY, "gallery_labels": Y},
        ValueError,
        r"gallery_labels must go with gallery: found shape \(6,\), expected \(4,\)",
    ),
    (
        (X, Y),
        {**GALLERY, "gallery_where": MASK},
        ValueError,
        r"gallery_where must go with gallery: found shape \(6,\)",
    ),
    (
        (X, Y),
        {**GALLERY, "gallery_where": jnp.ones(4)},
        TypeError,
        "gallery_where must be bool: found float32",
    ),
]


@pytest.mark.parametrize("args, options, error, message", CASES, ids=[c[3][:50] for c in CASES])
def test_message(args, options, error, message):
    for call in (loss.ranked_list_loss, loss.ranked_list_loss_terms):
        with pytest.raises(error, match=message):
            call(*args, **options)


def test_margin_equal_to_alpha_but_for_rounding():
    assert loss.ranked_list_loss(X, Y, alpha=1.2, margin=np.float32(1.2)) > 0


def test_raised_while_tracing():
    with pytest.raises(ValueError, match=re.escape("found shape (5,), expected (6,)")):
        jax.eval_shape(loss.ranked_list_loss, X, Y[:5])
    alpha = jnp.float32(3)  # closed over: it has a value
    with pytest.raises(ValueError, match="alpha out of range"):
        jax.jit(lambda x: loss.ranked_list_loss(x, Y, alpha=alpha))(X)


def test_traced_values_are_not_checked():
    jax.eval_shape(lambda a: loss.ranked_list_loss(X, Y, alpha=a, margin=5.0), 7.0)


def test_hyper_parameters_are_keywords():
    with pytest.raises(TypeError):
        loss.ranked_list_loss(X, Y, 1.2)
