"""Ranked List Loss in float64 numpy loops, value and gradient, written from its equations.

The equations are those at the top of `rll_jax/loss/ranked_list.py`. Slow and plain on purpose. Two
switches reproduce pytorch-metric-learning 2.9: `epsilon` is added to each weight inside the sums,
once per example of the batch, and `drop_zero` leaves out pairs at distance 0.
"""

import dataclasses
import math
from typing import NamedTuple

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


@dataclasses.dataclass(frozen=True)
class Options:
    alpha: float
    margin: float
    temperature_pos: float
    temperature_neg: float
    balance: float
    pair_term: str
    query_weighting: str
    gallery_gradient: bool
    weight_gradient: bool
    epsilon: float
    drop_zero: bool

    @property
    def boundary(self):
        return self.alpha - self.margin

    def is_listed(self, distance, same):
        if self.drop_zero and distance == 0:
            return False
        return distance > self.boundary if same else distance < self.alpha

    def exponent(self, distance, same):
        if same:
            return self.temperature_pos * (distance - self.boundary)
        return self.temperature_neg * (self.alpha - distance)

    def hinge(self, distance, same):
        if self.pair_term == "squared":
            if same:
                return (distance * distance - self.boundary**2) / 2
            return (self.alpha**2 - distance * distance) / 2
        return distance - self.boundary if same else self.alpha - distance

    def slope(self, distance):
        """|derivative of the hinge|."""
        return distance if self.pair_term == "squared" else 1.0


class Pair(NamedTuple):
    column: int
    distance: float
    same: bool
    share: float  # its weight over the sum of the list's
    exponent: float


class Query(NamedTuple):
    terms: dict  # {True: L_P, False: L_N}
    counts: dict  # {True: |P*|, False: |N*|}
    log_mass: float
    pairs: list


def unit(x):
    lengths = np.array([math.sqrt(sum(v * v for v in row)) for row in x])
    rows = [row / r if r > 1e-12 else 0 * row for row, r in zip(x, lengths, strict=True)]
    return np.array(rows), lengths


def through_unit(x, gradient):
    """Gradient with respect to the raw rows from that with respect to the unit rows."""
    y, lengths = unit(x)
    rows = zip(y, gradient, lengths, strict=True)
    return np.array([(g - v * (v @ g)) / r if r > 1e-12 else 0 * g for v, g, r in rows]).reshape(
        x.shape
    )


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
    options = Options(
        alpha,
        margin,
        temperature_pos,
        temperature_neg,
        balance,
        pair_term,
        query_weighting,
        gallery_gradient,
        weight_gradient,
        epsilon,
        drop_zero,
    )
    own = gallery is None
    where = np.ones(len(embeddings), bool) if where is None else where
    if own:
        gallery, gallery_labels, gallery_where = embeddings, labels, where
    elif gallery_where is None:
        gallery_where = np.ones(len(gallery), bool)
    raw = np.where(where[:, None], np.asarray(embeddings, np.float64), 0.0)
    raw_gallery = np.where(gallery_where[:, None], np.asarray(gallery, np.float64), 0.0)
    f, g = (unit(raw)[0], unit(raw_gallery)[0]) if normalize else (raw, raw_gallery)

    queries = []
    for i in range(len(f)):
        columns = [
            (j, bool(labels[i] == gallery_labels[j]))
            for j in range(len(g))
            if where[i] and gallery_where[j] and not (own and i == j)
        ]
        queries.append(rank(f[i], g, columns, options))
    weight = query_weights(queries, where, query_weighting)
    loss = float(
        sum(w * v for w, v in zip(weight, (loss_of(q, options) for q in queries), strict=True))
    )

    on_query, on_gallery = gradients(f, g, queries, weight, loss, options)
    if own:
        on_query, on_gallery = on_query + on_gallery, np.zeros_like(g)
    if normalize:
        on_query, on_gallery = through_unit(raw, on_query), through_unit(raw_gallery, on_gallery)
    return Result(
        loss,
        on_query,
        on_gallery,
        positive=np.array([q.terms[True] for q in queries]),
        negative=np.array([q.terms[False] for q in queries]),
        num_positives=np.array([q.counts[True] for q in queries]),
        num_negatives=np.array([q.counts[False] for q in queries]),
        weight=weight,
    )


def rank(query, gallery, columns, options):
    """The lists of one query; `columns` are (row of the gallery, whether it shares the class)."""
    lists = {True: [], False: []}
    for j, same in columns:
        distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(query, gallery[j], strict=True)))
        if options.is_listed(distance, same):
            lists[same].append((j, distance, options.exponent(distance, same)))
    terms, logs, pairs = {True: 0.0, False: 0.0}, [], []
    for same, entries in lists.items():
        if not entries:
            continue
        largest = max(e for _, _, e in entries)
        total = sum(math.exp(e - largest) for _, _, e in entries)
        padded = total + options.epsilon * len(gallery) * math.exp(-largest)
        hinges = sum(math.exp(e - largest) * options.hinge(d, same) for _, d, e in entries)
        terms[same] = hinges / padded
        logs.append(largest + math.log(total))
        pairs += [Pair(j, d, same, math.exp(e - largest) / padded, e) for j, d, e in entries]
    log_mass = -math.inf
    if logs:
        log_mass = max(logs) + math.log(sum(math.exp(x - max(logs)) for x in logs))
    return Query(terms, {same: len(entries) for same, entries in lists.items()}, log_mass, pairs)


def loss_of(query, options):
    return (1 - options.balance) * query.terms[True] + options.balance * query.terms[False]


def query_weights(queries, where, query_weighting):
    if query_weighting == "uniform":
        return where / max(where.sum(), 1)
    log_mass = np.array([query.log_mass for query in queries])
    if not np.isfinite(log_mass).any():
        return np.zeros(len(queries))
    weight = np.exp(log_mass - log_mass.max())
    return weight / weight.sum()


def gradients(f, g, queries, weight, loss, options):
    """The gradients by the rows of the queries and of the gallery."""
    on_query, on_gallery = np.zeros_like(f), np.zeros_like(g)
    for i, query in enumerate(queries):
        for pair in query.pairs:
            by_distance = weight[i] * derivative(query, pair, loss, options)
            if pair.distance > 0:
                push = by_distance * (f[i] - g[pair.column]) / pair.distance
                on_query[i] += push
                if options.gallery_gradient:
                    on_gallery[pair.column] -= push
    return on_query, on_gallery


def derivative(query, pair, loss, options):
    """The derivative of the loss by a pair's distance, for a query of weight 1."""
    if pair.same:
        share, temperature, sign = 1 - options.balance, options.temperature_pos, 1
    else:
        share, temperature, sign = options.balance, options.temperature_neg, -1
    rate = options.slope(pair.distance)
    if options.weight_gradient:
        rate += temperature * (options.hinge(pair.distance, pair.same) - query.terms[pair.same])
    by_distance = share * pair.share * sign * rate
    if options.weight_gradient and options.query_weighting == "mass":
        mass_share = math.exp(pair.exponent - query.log_mass)
        by_distance += (loss_of(query, options) - loss) * sign * temperature * mass_share
    return by_distance
