"""Intervals of scores: how often they hold the true value, and what they refuse."""

import numpy as np
import pytest

from rll_jax import metrics


def draw_model(rng, hardness, sizes, shift=0.0):
    """Scores of queries whose classes differ in hardness: R-precision is a share of successes."""
    chance = np.clip(np.repeat(hardness, sizes) + shift, 0.01, 0.99)
    hits = rng.random(len(chance)) < chance
    return {
        "query": np.arange(len(chance)),
        "first_rank": np.where(hits, 1, 3),
        "r_precision": chance,
        "average_precision": hits * chance,
    }


@pytest.mark.parametrize("num_classes, trials", [(20, 800), (60, 600)])
def test_coverage(num_classes, trials):
    """The true values are the means over the population that the classes are drawn from."""
    rng = np.random.default_rng(0)
    held = {"score": 0, "difference": 0, "queries": 0}
    for _ in range(trials):
        hardness, sizes = rng.beta(2, 1, num_classes), rng.integers(2, 20, num_classes)
        classes = np.repeat(np.arange(num_classes), sizes)
        model, other = (draw_model(rng, 0.9 * hardness, sizes, shift) for shift in (0.05, 0.0))
        options = {"ks": (1,), "samples": 300, "seed": rng}
        found = metrics.confidence_intervals(model, classes, **options)["recall@1"]
        held["score"] += found.low <= 0.9 * 2 / 3 + 0.05 <= found.high
        paired = metrics.confidence_intervals(model, classes, baseline=other, **options)
        held["difference"] += paired["recall@1"].low <= 0.05 <= paired["recall@1"].high
        if num_classes == 20:
            alone = metrics.confidence_intervals(model, np.arange(len(classes)), **options)
            held["queries"] += alone["recall@1"].low <= 0.9 * 2 / 3 + 0.05 <= alone["recall@1"].high
    # Three standard errors of a share of 0.95 are 0.023.
    assert 0.92 < held["score"] / trials < 0.98, held
    assert 0.92 < held["difference"] / trials < 0.98, held
    # As if queries were independent: too narrow.
    assert held["queries"] / trials < 0.85, held


def test_values_are_the_scores_and_pairs_are_narrow():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(80), 5)
    centres = rng.normal(size=(80, 16))[labels]
    noise = rng.normal(size=(400, 16))
    by_query = [metrics.scores_by_query(centres + s * noise, labels) for s in (1.0, 1.1)]
    found = metrics.confidence_intervals(by_query[0], labels)
    scores = metrics.retrieval_metrics(centres + noise, labels)
    assert {name: interval.value for name, interval in found.items()} == pytest.approx(
        {name: value for name, value in scores.items() if name != "queries_without_match"}
    )
    assert all(i.low <= i.value <= i.high for i in found.values())
    assert found == metrics.confidence_intervals(by_query[0], labels)  # the seed is fixed
    assert found != metrics.confidence_intervals(by_query[0], labels, seed=1)
    paired = metrics.confidence_intervals(*by_query[:1], labels, baseline=by_query[1])["map@r"]
    assert 0 < paired.low < paired.value < paired.high
    assert paired.high - paired.low < 0.6 * (found["map@r"].high - found["map@r"].low)
    same = metrics.confidence_intervals(by_query[0], labels, baseline=by_query[0])
    assert set(same.values()) == {(0, 0, 0)}
    wide = metrics.confidence_intervals(by_query[0], labels, level=0.5)["mrr"]
    assert found["mrr"].low < wide.low < wide.high < found["mrr"].high


@pytest.mark.parametrize(
    "text, change",
    [
        ("at least two classes, found 1", {"classes": np.zeros(6, int)}),
        ("classes must be", {"classes": np.arange(5)}),
        ("same queries", {"baseline": {"query": np.arange(1, 7)}}),
        ("a level between 0 and 1", {"level": 95}),
        ("at least 1", {"samples": 0}),
        ("at least 1", {"ks": (0,)}),
    ],
)
def test_errors(text, change):
    model = draw_model(np.random.default_rng(0), np.full(3, 0.5), [2, 2, 2])
    arguments = {"by_query": model, "classes": np.repeat(np.arange(3), 2), "ks": (1,)} | change
    with pytest.raises(ValueError, match=text):
        metrics.confidence_intervals(**arguments)
