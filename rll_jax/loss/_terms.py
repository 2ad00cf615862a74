"""The terms and the gradient of one block of queries whose pairs are known.

Private to `rll_jax.loss`. Imports jax and numpy alone.
"""

# pyright: reportUnknownMemberType=false

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rll_jax.loss._differences import weighted_sums, weighted_sums_of_columns
from rll_jax.loss._pairs import (
    Arrays,
    Constants,
    Lists,
    Pairs,
    Spec,
    dot,
    exact_where_near,
    precision_of,
    row_sum,
)


class Sums(NamedTuple):
    """Sums over both lists of each query, (n, 1): of the whole gallery, or of a shard of it."""

    lists: Lists
    positive: jax.Array  # sum of |weight| h over P*
    negative: jax.Array  # the same over N*
    num_positives: jax.Array  # |P*|, int32
    num_negatives: jax.Array  # |N*|, int32


class Terms(NamedTuple):
    """Numbers of each query, (n, 1)."""

    positive: jax.Array  # L_P, 0 for an empty list
    negative: jax.Array  # L_N, 0 for an empty list
    log_mass: jax.Array  # log of the sum of both lists' weights, -inf where both are empty
    num_positives: jax.Array  # |P*|, int32
    num_negatives: jax.Array  # |N*|, int32


class Cotangents(NamedTuple):
    """The derivative of the loss by each query's terms, (n, 1)."""

    positive: jax.Array
    negative: jax.Array
    log_mass: jax.Array | None  # None where the mass is a constant


class _Factors(NamedTuple):
    """What turns a pair's weight into its coefficient, (B, 1) each."""

    scale_pos: jax.Array  # derivative by L_P over the sum of its weights
    scale_neg: jax.Array  # derivative by L_N over the sum of its weights
    terms: Terms | None  # needed where weights are differentiated
    mass_pos: jax.Array | None  # derivative by the log of the mass, through a positive's weight
    mass_neg: jax.Array | None  # the same through a negative's; None where mass is a constant


class Gradient(NamedTuple):
    """The derivative by the queries of a block, or of all, and by the gallery."""

    queries: jax.Array  # (B, D)
    gallery: jax.Array | None  # (M, D), or None where the gallery is a constant


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x / y, and x where y is 0.

    That x is the 0 of an empty list, or a NaN that a maximum dropped, as XLA's on the CPU does.
    """
    return jnp.where(y == 0, x, x / jnp.where(y == 0, 1, y))


def _hinge(spec: Spec, constants: Constants, excess: jax.Array) -> jax.Array:
    """Returns the pair term h with the sign of the excess."""
    if not spec.squared:
        return excess
    return excess * (excess / 2 + jnp.where(excess > 0, constants.alpha_pos, constants.alpha))


def log_mass_of(constants: Constants, lists: Lists) -> jax.Array:
    """Returns the log of the sum of both lists' weights. An empty list has log(0) = -inf."""
    return jnp.logaddexp(
        jnp.log(lists.sum_pos) + constants.temperature_pos * lists.farthest,
        jnp.log(lists.sum_neg) - constants.temperature_neg * lists.nearest,
    )


def block_sums(spec: Spec, constants: Constants, pairs: Pairs) -> Sums:
    """Returns the sums over the lists of one block's queries."""

    def hinge(excess: jax.Array) -> jax.Array:
        return _hinge(spec, constants, excess)

    def count(is_listed: Callable[[jax.Array], jax.Array]) -> jax.Array:
        counts = row_sum(lambda excess: is_listed(excess).astype(jnp.int32), pairs.excess)
        return counts.astype(jnp.int32)

    return Sums(
        pairs.lists,
        row_sum(lambda w, e: w * jnp.maximum(hinge(e), 0), pairs.weight, pairs.excess),
        row_sum(lambda w, e: w * jnp.minimum(hinge(e), 0), pairs.weight, pairs.excess),
        count(lambda excess: excess > 0),
        count(lambda excess: excess < 0),
    )


def no_sums(like: jax.Array) -> Sums:
    """Returns the sums over empty lists, in the shape (n, 1) and the dtype of an array."""
    zero, none = jnp.zeros_like(like), jnp.zeros_like(like, jnp.int32)
    return Sums(Lists(zero, zero, zero, zero), zero, zero, none, none)


def joined(constants: Constants, a: Sums, b: Sums) -> Sums:
    """Returns the sums over the pairs of two shards of the gallery."""
    farthest = jnp.maximum(a.lists.farthest, b.lists.farthest)
    nearest = jnp.minimum(a.lists.nearest, b.lists.nearest)

    def rescaled(part: Sums) -> Sums:
        by_pos = jnp.exp(constants.temperature_pos * (part.lists.farthest - farthest))
        by_neg = jnp.exp(constants.temperature_neg * (nearest - part.lists.nearest))
        lists = Lists(farthest, nearest, by_pos * part.lists.sum_pos, by_neg * part.lists.sum_neg)
        return part._replace(
            lists=lists, positive=by_pos * part.positive, negative=by_neg * part.negative
        )

    total = jax.tree.map(jnp.add, rescaled(a), rescaled(b))
    return total._replace(lists=total.lists._replace(farthest=farthest, nearest=nearest))


def terms_of(constants: Constants, sums: Sums) -> Terms:
    """Returns the terms that the sums over both lists make."""
    lists = sums.lists
    return Terms(
        _ratio(sums.positive, lists.sum_pos),
        _ratio(sums.negative, lists.sum_neg),
        log_mass_of(constants, lists),
        sums.num_positives,
        sums.num_negatives,
    )


def _mass_factor(
    cotangent: jax.Array, total: jax.Array, log_scale: jax.Array, log_mass: jax.Array
) -> jax.Array:
    """Returns the derivative by the log of the mass through one list, 0 for an empty list."""
    return cotangent * jnp.where(total == 0, 0, jnp.exp(log_scale - log_mass))


def _coefficients(spec: Spec, constants: Constants, factors: _Factors, pairs: Pairs) -> jax.Array:
    """Returns the derivative by each pair's distance, over that distance, (B, M)."""
    positive, distance = pairs.weight > 0, pairs.distance
    by_distance = jnp.where(positive, factors.scale_pos, factors.scale_neg)
    slope = distance if spec.squared else 1
    if spec.weight_gradient and factors.terms is not None:
        temperature = jnp.where(positive, constants.temperature_pos, constants.temperature_neg)
        term = jnp.where(positive, factors.terms.positive, factors.terms.negative)
        slope = slope + temperature * (jnp.abs(_hinge(spec, constants, pairs.excess)) - term)
    by_distance = by_distance * slope
    if factors.mass_pos is not None and factors.mass_neg is not None:
        by_distance += jnp.where(
            positive,
            constants.temperature_pos * factors.mass_pos,
            constants.temperature_neg * factors.mass_neg,
        )
    # A pair at distance 0 has no direction.
    apart = distance != 0
    return jnp.where(apart, pairs.weight * by_distance / jnp.where(apart, distance, 1), 0)


def _pull(spec: Spec, arrays: Arrays, pairs: Pairs, coefficients: jax.Array) -> Gradient:
    """Returns a block's gradient: by products, or by differences where a pair is near."""
    rows, columns = arrays.rows, arrays.columns
    queries, gallery = arrays.queries, arrays.gallery
    total = row_sum(lambda c: c, coefficients)
    precision = precision_of(spec)
    pulled = dot(coefficients, columns.centred, ((1,), (0,)), precision)
    on_queries = total * rows.centred - pulled
    on_gallery = None
    if spec.gallery_gradient:
        total = jnp.sum(coefficients, axis=0)[:, None]
        pulled = dot(coefficients, rows.centred, ((0,), (0,)), precision)
        on_gallery = total * columns.centred - pulled

    def exact() -> Gradient:
        return Gradient(
            weighted_sums(coefficients, queries, gallery),
            weighted_sums_of_columns(coefficients, queries, gallery)
            if spec.gallery_gradient
            else None,
        )

    return exact_where_near(pairs.any_near, Gradient(on_queries, on_gallery), exact)


def block_gradient(
    spec: Spec, block: Arrays, pairs: Pairs, terms: Terms | None, cotangents: Cotangents
) -> Gradient:
    """Returns the gradient of one block whose pairs are known.

    Its terms are needed where the weights are differentiated, or the mass.
    """
    constants, lists = block.constants, pairs.lists
    mass_pos = mass_neg = None
    if cotangents.log_mass is not None and terms is not None:
        mass_pos, mass_neg = (
            _mass_factor(cotangents.log_mass, total, log_scale, terms.log_mass)
            for total, log_scale in (
                (lists.sum_pos, constants.temperature_pos * lists.farthest),
                (lists.sum_neg, -constants.temperature_neg * lists.nearest),
            )
        )
    factors = _Factors(
        _ratio(cotangents.positive, lists.sum_pos),
        _ratio(cotangents.negative, lists.sum_neg),
        terms,
        mass_pos,
        mass_neg,
    )
    coefficients = _coefficients(spec, constants, factors, pairs)
    return _pull(spec, block, pairs, coefficients)


def sum_of_lists(spec: Spec, constants: Constants, pairs: Pairs, by_terms: Cotangents) -> jax.Array:
    """Returns what the terms give by their factors, (B, 1): one sum over the pairs for both."""
    scale_pos = _ratio(by_terms.positive, pairs.lists.sum_pos)
    scale_neg = _ratio(by_terms.negative, pairs.lists.sum_neg)

    def pair_loss(weight: jax.Array, excess: jax.Array) -> jax.Array:
        scale = jnp.where(weight > 0, scale_pos, scale_neg)
        return weight * scale * _hinge(spec, constants, excess)

    return row_sum(pair_loss, pairs.weight, pairs.excess)
