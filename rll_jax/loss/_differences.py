"""Sums over the differences of all rows of two matrices, for pairs whose products lose digits.

A loop takes some dimensions or rows at a time. Each step is one elementwise operation that the
compiler vectorises, so that the sums take about three times as long as a matrix product, and
nothing larger than the result is stored. Private to `rll_jax.loss`. Imports jax and numpy alone.
"""

# jax's stubs leave some parameters of fori_loop without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable
from typing import cast

import jax
from jax import lax
import jax.numpy as jnp

Index = jax.Array | int

# Terms of the sum in one step of the loop.
_TERMS = 8


def squared_distances(q: jax.Array, g: jax.Array) -> jax.Array:
    """Returns |q_i - g_j|^2, (B, M), of q (B, D) and g (M, D). It is 0 for equal rows alone."""
    columns = g.T

    def term(total: jax.Array, dimension: Index) -> jax.Array:
        return total + (_column(q, dimension) - _row(columns, dimension)) ** 2

    return _sum(q.shape[1], term, jnp.zeros_like(q[:, :1] + columns[:1]))


def weighted_sums(coefficients: jax.Array, q: jax.Array, g: jax.Array) -> jax.Array:
    """Returns sum_j c_ij (q_i - g_j), (B, D), of coefficients (B, M), q (B, D) and g (M, D)."""

    def term(total: jax.Array, j: Index) -> jax.Array:
        return total + _column(coefficients, j) * (q - _row(g, j))

    return _sum(g.shape[0], term, jnp.zeros_like(q + coefficients[:, :1]))


def weighted_sums_of_columns(coefficients: jax.Array, q: jax.Array, g: jax.Array) -> jax.Array:
    """Returns sum_i c_ij (g_j - q_i), (M, D), without a transposed copy of the coefficients."""

    def term(total: jax.Array, i: Index) -> jax.Array:
        return total + _row(coefficients, i).T * (g - _row(q, i))

    return _sum(q.shape[0], term, jnp.zeros_like(g + coefficients[:1].T))


def _row(x: jax.Array, index: Index) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index, 1, axis=0)


def _column(x: jax.Array, index: Index) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index, 1, axis=1)


def _sum(count: int, term: Callable[[jax.Array, Index], jax.Array], zero: jax.Array) -> jax.Array:
    """Returns `zero` plus the terms 0 to count - 1, some of them in each step of a loop."""
    terms = 1 if is_symbolic(count) else _TERMS  # a symbolic number has an unknown remainder
    steps = count // terms

    def step(number: jax.Array, total: jax.Array) -> jax.Array:
        for k in range(terms):
            total = term(total, number * terms + k)
        return total

    total = cast("jax.Array", lax.fori_loop(0, steps, step, zero))
    for k in range(count % terms):
        total = term(total, steps * terms + k)
    return total


def is_symbolic(size: object) -> bool:
    """Returns whether the size of an axis is unknown, as in `jax.export` for any batch."""
    return not isinstance(size, int)
