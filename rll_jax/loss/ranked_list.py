"""Ranked List Loss (Wang et al., CVPR 2019, arXiv 1903.03238; TPAMI 2021), all published variants.

Each example of the batch is the query q_i once, and the other examples f_j are its gallery. With
d_ij = ||q_i - f_j||, only the non-trivial examples count: those of the query's class beyond
alpha_P = alpha - margin (the list P*_i), and those of other classes within alpha (the list N*_i).

    h_ij = d_ij - alpha_P                in P*, or alpha - d_ij                in N*
    w_ij = exp(T_p (d_ij - alpha_P))     in P*, or exp(T_n (alpha - d_ij))     in N*
    L_P(i) = sum_{P*} w h / sum_{P*} w,  and L_N(i) likewise over N*
    L_i = (1 - balance) L_P(i) + balance L_N(i)

The README of this folder has the variants, the recipe for several devices and the cost.
"""

# jax's stubs leave some parameters of asarray, psum and pmax without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Hashable
import inspect
from typing import Any, NamedTuple, ParamSpec, TypeVar, Unpack, cast

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from rll_jax._jaxlib_fault import warn_of_wrong_sums
from rll_jax.loss import _blocks
from rll_jax.loss._mesh import first_rows
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
    HyperParameters,
    Options,
    Overrides,
    OverridesExceptMargin,
    PairTerm,
    Precision,
    QueryWeighting,
    Variant,
    as_number,
    positive_boundary,
)
from rll_jax.loss._problem import (
    GalleryArguments,
    Problem,
    QueryArguments,
    check_arguments,
    solve,
)
from rll_jax.loss.rows import computing_dtype, normalize_rows, sum_over_devices

P = ParamSpec("P")
R = TypeVar("R")

__all__ = [
    "STATIC_ARGUMENTS",
    "RankedListLossTerms",
    "caffe2019",
    "cvpr2019",
    "ranked_list_loss",
    "ranked_list_loss_of_query",
    "ranked_list_loss_terms",
    "tpami2020",
]


# The options that are known when tracing, for the static_argnames of jax.jit.
STATIC_ARGUMENTS = (
    "pair_term",
    "query_weighting",
    "gallery_gradient",
    "weight_gradient",
    "normalize",
    "axis_name",
    "block_size",
    "precision",
    "gather",
)


class RankedListLossTerms(NamedTuple):
    """Numbers of each query, (N,). They are 0 for rows with `where` False."""

    positive: jax.Array  # L_P(i), 0 for an empty list
    negative: jax.Array  # L_N(i), 0 for an empty list
    num_positives: jax.Array  # |P*_i|, int32
    num_negatives: jax.Array  # |N*_i|, int32
    weight: jax.Array  # weight_i, the factor of L_i in the loss of the whole batch


def ranked_list_loss(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
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
    where: jax.Array | np.ndarray | None = None,
    gallery: jax.Array | np.ndarray | None = None,
    gallery_labels: jax.Array | np.ndarray | None = None,
    gallery_where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
    block_size: int | None = None,
    precision: Precision = PRECISION,
    gather: Gather = GATHER,
) -> jax.Array:
    """Computes sum_i weight_i L_i over the queries of a batch, with L_i as at the top of this file.

    Numbers may be traced, so that a schedule does not recompile. They are never differentiated:
    that raises. The derivative is written by hand (`jax.custom_jvp`): first order, in reverse and
    forward mode. A second derivative raises. Products of matrices have Precision.HIGHEST, in the
    value and in the gradient.

    Embeddings that lie on a mesh of several devices, with automatic or explicit axes, need nothing
    else: each device computes its part of the queries.

    Args:
      embeddings: (N, D), floating: the queries, and the gallery too unless one is given. float16
        and bfloat16 are computed in float32, float64 in float64. The loss has that dtype; the
        gradient has the dtype of the embeddings.
      labels: (N,), integer: the classes.
      alpha: the boundary of negatives, 0 < alpha <= 2.
      margin: between the boundaries, 0 <= margin <= alpha. Positives count beyond alpha - margin.
      temperature_pos: T_p >= 0 of the positives' weights. 0 weights them alike.
      temperature_neg: T_n >= 0 of the negatives' weights. The larger, the more the hardest count.
      balance: the share of L_N in [0, 1]; lambda / (1 + lambda) of the CVPR paper.
      pair_term: "distance"; or "squared", where h is (d^2 - alpha_P^2) / 2 or (alpha^2 - d^2) / 2.
        The weights w are the same in both.
      query_weighting: "uniform": weight_i is 1 / number of queries, and a query with two empty
        lists counts as 0. "mass": weight_i is S_i / sum_k S_k, where S_i is the sum of w over both
        lists of query i; 0 where no pair is active.
      gallery_gradient: False, as published: f_j is a constant in the loss of query i. True: a pair
        moves both its ends, and a given `gallery` gets a gradient.
      weight_gradient: False, as published: w and "mass" are constants, so a pair's gradient at its
        query is a unit vector times its normalised weight (times d_ij for "squared"). True: they
        are differentiated. Both flags True give the true derivative of the value.
      normalize: L2-normalise embeddings and gallery first. Rows no longer than 1e-12 become 0, with
        gradient 0.
      where: (N,) bool: False rows are padding, neither query nor gallery, whatever their values.
      gallery: (M, D): rank these rows for each query instead of the batch, such as a memory
        (`rll_jax.loss.memory`). It is a constant unless gallery_gradient; two trained towers need
        `two_tower_ranked_list_loss`. No pair is left out: a query's own copy is a positive at
        distance 0, which is trivial.
      gallery_labels: (M,), integer; needed with a gallery.
      gallery_where: (M,) bool: False rows are padding.
      axis_name: of `pmap`, `shard_map` or `vmap`: the gallery is that of all devices together. Each
        device passes its own rows of the batch, or of `gallery` (shards, not copies). It returns
        its share times the number of devices, so that `lax.pmean` of values and gradients gives
        those of the whole batch; or that mean itself, with weight_gradient of the weighting "mass",
        and with gallery_gradient in a ring. RECIPES.md has the recipe.
      block_size: queries computed at a time; None chooses from M. Memory is O(M * block_size).
        Ignored where N or M is symbolic (`jax.export`).
      precision: of the matrix products. "highest" is float32. "high" uses the tensor cores: TF32 on
        GPUs, bfloat16 in three passes on TPUs, float32 on CPUs. The README has its errors. Near
        pairs are computed in float32 in any case.
      gather: how the gallery of several devices, of `axis_name` or of a mesh, reaches each of them.
        "all": in whole. "ring": one device's shard at a time, so that a device needs memory for its
        own rows and a block alone. The shards go round twice for a gradient. The README says when
        that pays. On one device both are the same.

    Returns:
      A scalar; 0 where all rows are padding. The term of an empty list is 0. An example exactly on
      its boundary is trivial. A pair at distance 0 counts in the value and has gradient 0, as it
      has no direction. NaN in a valid row gives NaN.

    Raises:
      TypeError: embeddings not floating, labels not integer, a mask not bool, a list instead of an
        array, a number that is not real, a block_size that is not an integer.
      ValueError: a wrong rank, length or dimension; an empty batch; labels that do not fit int32
        without jax_enable_x64; a number out of range; an unknown choice; a gallery without labels
        or the reverse. Traced numbers are not checked.
    """
    variant = Variant(pair_term, query_weighting, gallery_gradient, weight_gradient)
    options = Options(variant, normalize, block_size, precision, gather)
    arguments = check_arguments(
        QueryArguments(embeddings, labels, where),
        GalleryArguments(gallery, gallery_labels, gallery_where),
        HyperParameters(alpha, margin, temperature_pos, temperature_neg, balance),
        options,
    )
    share = jnp.sum(solve(_share, arguments, options, axis_name))
    if axis_name is None:
        return share
    differentiates_weights = query_weighting == "mass" and weight_gradient
    if differentiates_weights or (gather == "ring" and gallery_gradient):
        # Their derivative is that of the sum of all shares: no device may weigh its own. The zero
        # makes the sum vary over devices for shard_map, whose gradient then sums as pmap's does.
        return sum_over_devices(share, axis_name) + jnp.zeros_like(share)
    return share * lax.axis_size(axis_name)


def ranked_list_loss_terms(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
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
    where: jax.Array | np.ndarray | None = None,
    gallery: jax.Array | np.ndarray | None = None,
    gallery_labels: jax.Array | np.ndarray | None = None,
    gallery_where: jax.Array | np.ndarray | None = None,
    axis_name: Hashable | None = None,
    block_size: int | None = None,
    precision: Precision = PRECISION,
    gather: Gather = GATHER,
) -> RankedListLossTerms:
    """Computes for each query what `ranked_list_loss` sums, for logs, tests and other reductions.

    The arguments and the errors are those of `ranked_list_loss`.

    Returns:
      `RankedListLossTerms`, each (N,). The loss is
      sum(weight * ((1 - balance) * positive + balance * negative)). With `axis_name` each device
      returns the terms of its own queries, and the sum runs over the devices too: the weights are
      those of the whole batch, and nothing is scaled. `positive` and `negative` are differentiable
      by their query alone, unless gallery_gradient. `weight` is a constant, unless weight_gradient
      with query_weighting="mass".
    """
    variant = Variant(pair_term, query_weighting, gallery_gradient, weight_gradient)
    options = Options(variant, normalize, block_size, precision, gather)
    arguments = check_arguments(
        QueryArguments(embeddings, labels, where),
        GalleryArguments(gallery, gallery_labels, gallery_where),
        HyperParameters(alpha, margin, temperature_pos, temperature_neg, balance),
        options,
    )
    terms = solve(_terms, arguments, options, axis_name)
    return RankedListLossTerms(*(first_rows(column, embeddings.shape[0]) for column in terms))


def _share(problem: Problem) -> jax.Array:
    """Returns this device's part of the sum over the queries, (1,)."""
    return _blocks.loss(problem.spec, problem.arrays, problem.valid)[None]


def _terms(problem: Problem) -> RankedListLossTerms:
    """Returns the numbers of this device's queries."""
    spec, valid = problem.spec, problem.valid
    terms = _blocks.list_terms(spec, problem.arrays)
    log_mass = terms.log_mass if spec.weight_gradient else lax.stop_gradient(terms.log_mass)
    weight = _blocks.query_weights(spec, log_mass, valid)
    columns = (terms.positive, terms.negative, terms.num_positives, terms.num_negatives)
    if valid is not None:
        columns = tuple(jnp.where(valid, column, 0) for column in columns)
    return RankedListLossTerms(*(column[:, 0] for column in (*columns, weight)))


def ranked_list_loss_of_query(
    query: jax.Array | np.ndarray,
    label: ArrayLike,
    gallery: jax.Array | np.ndarray,
    gallery_labels: jax.Array | np.ndarray,
    *,
    alpha: ArrayLike = ALPHA,
    margin: ArrayLike = MARGIN,
    temperature_pos: ArrayLike = TEMPERATURE_POS,
    temperature_neg: ArrayLike = TEMPERATURE_NEG,
    balance: ArrayLike = BALANCE,
    pair_term: PairTerm = PAIR_TERM,
    gallery_gradient: bool = GALLERY_GRADIENT,
    weight_gradient: bool = WEIGHT_GRADIENT,
    normalize: bool = NORMALIZE,
    where: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """Computes the loss L_i of one query against a gallery: the definition, to read and to test by.

    Plain jax.numpy and autodiff. `ranked_list_loss` equals the mean of this function over the rows
    of a batch, each with the other rows as its gallery (`jax.vmap`, and a `where` that is False for
    the query itself). It takes half the time and needs no N x N matrix.

    Args:
      query: (D,), floating.
      label: an integer scalar, the query's class.
      gallery: (M, D), floating.
      gallery_labels: (M,), integer.
      alpha: the boundary of negatives.
      margin: between the boundaries. alpha_P = alpha - margin.
      temperature_pos: T_p of the positives' weights.
      temperature_neg: T_n of the negatives' weights.
      balance: lambda, the share of L_N.
      pair_term: "distance" or "squared".
      gallery_gradient: False: the gallery is a constant.
      weight_gradient: False: the weights are constants.
      normalize: divide query and gallery by their L2 norms first.
      where: (M,) bool: False rows do not count. Leave the query itself out.

    Returns:
      A scalar. Nothing is checked.
    """
    warn_of_wrong_sums()
    squared = _squared_distances(query, gallery, gallery_gradient, normalize)
    apart = squared > 0
    # The square root has no derivative at 0.
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)
    valid = jnp.ones(distance.shape, bool) if where is None else where

    alpha_pos = positive_boundary(alpha, margin)
    alpha_neg, t_pos, t_neg, share = (
        cast("Any", number) for number in (alpha, temperature_pos, temperature_neg, balance)
    )
    size, size_pos, size_neg = distance, alpha_pos, alpha_neg
    if pair_term == "squared":
        size, size_pos, size_neg = squared / 2, alpha_pos**2 / 2, alpha_neg**2 / 2
    same = gallery_labels == label
    positive = _list_term(
        valid & same & ~(distance <= alpha_pos),
        size - size_pos,
        t_pos * (distance - alpha_pos),
        weight_gradient,
    )
    negative = _list_term(
        valid & ~same & ~(distance >= alpha_neg),
        size_neg - size,
        t_neg * (alpha_neg - distance),
        weight_gradient,
    )
    return (1 - share) * positive + share * negative


def _squared_distances(
    query: jax.Array | np.ndarray,
    gallery: jax.Array | np.ndarray,
    gallery_gradient: bool,
    normalize: bool,
) -> jax.Array:
    """Returns the (M,) squared distances of a query to a gallery."""
    query, gallery = jnp.asarray(query), jnp.asarray(gallery)
    dtype = computing_dtype(query.dtype)
    q, g = query.astype(dtype), gallery.astype(dtype)
    if normalize:
        q, g = normalize_rows(q[None])[0], normalize_rows(g)
    if not gallery_gradient:
        g = lax.stop_gradient(g)
    return jnp.sum((q[None, :] - g) ** 2, axis=1)


def _list_term(
    listed: jax.Array, hinge: jax.Array, exponent: jax.Array, weight_gradient: bool
) -> jax.Array:
    """Returns the mean hinge of the listed rows, weighted by exp(exponent); 0 without any row."""
    exponent = exponent if weight_gradient else lax.stop_gradient(exponent)
    largest = lax.stop_gradient(jnp.max(exponent, initial=-jnp.inf, where=listed))
    weight = jnp.where(listed, jnp.exp(jnp.where(listed, exponent - largest, 0)), 0)
    total = jnp.sum(weight * jnp.where(listed, hinge, 0))
    return total / jnp.where(jnp.any(listed), jnp.sum(weight), 1)


def _with_signature(**defaults: object) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Shows the signature of `ranked_list_loss` with other defaults in help() and editors."""

    def set_signature(preset: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(ranked_list_loss)
        parameters = [
            p.replace(default=defaults[name]) if name in defaults else p
            for name, p in signature.parameters.items()
        ]
        cast("Any", preset).__signature__ = signature.replace(parameters=parameters)
        return preset

    return set_signature


@_with_signature()
def cvpr2019(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    **overrides: Unpack[Overrides],
) -> jax.Array:
    """Computes the loss of the CVPR 2019 paper: distances, the mean over the queries.

    These are the defaults of `ranked_list_loss`. The paper writes L_P + lambda L_N with lambda = 1,
    which is twice this value and gradient.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      **overrides: keyword arguments of `ranked_list_loss`, which take precedence.
    """
    return ranked_list_loss(embeddings, labels, **overrides)


@_with_signature(pair_term="squared", query_weighting="mass")
def caffe2019(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    **overrides: Unpack[Overrides],
) -> jax.Array:
    """Computes the loss of the layer released in 2019-07: squared pair term, queries by mass.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      **overrides: keyword arguments of `ranked_list_loss`, which take precedence.
    """
    options: Overrides = {"pair_term": "squared", "query_weighting": "mass"}
    options.update(overrides)
    return ranked_list_loss(embeddings, labels, **options)


@_with_signature(alpha=1 + MARGIN / 2, query_weighting="mass")
def tpami2020(
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    margin: ArrayLike = MARGIN,
    **overrides: Unpack[OverridesExceptMargin],
) -> jax.Array:
    """Computes the loss of the layer released in 2020-06 (TPAMI): distances, queries by mass.

    The boundaries are centred at 1.

    Args:
      embeddings: (N, D), floating.
      labels: (N,), integer.
      margin: between the boundaries. alpha is 1 + margin / 2 unless it is among the overrides.
      **overrides: keyword arguments of `ranked_list_loss`, which take precedence.
    """
    options: OverridesExceptMargin = {"alpha": _centred_alpha(margin), "query_weighting": "mass"}
    options.update(overrides)
    return ranked_list_loss(embeddings, labels, margin=margin, **options)


def _centred_alpha(margin: Any) -> Any:
    """Returns the boundary of negatives of the 2020 layer, without derivative, as the margin."""
    margin, tracer = as_number(margin), cast("type", Tracer)
    return 1 + (lax.stop_gradient(margin) if isinstance(margin, tracer) else margin) / 2
