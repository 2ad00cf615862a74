"""Ranked List Loss in float64 numpy loops, value and gradient, written from the equations (shared/rll_reference.md, section 1).

Slow and plain on purpose. Two switches reproduce pytorch-metric-learning 2.9: `epsilon` added to each weight inside the sums (once per
example of the batch), and `drop_zero` for pairs at distance 0, which it leaves out.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class Result:
    loss: float
    gradient: np.ndarray  # (N, D) of the embeddings
    gallery_gradient: np.ndarray  # (M, D) of a given gallery
    positive: np.ndarray
    negative: np.ndarray
    num_positives: np.ndarray
    num_negatives: np.ndarray
    weight: np.ndarray


def unit(x):
    lengths = np.array([math.sqrt(sum(v * v for v in row)) for row in x])
    return np.array([row / r if r > 1e-12 else 0 * row for row, r in zip(x, lengths)]), lengths


def through_unit(x, gradient):
    """Gradient with respect to the raw rows from that with respect to the unit rows."""
    y, lengths = unit(x)
    return np.array(
        [(g - v * (v @ g)) / r if r > 1e-12 else 0 * g for v, g, r in zip(y, gradient, lengths)]
    ).reshape(x.shape)


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
    epsilon=0.0,
    drop_zero=False,
):
    embeddings = np.asarray(embeddings, np.float64)
    own = gallery is None
    raw_gallery = embeddings if own else np.asarray(gallery, np.float64)
    gallery_labels = labels if own else gallery_labels
    n, m = len(embeddings), len(raw_gallery)
    where = np.ones(n, bool) if where is None else where
    gallery_where = where if own else (np.ones(m, bool) if gallery_where is None else gallery_where)
    f = np.where(where[:, None], embeddings, 0.0)
    raw_gallery = np.where(gallery_where[:, None], raw_gallery, 0.0)
    g = raw_gallery
    if normalize:
        f, g = unit(f)[0], unit(raw_gallery)[0]
    boundary = alpha - margin

    def hinge(d, is_pos):
        if pair_term == "squared":
            return (d * d - boundary**2) / 2 if is_pos else (alpha**2 - d * d) / 2
        return d - boundary if is_pos else alpha - d

    def slope(d):
        """|derivative of the hinge|."""
        return d if pair_term == "squared" else 1.0

    positive, negative, log_mass = np.zeros(n), np.zeros(n), np.full(n, -np.inf)
    counts = np.zeros((2, n), int)
    lists = []
    for i in range(n):
        found = {True: [], False: []}
        for j in range(m):
            if not where[i] or not gallery_where[j] or (own and i == j):
                continue
            d = math.sqrt(sum((a - b) ** 2 for a, b in zip(f[i], g[j])))
            same = bool(labels[i] == gallery_labels[j])
            if drop_zero and d == 0:
                continue
            if (same and d > boundary) or (not same and d < alpha):
                exponent = (
                    temperature_pos * (d - boundary) if same else temperature_neg * (alpha - d)
                )
                found[same].append((j, d, exponent))
        terms, logs, pairs = {}, [], []
        for same, entries in found.items():
            terms[same] = 0.0
            if entries:
                largest = max(e for _, _, e in entries)
                total = sum(math.exp(e - largest) for _, _, e in entries)
                padded = total + epsilon * m * math.exp(-largest)
                terms[same] = (
                    sum(math.exp(e - largest) * hinge(d, same) for _, d, e in entries) / padded
                )
                logs.append(largest + math.log(total))
                pairs += [(j, d, same, math.exp(e - largest) / padded, e) for j, d, e in entries]
        positive[i], negative[i] = terms[True], terms[False]
        counts[:, i] = len(found[True]), len(found[False])
        if logs:
            log_mass[i] = max(logs) + math.log(sum(math.exp(x - max(logs)) for x in logs))
        lists.append(pairs)

    per_query = (1 - balance) * positive + balance * negative
    if query_weighting == "uniform":
        weight = where / max(where.sum(), 1)
    elif np.isfinite(log_mass).any():
        weight = np.exp(log_mass - log_mass.max())
        weight = weight / weight.sum()
    else:
        weight = np.zeros(n)
    loss = float(sum(w * v for w, v in zip(weight, per_query)))

    on_query, on_gallery = np.zeros_like(f), np.zeros_like(g)
    for i, pairs in enumerate(lists):
        for j, d, same, p, exponent in pairs:
            share, term, temperature, sign = (
                (1 - balance, positive[i], temperature_pos, 1)
                if same
                else (balance, negative[i], temperature_neg, -1)
            )
            rate = slope(d)
            if weight_gradient:
                rate += temperature * (hinge(d, same) - term)
            by_distance = weight[i] * share * p * sign * rate
            if weight_gradient and query_weighting == "mass":
                by_distance += (
                    weight[i]
                    * (per_query[i] - loss)
                    * sign
                    * temperature
                    * math.exp(exponent - log_mass[i])
                )
            if d > 0:
                on_query[i] += by_distance * (f[i] - g[j]) / d
                if gallery_gradient:
                    on_gallery[j] -= by_distance * (f[i] - g[j]) / d
    if own:
        on_query, on_gallery = on_query + on_gallery, np.zeros_like(g)
    if normalize:
        on_query = through_unit(np.where(where[:, None], embeddings, 0.0), on_query)
        on_gallery = through_unit(raw_gallery, on_gallery)
    return Result(loss, on_query, on_gallery, positive, negative, *counts, weight)
