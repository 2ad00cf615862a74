"""The list terms of blocks of queries, and their hand-written derivatives.

Private to `rll_jax.loss`. Imports jax alone.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from rll_jax.loss._pairs import at, dot, each_near, make_pairs, row_sum


class Terms(NamedTuple):
    """Per query (n, 1): both terms, log of both lists' weights (-inf without any), numbers of non-trivial examples."""

    positive: Any
    negative: Any
    log_mass: Any
    num_positives: Any
    num_negatives: Any


def _ratio(x, y):
    """X / y, and x where y is 0: an empty list's 0, or a NaN that a maximum did not see (as XLA's on the CPU)."""
    return jnp.where(y == 0, x, x / jnp.where(y == 0, 1, y))


def _hinge(spec, hyper, u):
    """H of a pair, with the sign of u."""
    return u * (u / 2 + jnp.where(u > 0, hyper.alpha_pos, hyper.alpha)) if spec.squared else u


def _log_mass(p):
    # log(0) = -inf: an empty list has no mass.
    return jnp.logaddexp(jnp.log(p.sum_pos) + p.log_scale_pos, jnp.log(p.sum_neg) + p.log_scale_neg)


def _terms(spec, hyper, p):
    hinge = _hinge(spec, hyper, p.u)
    return Terms(
        _ratio(row_sum(p.w * jnp.maximum(hinge, 0)), p.sum_pos),
        _ratio(row_sum(p.w * jnp.minimum(hinge, 0)), p.sum_neg),
        _log_mass(p),
        jnp.sum(p.u > 0, axis=1, keepdims=True, dtype=jnp.int32),
        jnp.sum(p.u < 0, axis=1, keepdims=True, dtype=jnp.int32),
    )


def _coefficients(spec, hyper, p, scale_pos, scale_neg, terms=None, ct_log_mass=None):
    """A function (d, u, w) -> derivative of the queries' weighted sum by each distance, over that distance."""
    share_pos = share_neg = 0
    if ct_log_mass is not None:
        share_pos = ct_log_mass * jnp.where(
            p.sum_pos == 0, 0, jnp.exp(p.log_scale_pos - terms.log_mass)
        )
        share_neg = ct_log_mass * jnp.where(
            p.sum_neg == 0, 0, jnp.exp(p.log_scale_neg - terms.log_mass)
        )

    def coefficient(d, u, w):
        pos, d = w > 0, jnp.abs(d)
        by_distance = jnp.where(pos, scale_pos, scale_neg)
        slope = d if spec.squared else 1
        if spec.weight_gradient:
            temperature = jnp.where(pos, hyper.temperature_pos, hyper.temperature_neg)
            term = jnp.where(pos, terms.positive, terms.negative)
            slope = slope + temperature * (jnp.abs(_hinge(spec, hyper, u)) - term)
        by_distance = by_distance * slope
        if ct_log_mass is not None:
            by_distance += jnp.where(
                pos, hyper.temperature_pos * share_pos, hyper.temperature_neg * share_neg
            )
        # A pair at distance 0 has no direction.
        return jnp.where(d == 0, 0, w * by_distance / d)

    return coefficient


def _gradient(p, coefficient, q, rows, g, columns, gallery_gradient=False):
    """((total, pull), gallery's or None): the gradient of a block's queries is total * centred - pull."""
    far = jnp.where(p.d < 0, 0, coefficient(p.d, p.u, p.w))
    pull_q = dot(far, columns.centred, ((1,), (0,)))
    pull_g = dot(far, rows.centred, ((0,), (0,))) if gallery_gradient else None

    def direct(pulls, column, hit):
        pull_q, pull_g = pulls
        push = coefficient(*(row_sum(jnp.where(hit, x, 0)) for x in (p.d, p.u, p.w))) * (
            q - at(column, g)
        )
        return pull_q - push, None if pull_g is None else pull_g.at[column[:, 0]].add(
            push, mode="drop"
        )

    # The loop also keeps XLA on the CPU from fusing a product with what follows, which slows it down by a third.
    pull_q, pull_g = each_near(p.any_near, (pull_q, pull_g), direct, lambda _: p.d)
    return (row_sum(far), pull_q), None if pull_g is None else jnp.sum(far, axis=0)[
        :, None
    ] * columns.centred - pull_g


def _blocks_of(spec, tree):
    """How many blocks, and a function from a block's number to its part of `tree`, the last padded with zeros."""
    n, size = jax.tree.leaves(tree)[0].shape[0], spec.block_size
    count = -(-n // size)
    padded = jax.tree.map(
        lambda x: jnp.pad(x, [(0, count * size - n)] + [(0, 0)] * (x.ndim - 1)), tree
    )
    return count, lambda k: jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, k * size, size), padded
    )


def _joined(n, tree):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], tree)


def _map(spec, body, *args):
    """`body(*args)` over blocks of queries, its results put together again."""
    n = args[0].shape[0]
    if spec.block_size >= n:
        return body(*args)
    count, part = _blocks_of(spec, args)
    return _joined(n, lax.map(lambda k: body(*part(k)), jnp.arange(count)))


def _combined(balance, terms):
    return (1 - balance) * terms.positive + balance * terms.negative


@functools.partial(jax.jit, static_argnums=(0,))
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fixed_gallery_loss(spec, q, rows, g, columns, hyper):
    """Per query (n, 1): L_i, and log_mass without derivative. The gallery is a constant, whatever is differentiated."""

    def body(q, rows):
        t = _terms(spec, hyper, make_pairs(spec, hyper, q, rows, g, columns))
        return _combined(hyper.balance, t), t.log_mass

    return _map(spec, body, q, rows)


def _fixed_forward(spec, q, rows, g, columns, hyper):
    # dL_i / dq_i needs nothing but the block at hand, so it is worked out now and no pair is kept or computed again.
    def body(q, rows):
        p = make_pairs(spec, hyper, q, rows, g, columns)
        scales = _ratio(1 - hyper.balance, p.sum_pos), _ratio(hyper.balance, p.sum_neg)
        if spec.weight_gradient:
            t = _terms(spec, hyper, p)
            loss = _combined(hyper.balance, t)
        else:
            # One sum over the pairs instead of a sum for each list.
            t = None
            loss = row_sum(p.w * jnp.where(p.w > 0, *scales) * _hinge(spec, hyper, p.u))
        return (loss, _log_mass(p)), _gradient(
            p, _coefficients(spec, hyper, p, *scales, t), q, rows, g, columns
        )[0]

    outputs, (total, pull) = _map(spec, body, q, rows)
    return outputs, total * rows.centred - pull


def _fixed_backward(spec, gradient, cotangents):
    return cotangents[0] * gradient, None, None, None, None


fixed_gallery_loss.__wrapped__.defvjp(_fixed_forward, _fixed_backward)


@functools.partial(jax.jit, static_argnums=(0,))
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def list_terms(spec, q, rows, g, columns, hyper):
    """`Terms` of every query, the first three differentiable; the gallery's gradient is 0 unless in the spec."""
    return _map(
        spec,
        lambda q, rows: _terms(spec, hyper, make_pairs(spec, hyper, q, rows, g, columns)),
        q,
        rows,
    )


def _terms_forward(spec, *args):
    return list_terms(spec, *args), args


def _terms_backward(spec, args, cotangents):
    q, rows, g, columns, hyper = args
    cotangents = (cotangents.positive, cotangents.negative, cotangents.log_mass)

    def block(q, rows, cotangents):
        positive, negative, log_mass = cotangents
        p = make_pairs(spec, hyper, q, rows, g, columns)
        scales = _ratio(positive, p.sum_pos), _ratio(negative, p.sum_neg)
        coefficient = _coefficients(spec, hyper, p, *scales, _terms(spec, hyper, p), log_mass)
        return _gradient(p, coefficient, q, rows, g, columns, spec.gallery_gradient)

    if spec.gallery_gradient:
        count, part = _blocks_of(spec, (q, rows, cotangents))

        def step(grad_g, k):
            on_q, more = block(*part(k))
            return grad_g + more, on_q

        grad_g, on_q = lax.scan(step, jnp.zeros_like(g), jnp.arange(count))
        total, pull = _joined(q.shape[0], on_q)
    else:
        (total, pull), grad_g = _map(spec, block, q, rows, cotangents)
    return total * rows.centred - pull, None, grad_g, None, None


list_terms.__wrapped__.defvjp(_terms_forward, _terms_backward)
