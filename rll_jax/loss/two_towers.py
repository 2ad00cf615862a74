"""Ranked List Loss of two towers, such as images and texts, or queries and products."""

from collections.abc import Hashable
import functools

import jax
from jax.typing import ArrayLike
import numpy as np

from rll_jax.loss._options import (
    ALPHA,
    BALANCE,
    GALLERY_GRADIENT,
    GATHER,
    MARGIN,
    NORMALIZE,
    PAIR_TERM,
    PRECISION,
    QUERY_WEIGHTING,
    TEMPERATURE_NEG,
    TEMPERATURE_POS,
    WEIGHT_GRADIENT,
    Gather,
    PairTerm,
    Precision,
    QueryWeighting,
)
from rll_jax.loss.ranked_list import ranked_list_loss

__all__ = ["two_tower_ranked_list_loss"]


def two_tower_ranked_list_loss(
    a: jax.Array | np.ndarray,
    b: jax.Array | np.ndarray,
    labels_a: jax.Array | np.ndarray,
    labels_b: jax.Array | np.ndarray,
    *,
    alpha: ArrayLike = ALPHA,
    margin: ArrayLike = MARGIN,
    temperature_pos: ArrayLike = TEMPERATURE_POS,
    temperature_neg: ArrayLike = TEMPERATURE_NEG,
    balance: ArrayLike = BALANCE,
    pair_term: PairTerm = PAIR_TERM,
    query_weighting: QueryWeighting = QUERY_WEIGHTING,
    gallery_gradient: bool = GALLERY_GRADIENT,
    weight_gradient: bool = WEIGHT_GRADIENT,
    normalize: bool = NORMALIZE,
    where_a: jax.Array | np.ndarray | None = None,
    where_b: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
    block_size: int | None = None,
    precision: Precision = PRECISION,
    gather: Gather = GATHER,
) -> jax.Array:
    """Computes the mean of two losses: each row of `a` ranks `b`, and each row of `b` ranks `a`.

    Both towers are trained: each is the query of one loss. The equation of a query is the one of
    `ranked_list_loss`, whose options and errors these are. Rows of one tower are not compared with
    each other.

    Args:
      a: (N, D), floating.
      b: (M, D), floating.
      labels_a: (N,), integer.
      labels_b: (M,), integer. Rows of `a` and `b` with one label are positives of each other.
      alpha: the boundary of negatives.
      margin: between the boundaries.
      temperature_pos: T_p of the positives' weights.
      temperature_neg: T_n of the negatives' weights.
      balance: the share of L_N.
      pair_term: "distance" or "squared".
      query_weighting: "uniform" or "mass", within each of the two losses.
      gallery_gradient: False: the ranked tower is a constant in each of the two losses. True: a
        pair moves both its ends in both.
      weight_gradient: False: the weights are constants.
      normalize: L2-normalise the rows of both towers first.
      where_a: (N,) bool: False rows are padding.
      where_b: (M,) bool: False rows are padding.
      axis_name: of `pmap`, `shard_map` or `vmap`: each device passes its own rows of both towers.
      block_size: queries computed at a time; None chooses.
      precision: of the matrix products, "highest" or "high".
      gather: how the ranked tower of several devices reaches each of them, "all" or "ring".

    Returns:
      A scalar.
    """
    rank = functools.partial(
        ranked_list_loss,
        alpha=alpha,
        margin=margin,
        temperature_pos=temperature_pos,
        temperature_neg=temperature_neg,
        balance=balance,
        pair_term=pair_term,
        query_weighting=query_weighting,
        gallery_gradient=gallery_gradient,
        weight_gradient=weight_gradient,
        normalize=normalize,
        axis_name=axis_name,
        block_size=block_size,
        precision=precision,
        gather=gather,
    )
    forth = rank(
        a, labels_a, where=where_a, gallery=b, gallery_labels=labels_b, gallery_where=where_b
    )
    back = rank(
        b, labels_b, where=where_b, gallery=a, gallery_labels=labels_a, gallery_where=where_a
    )
    return (forth + back) / 2
