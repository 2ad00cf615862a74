"""Against a float64 reference that sorts, written from the definitions."""
import numpy as np
import pytest

from rll_jax import metrics


def by_sorting(embeddings, labels, ks):
    x = embeddings.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    hits, r_precisions, average_precisions, unmatched = [], [], [], 0
    for i in range(len(x)):
        others = np.delete(np.arange(len(x)), i)
        same = labels[others] == labels[i]
        r = int(same.sum())
        if not r:
            unmatched += 1
            continue
        order = np.lexsort((same, -np.round(x[others] @ x[i], 6)))  # of equals, those of other classes first
        relevant = same[order]
        hits.append([relevant[:k].any() for k in ks])
        r_precisions.append(relevant[:r].mean())
        average_precisions.append(np.sum(np.cumsum(relevant[:r]) / np.arange(1, r + 1) * relevant[:r]) / r)
    scores = {f"recall@{k}": v for k, v in zip(ks, np.mean(hits, axis=0))}
    return scores | {
        "r_precision": np.mean(r_precisions), "map@r": np.mean(average_precisions), "queries_without_match": unmatched,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["random", "clustered", "tied", "duplicated", "ragged"])
def test_equals_sorting(kind):
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat(np.arange(150), 4))
    x = rng.normal(size=(600, 16))
    if kind == "clustered":
        x = rng.normal(size=(150, 16))[labels] + 0.7 * x
    if kind == "tied":
        x = np.sign(x[:, :4])
    if kind == "duplicated":
        x = x[rng.integers(0, 200, 600)]
    if kind == "ragged":
        labels = rng.integers(0, 300, 600) ** 2 // 300
    x = x.astype(np.float32)
    ks = (1, 2, 4, 8, 1000)
    expected, found = by_sorting(x, labels, ks), metrics.retrieval_metrics(x, labels, ks=ks)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], abs=1e-6), name


def test_a_tie_counts_against_the_query():
    x = np.ones((4, 3), np.float32)
    scores = metrics.retrieval_metrics(x, np.array([0, 0, 1, 1]), ks=(1, 2, 3))
    assert [scores[f"recall@{k}"] for k in (1, 2, 3)] == [0, 0, 1]


@pytest.mark.parametrize("x, y, text", [
    (np.ones((3, 2)), np.zeros(2, int), r"\(3, 2\) and \(2,\)"),
    (np.array([[1, 2], [np.nan, 1], [1, 1]]), np.zeros(3, int), r"not finite, the first in rows \[1\]"),
    (np.array([[1, 2], [1, 1], [0, 0]]), np.zeros(3, int), r"zero vectors, the first in rows \[2\]"),
    (np.ones((3, 2)), np.arange(3), "no class has two images"),
])  # fmt: skip
def test_errors(x, y, text):
    with pytest.raises(ValueError, match=text):
        metrics.retrieval_metrics(x, y)
    with pytest.raises(ValueError, match="at least 1"):
        metrics.retrieval_metrics(np.eye(4), np.zeros(4, int), ks=(0, 1))


def test_nearest_leaves_the_query_out():
    x = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], np.float32)
    np.testing.assert_array_equal(metrics.nearest(x, 1, np.arange(4))[:, 0], [1, 0, 3, 2])
