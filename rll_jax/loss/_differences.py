"""Sums over the differences of all rows of two matrices, for pairs whose products lose digits.

A loop takes some dimensions or rows at a time. Each step is one elementwise operation that the
compiler vectorises, so that the sums take about three times as long as a matrix product, and
nothing larger than the result is stored. Private to `rll_jax.loss`. Imports jax and numpy alone.
"""

# jax's stubs leave some parameters of pad and fori_loop without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable
from typing import cast

import jax
from jax import lax
import jax.numpy as jnp

# Terms of the sum in one step of the loop. On CPUs, 8 and 32 take 7 and 2 times as long.
_TERMS = 16


def squared_distances(q: jax.Array, g: jax.Array) -> jax.Array:
    """Returns |q_i - g_j|^2, (B, M), of q (B, D) and g (M, D). It is 0 for equal rows alone."""

    def term(q_part: jax.Array, g_part: jax.Array) -> jax.Array:
        return (q_part[:, None] - g_part[None, :]) ** 2

    return _sum(term, q.T, g.T)


def weighted_sums(coefficients: jax.Array, q: jax.Array, g: jax.Array) -> jax.Array:
    """Returns sum_j c_ij (q_i - g_j), (B, D), of coefficients (B, M), q (B, D) and g (M, D)."""

    def term(c_part: jax.Array, g_part: jax.Array) -> jax.Array:
        return c_part[:, None] * (q - g_part[None, :])

    return _sum(term, coefficients.T, g)


def _sum(
    term: Callable[[jax.Array, jax.Array], jax.Array], a: jax.Array, b: jax.Array
) -> jax.Array:
    """Returns sum_k term(a[k], b[k]). The terms of rows of zeros must be 0."""
    steps = -(-a.shape[0] // _TERMS)

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, steps * _TERMS - x.shape[0]), (0, 0)))

    a, b = pad(a), pad(b)

    def step(number: jax.Array, total: jax.Array) -> jax.Array:
        a_part, b_part = (lax.dynamic_slice_in_dim(x, number * _TERMS, _TERMS) for x in (a, b))
        for k in range(_TERMS):
            total = total + term(a_part[k], b_part[k])
        return total

    # Zeros made of the arguments vary over the same mesh axes as the terms.
    zero = jnp.zeros_like(term(a[0], b[0]))
    return cast("jax.Array", lax.fori_loop(0, steps, step, zero))
