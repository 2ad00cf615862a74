"""Ranked List Loss (Wang et al., CVPR 2019, arXiv 1903.03238; TPAMI 2021): every published variant, any batch size.

Each example is once the query q_i; the others, f_j, are its gallery. With d_ij = ||q_i - f_j||, only those of its class
beyond alpha_P = alpha - margin count (P*_i), and those of the other classes within alpha (N*_i):

    h_ij = d_ij - alpha_P  or  alpha - d_ij                          ("squared": half the difference of the squares)
    w_ij = exp(T_p (d_ij - alpha_P))  or  exp(T_n (alpha - d_ij))    constants, unless weight_gradient
    L_P(i) = sum_{P*} w h / sum_{P*} w,   L_N(i) likewise,   L_i = (1 - balance) L_P(i) + balance L_N(i)

This module imports jax and numpy alone.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from rll_jax.loss import _blocks, _problem

__all__ = [
    "RankedListLossTerms",
    "caffe2019",
    "cvpr2019",
    "ranked_list_loss",
    "ranked_list_loss_of_query",
    "ranked_list_loss_terms",
    "tpami2020",
]


class RankedListLossTerms(NamedTuple):
    """Per query, each (N,); 0 for rows with `where` False."""

    positive: jax.Array  # L_P(i), 0 for an empty list
    negative: jax.Array  # L_N(i), 0 for an empty list
    num_positives: jax.Array  # |P*_i|, int32
    num_negatives: jax.Array  # |N*_i|, int32
    weight: jax.Array  # what multiplies L_i in the (global) loss: 1 / queries, or q_i


def ranked_list_loss(
    embeddings,
    labels,
    *,
    alpha=1.2,
    margin=0.4,
    temperature_pos=0.0,
    temperature_neg=10.0,
    balance=0.5,
    pair_term="distance",
    query_weighting="uniform",
    gallery_gradient=False,
    weight_gradient=False,
    normalize=True,
    where=None,
    gallery=None,
    gallery_labels=None,
    gallery_where=None,
    axis_name=None,
    block_size=None,
):
    """Ranked List Loss of a batch: sum_i weight_i L_i, with the L_i at the top of this module.

    Args:
      embeddings: (N, D), floating: the queries, and the gallery too unless one is given. float16 and bfloat16 are
        worked on in float32, float64 in float64; the loss has that dtype, the gradient that of the embeddings.
      labels: (N,), integer: the classes.
      alpha: the negatives' boundary (paper: alpha; PML: `alpha`, whose None is 1 + margin / 2), 0 < alpha <= 2.
      margin: between the two boundaries (paper: m; PML: `margin`), 0 <= margin <= alpha: positives count beyond alpha_P
        = alpha - margin.
      temperature_pos: T_p >= 0 of the positives' weights (PML: `Tp`). 0 treats all non-trivial ones alike.
      temperature_neg: T_n >= 0 of the negatives' weights (PML: `Tn`). The larger, the more the hardest ones count.
      balance: lambda in [0, 1] (PML: `imbalance`).
      pair_term: "distance", or "squared", the 2019 layer's: h is (d^2 - alpha_P^2) / 2 or (alpha^2 - d^2) / 2. The
        weights are exp(T d) in both.
      query_weighting: "uniform": weight_i = 1 / number of queries; those without non-trivial examples count, as 0.
        "mass": weight_i = S_i / sum_k S_k, S_i the sum of both lists' weights w, as in the released layers; 0 where no
        pair is active.
      gallery_gradient: False, as published: in the loss of query i every f_j is a constant. True: a pair moves both its
        ends, and a given `gallery` gets a gradient.
      weight_gradient: False, as published: w and "mass" are constants, so that a pair's gradient at its query is a unit
        vector times its normalised weight (times d_ij for "squared"). True differentiates them, as most ports do
        without saying; with gallery_gradient=True as well, the gradient is the true derivative of the value.
      normalize: L2-normalise embeddings and gallery first. Rows no longer than 1e-12 become 0, with gradient 0.
      where: (N,) bool: False rows are padding, neither query nor gallery, whatever they hold.
      gallery, gallery_labels, gallery_where: (M, D), (M,), (M,) bool: rank these for each query instead of the batch (a
        memory bank, `rll_jax.loss.memory`). No pair is left out then: a query's own copy is a positive at distance 0, which
        is trivial.
      axis_name: of `pmap`, `shard_map` or `vmap`: the gallery is that of all devices together, each passing its own
        rows (of the batch, or of `gallery`: shards of a memory, not copies). See below.
      block_size: rows of queries worked on at a time; None chooses from M. Memory is O(M * block_size).

    Returns:
      A scalar; 0 where all rows are padding.

    Raises:
      TypeError: embeddings not floating, labels not integer, masks not bool, lists instead of arrays.
      ValueError: wrong rank, length or dimension; an empty batch; labels that don't fit int32 without jax_enable_x64; a
        hyper-parameter out of range; an unknown name; a gallery without labels or the reverse. Values that are traced
        are not checked.

    Empty lists and ties: an empty list's term is 0. Examples exactly on a boundary are trivial. A pair at distance 0
    counts in the value and has gradient 0, as it has no direction. So a collapsed batch (all rows equal, several
    classes) has a loss above 0, balance * alpha for "distance", and gradient 0: no direction is better than another.
    The first difference between rows gives every pair its full push. NaN in a valid row comes out as NaN.

    Hyper-parameters may be traced (a schedule on `margin` does not recompile) and are never differentiated. The
    derivative is written by hand (`jax.custom_vjp`): reverse mode, first order. Both products of matrices are computed
    with Precision.HIGHEST, in the value and in the gradient: TF32 on GPUs and bfloat16 on TPUs would move distances by
    1e-2. Pairs so near that |q|^2 + |f|^2 - 2 q.f loses their digits are computed from their difference, one round of a
    loop for each such pair of a query: a batch in which hundreds are that near to one of another class (a few tight
    clusters of mixed classes, say) takes up to a hundred times as long; a wholly collapsed one does not.

    Several devices: each returns its share, times the number of devices, so that `lax.pmean` of values and gradients
    over the axis gives those of the whole batch, also with masks and mass weighting, whose normalisers are global. No
    other collective on the loss inside `value_and_grad`:

        def step(params, images, labels):  # under pmap or shard_map over the axis "batch"
            varying = jax.tree.map(lambda p: lax.pcast(p, "batch", to="varying"), params)  # for check_vma=True
            of = lambda p: ranked_list_loss(model(p, images), labels, axis_name="batch")
            value, gradient = lax.pmean(jax.value_and_grad(of)(varying), "batch")
            return jax.tree.map(lambda p, g: p - rate * g, params, gradient), value

    (Without `pcast` under `vmap`, which does not know such types.)

    Moving from pytorch-metric-learning 2.9: its RankedListLoss is this with gallery_gradient=True and
    weight_gradient=True, but adds 1e-5 per example inside the sums of weights (2 % of L_P at N = 2048), drops pairs at
    distance 0 (so a wrong-class copy, the hardest negative, is ignored), and gives NaN in float16 at T_n = 10. Its
    differentiated weights pull many active negatives nearer.

    Source: arXiv 1903.03238 and the authors' layers of 2019-07 and 2020-06; `cvpr2019`, `caffe2019`, `tpami2020` are
    the settings.
    """
    problem = _problem.make_problem(**locals())
    spec, valid = problem.spec, problem.valid
    if gallery_gradient or (weight_gradient and query_weighting == "mass"):
        t = _blocks.list_terms(spec, *problem.args)
        balance = problem.args[-1].balance
        loss, log_mass = (1 - balance) * t.positive + balance * t.negative, t.log_mass
    else:
        loss, log_mass = _blocks.fixed_gallery_loss(spec, *problem.args)
    if not weight_gradient:
        log_mass = lax.stop_gradient(log_mass)
    weight = _query_weight(query_weighting, log_mass, valid, axis_name)
    share = jnp.sum(weight * jnp.where(valid, loss, 0))
    return share if axis_name is None else share * lax.axis_size(axis_name)


def ranked_list_loss_terms(
    embeddings,
    labels,
    *,
    alpha=1.2,
    margin=0.4,
    temperature_pos=0.0,
    temperature_neg=10.0,
    balance=0.5,
    pair_term="distance",
    query_weighting="uniform",
    gallery_gradient=False,
    weight_gradient=False,
    normalize=True,
    where=None,
    gallery=None,
    gallery_labels=None,
    gallery_where=None,
    axis_name=None,
    block_size=None,
):
    """Per query what `ranked_list_loss` sums, for logs, tests and other reductions; the same arguments and errors.

    Returns:
      `RankedListLossTerms`, each (N,). The loss is sum(weight * ((1 - balance) * positive + balance * negative)); with
        `axis_name` each device returns its own queries' and the sum runs over the devices too, weights being of the
        whole batch and nothing scaled. Differentiable as the loss is: `positive` and `negative` by their query alone,
        unless gallery_gradient; `weight` not at all, unless weight_gradient with query_weighting="mass".
    """
    problem = _problem.make_problem(**locals())
    t, valid = _blocks.list_terms(problem.spec, *problem.args), problem.valid
    log_mass = t.log_mass if weight_gradient else lax.stop_gradient(t.log_mass)
    weight = _query_weight(query_weighting, log_mass, valid, axis_name)
    masked = (
        jnp.where(valid, x, 0) for x in (t.positive, t.negative, t.num_positives, t.num_negatives)
    )
    return RankedListLossTerms(*(x[:, 0] for x in (*masked, weight)))


def ranked_list_loss_of_query(
    query,
    label,
    gallery,
    gallery_labels,
    *,
    alpha=1.2,
    margin=0.4,
    temperature_pos=0.0,
    temperature_neg=10.0,
    balance=0.5,
    pair_term="distance",
    gallery_gradient=False,
    weight_gradient=False,
    normalize=True,
    where=None,
):
    """The loss L_i of one query (D,) against a gallery (M, D): the definition, to read and to test by.

    Plain jax.numpy and autodiff. `label` is an integer scalar; `where` (M,) says which of the gallery count: leave the
    query itself out there. The other arguments are those of `ranked_list_loss`; nothing is checked. For a batch,

        one = lambda q, label, others: ranked_list_loss_of_query(q, label, embeddings, labels, where=others)
        jax.vmap(one)(embeddings, labels, ~jnp.eye(n, dtype=bool)).mean()

    equals `ranked_list_loss(embeddings, labels)`, which takes half the time and needs no N x N matrix.
    """
    dtype = query.dtype if jnp.finfo(query.dtype).bits > 32 else jnp.float32
    q, g = query.astype(dtype), gallery.astype(dtype)
    if normalize:
        q, g = _problem.normalize_rows(q[None])[0], _problem.normalize_rows(g)
    if not gallery_gradient:
        g = lax.stop_gradient(g)
    d2 = jnp.sum((q[None, :] - g) ** 2, axis=1)
    apart = d2 > 0
    d = jnp.where(apart, jnp.sqrt(jnp.where(apart, d2, 1)), 0)  # sqrt has no derivative at 0
    listed = jnp.ones(d.shape, bool) if where is None else where
    alpha_pos = alpha - margin

    def term(listed, hinge, exponent):
        exponent = exponent if weight_gradient else lax.stop_gradient(exponent)
        largest = lax.stop_gradient(jnp.max(exponent, initial=-jnp.inf, where=listed))
        weight = jnp.where(listed, jnp.exp(jnp.where(listed, exponent - largest, 0)), 0)
        return jnp.sum(weight * jnp.where(listed, hinge, 0)) / jnp.where(
            jnp.any(listed), jnp.sum(weight), 1
        )

    size, size_pos, size_neg = d, alpha_pos, alpha
    if pair_term == "squared":
        size, size_pos, size_neg = d2 / 2, alpha_pos**2 / 2, alpha**2 / 2
    same = gallery_labels == label
    positive = term(
        listed & same & ~(d <= alpha_pos), size - size_pos, temperature_pos * (d - alpha_pos)
    )
    negative = term(listed & ~same & ~(d >= alpha), size_neg - size, temperature_neg * (alpha - d))
    return (1 - balance) * positive + balance * negative


def cvpr2019(embeddings, labels, **overrides):
    """The CVPR 2019 paper's: distances, T_p = 0, T_n = 10, alpha = 1.2, margin = 0.4, the mean over the queries.

    The paper writes L_P + lambda L_N with lambda = 1: twice this value and gradient (balance = 0.5). Keywords override.
    """
    return ranked_list_loss(embeddings, labels, **overrides)


def caffe2019(embeddings, labels, **overrides):
    """The released layer of 2019-07: squared pair term, queries weighted by mass; otherwise `cvpr2019`. Keywords override."""
    return ranked_list_loss(
        embeddings, labels, **{"pair_term": "squared", "query_weighting": "mass", **overrides}
    )


def tpami2020(embeddings, labels, *, margin=0.4, **overrides):
    """The released layer of 2020-06 (TPAMI): distances, queries weighted by mass, alpha = 1 + margin / 2.

    The boundaries are centred at 1: alpha follows margin unless given. Keywords override.
    """
    centred = {"alpha": 1 + margin / 2, "margin": margin, "query_weighting": "mass"}
    return ranked_list_loss(embeddings, labels, **{**centred, **overrides})


def _query_weight(query_weighting, log_mass, valid, axis_name):
    def total(x):
        return x if axis_name is None else lax.psum(x, axis_name)

    if query_weighting == "uniform":
        count = total(jnp.sum(valid, dtype=jnp.int32))
        return valid.astype(log_mass.dtype) / jnp.maximum(count, 1).astype(log_mass.dtype)
    active = valid & ~(log_mass == -jnp.inf)
    largest = lax.stop_gradient(jnp.max(jnp.where(active, log_mass, -jnp.inf)))
    largest = largest if axis_name is None else lax.pmax(largest, axis_name)
    mass = jnp.where(
        active,
        jnp.exp(jnp.where(active, log_mass, 0) - jnp.where(largest == -jnp.inf, 0, largest)),
        0,
    )
    return mass / jnp.where(largest == -jnp.inf, 1, total(jnp.sum(mass)))
