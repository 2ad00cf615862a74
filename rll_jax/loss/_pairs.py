"""The pairs of a block of queries and a gallery: distances, lists, weights.

Private to `rll_jax.loss`. Imports jax alone.
"""

from typing import Any, NamedTuple

from jax import lax
import jax.numpy as jnp

# Pairs nearer than this (squared, relative to their squared norms) lose their digits in |q|^2 + |g|^2 - 2 q.g.
_NEAR = 2e-2


class Spec(NamedTuple):
    """What is known when tracing."""

    squared: bool  # pair term: the half squared distance
    weight_gradient: bool
    gallery_gradient: bool
    own_gallery: bool  # the gallery holds the queries themselves, to be left out
    block_size: int


class Hyper(NamedTuple):
    """Scalars of the computing dtype, traced or not; none is differentiated."""

    alpha: Any
    alpha_pos: Any
    temperature_pos: Any
    temperature_neg: Any
    balance: Any


class Rows(NamedTuple):
    """What belongs to the queries, each (n, 1) but the first."""

    centred: Any  # (n, D): less what is taken off all rows
    label: Any
    index: Any
    size: Any  # squared norm, centred


class Columns(NamedTuple):
    """What belongs to the gallery's rows, each (1, M) but the first; `valid` may be None."""

    centred: Any  # (M, D)
    label: Any
    index: Any
    size: Any
    valid: Any


class Pairs(NamedTuple):
    """One block's matrices (B, M), and per query (B, 1)."""

    d: Any  # distance, negative for a pair that is near, 0 for one left out: two masks less to store
    u: Any  # d - alpha_pos > 0 for P*, d - alpha < 0 for N*, 0 for a pair on neither list
    w: Any  # sign(u) exp(T d), over its largest in the list
    sum_pos: Any  # sums of |w|: 0 for an empty list, at least 1 otherwise
    sum_neg: Any
    log_scale_pos: Any  # log of the true weight that |w| = 1 stands for
    log_scale_neg: Any
    any_near: Any  # scalar bool: False when no pair of the block is near


def dot(a, b, contract):
    # TF32 (GPU) or bfloat16 (TPU) products would move a distance by 1e-2.
    return lax.dot_general(
        a, b, (contract, ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=a.dtype
    )


def row_sum(x):
    return jnp.sum(x, axis=1, keepdims=True)


def each_near(any_near, carry, body, distances):
    """Runs `carry = body(carry, column, hit)` for the near pairs (distance < 0), the k-th of every query at a time."""
    size = distances(carry).shape[1]
    iota = lax.broadcasted_iota(jnp.int32, (1, size), 1)

    def step(state):
        column, _, carry = state
        # Not `d < 0` alone: the compiler would compute and store that before the loop, which mostly does not run.
        rest = jnp.where(iota > column, distances(carry), 0) < 0
        column = jnp.min(jnp.where(rest, iota, size), axis=1, keepdims=True)
        return column, jnp.any(column < size), body(carry, column, iota == column)

    # Derived from the data, so that its type varies over the mesh axes that the loop's varies over.
    start = jnp.zeros_like(distances(carry)[:, :1], jnp.int32) - 1
    return lax.while_loop(lambda state: state[1], step, (start, any_near, carry))[2]


def at(column, x):
    """Rows of x (M, ...) for one column of each query; any row for a query that has none left."""
    return jnp.take(x, column[:, 0], axis=0, mode="clip")


def _excess(hyper, same, d):
    return jnp.where(same, jnp.maximum(d - hyper.alpha_pos, 0), jnp.minimum(d - hyper.alpha, 0))


def _extremes(u):
    """The farthest positive's and the nearest negative's u, 0 for an empty list."""
    return jnp.maximum(jnp.max(u, axis=1, keepdims=True), 0), jnp.minimum(
        jnp.min(u, axis=1, keepdims=True), 0
    )


def make_pairs(spec, hyper, q, rows, g, columns):
    size = rows.size + columns.size
    d2 = jnp.maximum(size - 2 * dot(rows.centred, columns.centred, ((1,), (1,))), 0)
    d = jnp.sqrt(d2)
    same = rows.label == columns.label
    # A positive so near is trivial and needs no digits, unless alpha - margin is tiny too.
    near = (d2 < _NEAR * size) & ~(same & (hyper.alpha_pos**2 > 2 * _NEAR * size))
    d = jnp.where(
        near, -jnp.maximum(d, jnp.finfo(d.dtype).tiny), d
    )  # a negative 0 would not be found
    # A pair left out becomes a positive at distance 0, which is on no list.
    if columns.valid is not None:
        same = same | ~columns.valid
        d = jnp.where(columns.valid, d, 0)
    if spec.own_gallery:
        d = jnp.where(rows.index == columns.index, 0, d)
    u = _excess(hyper, same, jnp.abs(d))

    def exact(carry, column, hit):
        d, u, _ = carry
        away = jnp.sqrt(row_sum((q - at(column, g)) ** 2))
        u = jnp.where(hit, _excess(hyper, rows.label == at(column, columns.label.T), away), u)
        return jnp.where(hit, -away, d), u, _extremes(u)

    # Only a row whose nearest negative is this near, or whose positives may be, can have a near pair.
    farthest, nearest = _extremes(u)
    reach = jnp.sqrt(_NEAR * (rows.size + jnp.max(columns.size)))
    slack = 8 * jnp.finfo(d.dtype).eps * hyper.alpha
    any_near = jnp.any((hyper.alpha + nearest <= reach + slack) | (hyper.alpha_pos <= 1.5 * reach))
    d, u, (farthest, nearest) = each_near(
        any_near, (d, u, (farthest, nearest)), exact, lambda carry: carry[0]
    )

    pos = u > 0
    w = jnp.exp(
        jnp.where(
            pos, hyper.temperature_pos * (u - farthest), hyper.temperature_neg * (nearest - u)
        )
    )
    w = jnp.where(u == 0, 0, jnp.where(pos, w, -w))  # NaN is not 0, and shows
    # Two different zeros below: equal ones XLA on the CPU would share, stored as a matrix.
    return Pairs(
        d,
        u,
        w,
        sum_pos=row_sum(jnp.maximum(w, 0)),
        sum_neg=-row_sum(jnp.minimum(w, -0.0)),
        log_scale_pos=hyper.temperature_pos * farthest,
        log_scale_neg=-hyper.temperature_neg * nearest,
        any_near=any_near,
    )
