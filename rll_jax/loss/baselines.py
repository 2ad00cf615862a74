"""The losses that Ranked List Loss is compared with, as pytorch-metric-learning (PML) 2.9 computes them: to 1e-6 in float64.

Each takes (embeddings (N, D) floating, labels (N,) integer) first and by keyword its own options, and

    where: (N,) bool or None: rows with False are padding, whatever they hold.
    axis_name: of `pmap`, `shard_map` or `vmap`, or None: the batch is that of all devices together, each passing its own rows. Each
      device returns the loss of the whole batch; `lax.pmean` of values and gradients gives those of one device, as for `rll_jax.loss`,
      from whose docstring the step can be taken. Every device works on all the pairs: a baseline, not for the largest batches.

and returns a scalar. Embeddings are L2-normalised inside. float16 and bfloat16 are worked on in float32, float64
in float64; products have Precision.HIGHEST. Gradients are finite, also at copies and in batches of one class. A loss without anything
to sum is 0. The gradient flows to all rows, and by autodiff. TypeError and ValueError as `rll_jax.loss.ranked_list_loss` raises them for
arrays of a wrong shape or dtype.

This module imports jax and numpy alone.
"""

import jax
from jax import lax
import jax.numpy as jnp

from rll_jax.loss import _pairs, _problem

__all__ = [
    "contrastive_loss",
    "lifted_structure_loss",
    "multi_similarity_loss",
    "n_pair_loss",
    "nt_xent_loss",
    "pml_ranked_list_loss",
    "proxy_anchor_loss",
    "sup_con_loss",
    "triplet_loss",
]


def contrastive_loss(
    embeddings, labels, *, pos_margin=0.0, neg_margin=1.0, where=None, axis_name=None
):
    """Contrastive loss (Hadsell, Chopra, LeCun, CVPR 2006) with margins on the distance, not its square.

    The mean of the positive pairs' [d - pos_margin]_+ and that of the negative pairs' [neg_margin - d]_+, each over those above 0, added.
    PML: ContrastiveLoss.
    """
    x, same, other, _ = _batch(embeddings, labels, where, axis_name)
    d = _distances(x)
    return _mean_above_zero(d - pos_margin, same) + _mean_above_zero(neg_margin - d, other)


def triplet_loss(embeddings, labels, *, margin=0.2, mining="semihard", where=None, axis_name=None):
    """Triplet loss: the mean of [d_ap - d_an + margin]_+ over the chosen triplets for which it is above 0.

    Args:
      mining: "semihard": triplets with d_ap < d_an (Schroff et al., FaceNet, CVPR 2015; all of them, not one for each positive). "hard":
        for each anchor its farthest positive and its nearest negative (Hermans et al., arXiv 1703.07737, "batch hard"; ties share the
        gradient). "all": all triplets.

    PML: TripletMarginLoss(margin) after TripletMarginMiner(margin, "semihard"), after BatchHardMiner, or alone. Memory is that of N x N
    matrices, time N^3 for "semihard" and "all".
    """
    if mining not in ("semihard", "hard", "all"):
        raise ValueError(f"mining: found {mining!r}, expected 'semihard', 'hard' or 'all'")
    x, same, other, _ = _batch(embeddings, labels, where, axis_name)
    d = _distances(x)
    if mining == "hard":
        far, near = (
            jnp.max(d, axis=1, initial=0, where=same),
            jnp.min(d, axis=1, initial=4, where=other),
        )
        return _mean_above_zero(far - near + margin, same.any(axis=1) & other.any(axis=1))

    def of_anchor(row):  # one (N, N) matrix at a time, computed again for the gradient
        d, same, other = row
        pairs = d[:, None] - d[None, :]
        chosen = same[:, None] & other[None, :] & (pairs + margin > 0)
        chosen &= (pairs < 0) | (mining == "all")
        return jnp.sum(jnp.where(chosen, pairs + margin, 0)), jnp.sum(chosen, dtype=jnp.int32)

    total, count = lax.map(jax.checkpoint(of_anchor), (d, same, other))
    return jnp.sum(total) / jnp.maximum(jnp.sum(count.astype(d.dtype)), 1)


def lifted_structure_loss(
    embeddings, labels, *, pos_margin=0.0, neg_margin=1.0, where=None, axis_name=None
):
    """Lifted structured embedding (Song et al., CVPR 2016, equation 4).

    The mean over the ordered positive pairs (i, j) of [log sum_k exp(neg_margin - d_ik) + sum_k exp(neg_margin - d_jk) + d_ij -
    pos_margin]_+^2 / 2, k of the negatives of i and of j. PML: LiftedStructureLoss.
    """
    x, same, other, _ = _batch(embeddings, labels, where, axis_name)
    d = _distances(x)
    of_row = _log_sum_exp(neg_margin - d, other)
    pushed = jnp.logaddexp(of_row[:, None], of_row[None, :])
    usable = same & other.any(axis=1)[:, None]
    return _mean(jnp.maximum(jnp.where(usable, pushed, 0) + d - pos_margin, 0) ** 2 / 2, usable)


def n_pair_loss(embeddings, labels, *, scale=1.0, normalize=True, where=None, axis_name=None):
    """Multi-class N-pair loss (Sohn, NIPS 2016, equation 7), without its penalty on the norms.

    The first two rows of each class are its pair; the mean over the classes of the cross entropy of the anchor's inner products with all
    positives, times `scale`. The paper has it without `normalize`; unit vectors want a scale, as of a temperature. PML: NPairsLoss,
    which normalises, at scale 1.
    """
    x, same, _, valid = _batch(embeddings, labels, where, axis_name, normalize)
    earlier = jnp.tril(same, -1).any(axis=1)
    anchor = valid & ~earlier & same.any(axis=1)
    positives = x[jnp.argmax(same, axis=1)]
    logits = jnp.where(anchor[None, :], scale * _pairs.dot(x, positives, ((1,), (1,))), -jnp.inf)
    logits = jnp.where(
        anchor[:, None], logits, 0
    )  # rows that are no anchors: finite, and masked below
    return _mean(jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits), anchor)


def multi_similarity_loss(
    embeddings, labels, *, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1, where=None, axis_name=None
):
    """Multi-similarity loss with its mining (Wang et al., CVPR 2019, equations 11 to 13), on cosine similarities.

    Args:
      alpha, beta, base: of the positives, of the negatives, and the threshold (lambda in the paper).
      epsilon: positives count that are less similar than the most similar negative plus epsilon, and negatives that are more similar
        than the least similar positive less epsilon. None: all count.

    The mean is over all rows. PML: MultiSimilarityLoss, with MultiSimilarityMiner(epsilon) or without.
    """
    _positive(alpha=alpha, beta=beta)
    x, same, other, valid = _batch(embeddings, labels, where, axis_name)
    s = _pairs.dot(x, x, ((1,), (1,)))
    if epsilon is not None:
        fixed = lax.stop_gradient(s)
        nearest_other = jnp.max(fixed, axis=1, keepdims=True, initial=-jnp.inf, where=other)
        farthest_same = jnp.min(fixed, axis=1, keepdims=True, initial=jnp.inf, where=same)
        same, other = (
            same & (fixed - epsilon < nearest_other),
            other & (fixed + epsilon > farthest_same),
        )
    pulled = _log_one_plus_sum_exp(alpha * (base - s), same) / alpha
    pushed = _log_one_plus_sum_exp(beta * (s - base), other) / beta
    return _mean(pulled + pushed, valid)


def proxy_anchor_loss(
    embeddings, labels, proxies, *, margin=0.1, alpha=32.0, where=None, axis_name=None
):
    """Proxy anchor loss (Kim et al., CVPR 2020, equation 4), on cosine similarities.

    Args:
      labels: (N,) of 0 to C - 1; a row of any other is a negative of all proxies.
      proxies: (C, D) floating, to be trained; the same on all devices. PML's and the authors' begin as normal with variance 2 / C.
      margin, alpha: the paper's delta and alpha.

    PML: ProxyAnchorLoss.
    """
    x, _, _, valid = _batch(embeddings, labels, where, axis_name)
    if not hasattr(proxies, "dtype") or not jnp.issubdtype(proxies.dtype, jnp.floating):
        raise TypeError(
            f"proxies must be a floating array: found {getattr(proxies, 'dtype', type(proxies).__name__)}"
        )
    if proxies.ndim != 2 or proxies.shape[1] != x.shape[1] or not proxies.shape[0]:
        raise ValueError(
            f"proxies must go with embeddings: found shape {proxies.shape}, expected (C, {x.shape[1]})"
        )
    labels = _gathered(jnp.asarray(labels), axis_name)
    s = _pairs.dot(x, _problem.normalize_rows(proxies.astype(x.dtype)), ((1,), (1,)))
    own = labels[:, None] == jnp.arange(proxies.shape[0])
    same, other = own & valid[:, None], ~own & valid[:, None]
    pulled = _log_one_plus_sum_exp(alpha * (margin - s), same, axis=0)
    pushed = _log_one_plus_sum_exp(alpha * (s + margin), other, axis=0)
    return _mean(pulled, same.any(axis=0)) + jnp.mean(pushed)


def nt_xent_loss(embeddings, labels, *, temperature=0.07, where=None, axis_name=None):
    """NT-Xent (Sohn 2016; SimCLR, Chen et al., ICML 2020, equation 1), for any number of positives.

    The mean over the ordered positive pairs of the cross entropy of that positive among it and the query's negatives. PML: NTXentLoss.
    """
    _positive(temperature=temperature)
    x, same, other, _ = _batch(embeddings, labels, where, axis_name)
    s = _pairs.dot(x, x, ((1,), (1,))) / temperature
    usable = same & other.any(axis=1)[:, None]
    return _mean(jax.nn.softplus(_log_sum_exp(s, other)[:, None] - s), usable)


def sup_con_loss(embeddings, labels, *, temperature=0.1, where=None, axis_name=None):
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020, equation 2, L_out).

    Per query the mean over its positives of -log softmax over all others; the mean over the queries for which that is above 0. A batch
    of one class is 0. PML: SupConLoss.
    """
    _positive(temperature=temperature)
    x, same, other, _ = _batch(embeddings, labels, where, axis_name)
    s = _pairs.dot(x, x, ((1,), (1,))) / temperature
    log_total = _log_sum_exp(s, same | other)[:, None]
    count = jnp.sum(same, axis=1).astype(s.dtype)
    of_query = jnp.sum(jnp.where(same, log_total - s, 0), axis=1) / jnp.maximum(count, 1)
    return _mean_above_zero(of_query, same.any(axis=1) & other.any())


def pml_ranked_list_loss(
    embeddings,
    labels,
    *,
    alpha=1.2,
    margin=0.4,
    temperature_pos=0.0,
    temperature_neg=10.0,
    balance=0.5,
    where=None,
    axis_name=None,
):
    """What pytorch-metric-learning 2.9 calls RankedListLoss, its differences from the paper included, to compare with.

    The weights are differentiated, both ends of a pair move, 1e-5 is added to each of a query's weights before they are summed, and pairs
    at distance 0 are left out. Its names: Tp, Tn, imbalance. For the paper's loss see `rll_jax.loss.ranked_list_loss`.
    """
    x, same, other, valid = _batch(embeddings, labels, where, axis_name)
    d = _distances(x)

    def term(listed, hinge, exponent):
        weight = jnp.where(listed, jnp.exp(jnp.where(listed, exponent, 0)), 0)
        epsilon = 1e-5 * jnp.sum(valid, dtype=d.dtype)
        return jnp.sum(weight * jnp.where(listed, hinge, 0), axis=1) / (
            jnp.sum(weight, axis=1) + epsilon
        )

    alpha_pos = alpha - margin
    positive = term(
        same & (d > alpha_pos) & (d > 0), d - alpha_pos, temperature_pos * (d - alpha_pos)
    )
    negative = term(other & (d < alpha) & (d > 0), alpha - d, temperature_neg * (alpha - d))
    return _mean((1 - balance) * positive + balance * negative, valid)


def _positive(**values):
    for name, value in values.items():
        if not isinstance(value, jax.core.Tracer) and not value > 0:
            raise ValueError(f"{name} out of range: found {value}, expected {name} > 0")


def _batch(embeddings, labels, where, axis_name, normalize=True):
    """All devices' rows; which pairs are positive (not a row with itself) and negative, (N, N); which rows are valid, (N,)."""
    _problem.check_rows("embeddings", embeddings, "labels", labels, "where", where)
    embeddings, labels = jnp.asarray(embeddings), jnp.asarray(labels)
    x = embeddings.astype(jnp.promote_types(embeddings.dtype, jnp.float32))
    valid = jnp.ones(labels.shape, bool) if where is None else jnp.asarray(where)
    x = jnp.where(valid[:, None], x, 0)
    x = _problem.normalize_rows(x) if normalize else x
    x, labels, valid = (_gathered(a, axis_name) for a in (x, labels, valid))
    both = valid[:, None] & valid[None, :]
    match = labels[:, None] == labels[None, :]
    return x, both & match & ~jnp.eye(len(labels), dtype=bool), both & ~match, valid


def _gathered(x, axis_name):
    return x if axis_name is None else lax.all_gather(x, axis_name, tiled=True)


def _distances(x):
    x = x - lax.stop_gradient(
        jnp.mean(x, axis=0)
    )  # rows that are near each other keep their digits
    size = jnp.sum(x * x, axis=1)
    both = size[:, None] + size[None, :]
    d2 = jnp.maximum(both - 2 * _pairs.dot(x, x, ((1,), (1,))), 0)
    apart = d2 > 4 * jnp.finfo(x.dtype).eps * both  # nearer ones are rounding: no direction
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, d2, 1)), 0)


def _mean(values, chosen):
    count = jnp.sum(chosen, dtype=jnp.int32).astype(values.dtype)
    return jnp.sum(jnp.where(chosen, values, 0)) / jnp.maximum(count, 1)


def _mean_above_zero(values, chosen):
    return _mean(values, chosen & (values > 0))


def _log_sum_exp(x, chosen, axis=1):
    """-inf where none is chosen, with gradient 0."""
    some = chosen.any(axis=axis)
    x = jnp.where(jnp.expand_dims(some, axis), jnp.where(chosen, x, -jnp.inf), 0)
    return jnp.where(some, jax.nn.logsumexp(x, axis=axis), -jnp.inf)


def _log_one_plus_sum_exp(x, chosen, axis=1):
    return jax.nn.softplus(_log_sum_exp(x, chosen, axis))
