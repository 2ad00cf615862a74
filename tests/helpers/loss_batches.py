"""Batches with every kind of trouble, and the compiled loss to give them to."""

import functools

import jax
import numpy as np

from rll_jax import loss

N, D, M = 22, 5, 17


HYPER = {
    "alpha": 1.2,
    "margin": 0.4,
    "temperature_pos": 0.0,
    "temperature_neg": 10.0,
    "balance": 0.5,
}


KINDS = (
    "ragged",
    "singletons",
    "one class",
    "duplicates",
    "collapsed",
    "collapsed classes",
    "near",
    "zeros",
    "masked",
    "all padding",
)


def batch(kind, seed=0, n=N, dim=D):
    """(embeddings, labels, where) of one shape, each kind a different trouble."""
    rng = np.random.default_rng(seed)
    x, where = rng.normal(size=(n, dim)), np.ones(n, bool)
    labels = np.sort(rng.integers(0, 6, n))  # ragged
    if kind == "singletons":
        labels = np.arange(n)
    elif kind == "one class":
        labels = np.zeros(n, int)
    elif kind == "duplicates":  # of the same and of other classes
        x[1::3] = x[0::3][: len(x[1::3])]
    elif kind == "collapsed":
        x[:] = x[0]
    elif kind == "collapsed classes":
        x = x[labels]
    elif kind == "near":
        x = np.repeat(x[: n // 2], 2, axis=0) + 1e-3 * rng.normal(size=(n, dim))
    elif kind == "zeros":
        x[::4] = 0
    elif kind == "masked":
        where = rng.random(n) < 0.7
        x[~where] = np.nan
    elif kind == "all padding":
        where[:] = False
        x[:] = np.inf
    return x, labels, where


@functools.cache
def compiled(block_size=None, **options):
    """value_and_grad of the loss; hyper-parameters, labels, masks and gallery are traced too."""

    def batch_loss(x, gallery, hyper, arrays):
        extra = {} if gallery is None else {"gallery": gallery}
        return loss.ranked_list_loss(
            x, block_size=block_size, **extra, **arrays, **hyper, **options
        )

    return jax.jit(jax.value_and_grad(batch_loss, argnums=(0, 1)))


def close(actual, expected, rtol, scale=None):
    expected = np.asarray(expected)
    scale = np.abs(expected).max() if scale is None else scale
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=rtol, atol=rtol * scale + 1e-14
    )
