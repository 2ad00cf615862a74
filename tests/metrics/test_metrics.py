"""The metrics against a float64 reference that sorts, and against other libraries."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from rll_jax import metrics
from rll_jax.metrics import _counts, _ranks, _settle, _vectors

KS = (1, 2, 10, 100, 5000)


def by_sorting(queries, query_labels, gallery, gallery_labels, leave_one_out):
    """The scores by their definitions, in float64."""
    q, g = (
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
        for x in (queries, gallery)
    )
    scores, unmatched = [], 0
    for i in range(len(q)):
        others = np.delete(np.arange(len(g)), i) if leave_one_out else np.arange(len(g))
        same = gallery_labels[others] == query_labels[i]
        r = int(same.sum())
        if not r:
            unmatched += 1
            continue
        # Of equally similar items, those of other classes come first.
        relevant = same[np.lexsort((same, -np.round(g[others] @ q[i], 14)))]
        precision = np.cumsum(relevant[:r]) / np.arange(1, r + 1)
        scores.append([relevant[:k].any() for k in KS])
        scores[-1] += [
            np.sum(precision * relevant[:r]) / r,
            relevant[:r].mean(),
            1 / (np.argmax(relevant) + 1),
        ]
    names = [f"recall@{k}" for k in KS] + ["map@r", "r_precision", "mrr"]
    return dict(zip(names, np.mean(scores, axis=0), strict=True)) | {
        "queries_without_match": unmatched
    }


def make(kind):
    rng = np.random.default_rng(1)
    labels, x = rng.integers(0, 150, 700), rng.normal(size=(700, 24))
    if kind == "clustered":
        x = rng.normal(size=(150, 24))[labels] + 0.7 * x
    if kind == "tied":
        x = np.sign(x[:, :5])
    if kind == "duplicated":
        x = x[rng.integers(0, 200, 700)]
    if kind == "collapsed":
        x = np.full((700, 24), 3.0)
    if kind == "nearly collapsed":
        x = 1 + 1e-3 * x
    if kind == "ragged":
        labels = rng.integers(0, 400, 700) ** 2 // 400
    if kind == "large classes":
        labels = rng.integers(0, 4, 700)
    return x.astype(np.float32), labels


KINDS = [
    "random",
    "clustered",
    "tied",
    "duplicated",
    "collapsed",
    "nearly collapsed",
    "ragged",
    "large classes",
]


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_sorting(kind, leave_one_out):
    x, labels = make(kind)
    arguments = (x, labels) if leave_one_out else (x[:400], labels[:400], x[400:], labels[400:])
    expected = by_sorting(*(arguments * 2)[:4], leave_one_out)
    for block_size in (None, 64, 100):
        scores = metrics.retrieval_metrics(*arguments, ks=KS, block_size=block_size)
        assert scores.keys() == expected.keys()
        for name in expected:
            assert scores[name] == pytest.approx(expected[name], abs=1e-12), (name, block_size)
    by_query = metrics.scores_by_query(*arguments)
    assert np.mean(1 / by_query["first_rank"]) == pytest.approx(expected["mrr"], abs=1e-12)
    assert len(by_query["query"]) == len(arguments[0]) - expected["queries_without_match"]


@pytest.mark.parametrize("kind", ["random", "clustered", "tied", "ragged"])
def test_programs_parts_and_x64_change_no_score(kind, monkeypatch):
    """Accelerators count every positive of every query; what is large is taken in parts."""
    x, labels = make(kind)
    expected = metrics.retrieval_metrics(x, labels, ks=KS)
    with jax.enable_x64(True):
        assert metrics.retrieval_metrics(x, labels, ks=KS) == expected
    monkeypatch.setattr(_ranks, "_SIMILARITIES", 60)
    monkeypatch.setattr(_settle, "_SIMILARITIES", 3000)
    assert metrics.retrieval_metrics(x, labels, ks=KS) == expected
    monkeypatch.setattr(_counts, "_by_groups", lambda devices: False)
    assert metrics.retrieval_metrics(x, labels, ks=KS) == expected
    with jax.enable_x64(True):
        assert metrics.retrieval_metrics(x, labels, ks=KS) == expected


def test_near_ties_with_fewer_than_r_negatives_before_the_first_match():
    angles = np.array([0, 0.1, 0.2, 0.4, 0.4 - 1e-9, 0.5] + [2.0] * 150)
    labels = np.array([0, 1, 0, 0, 2, 0, *range(4, 154)])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    by_query = metrics.scores_by_query(x[:1], labels[:1], x[1:], labels[1:])
    found = [by_query[name].item() for name in ("first_rank", "r_precision", "average_precision")]
    assert found == pytest.approx([2, 1 / 3, 1 / 6])


@pytest.mark.parametrize("dim", [800, 1500, 1536, 5000])
def test_copies_of_any_dimension_tie(dim):
    """Float64 products of equal rows differ by their place in a block."""
    rng = np.random.default_rng(dim)
    for copy in (np.ones(dim), np.arange(dim) % 2, rng.integers(0, 256, dim)):
        x = rng.normal(size=(200, dim))
        x[:6] = copy
        labels = np.r_[0, 0, 1, 2, 3, 4, np.arange(5, 199)]
        by_query = metrics.scores_by_query(x, labels)
        assert by_query["first_rank"].tolist() == [5, 5]


def test_few_large_classes_take_no_more_memory_than_their_similarities():
    rng = np.random.default_rng(0)
    labels, x = np.arange(1500) % 3, rng.normal(size=(1500, 64))
    tracemalloc.start()
    metrics.retrieval_metrics(x, labels)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6  # the components of each query's positives: 384 MB


def test_float32_products_are_settled_in_float64():
    """Two negatives are nearer than the positive by less than float32 can tell; one is farther."""
    angles = np.array([0.0, 0.5, 0.5 - 1e-9, 0.5 - 1e-10, 0.5 + 1e-9])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    scores = metrics.retrieval_metrics(
        x[:1], np.array([0]), x[1:], np.array([0, 1, 2, 3]), ks=(2, 3)
    )
    assert (scores["recall@2"], scores["recall@3"], scores["mrr"]) == (0, 1, 1 / 3)


@pytest.mark.parametrize("dim", [2, 8, 64, 512, 2048])
def test_the_band_holds_the_error_of_a_float32_product(dim):
    rng = np.random.default_rng(dim)
    rotation, band = _vectors.rotation_and_band(dim)
    noise = rng.normal(size=(512, dim))
    kinds = [rng.normal(size=dim) + spread * noise for spread in (0.1, 1, 100)]
    kinds += [np.ones((512, dim)), np.sign(noise), (noise > -1) + 1e-3, np.rint(113 + 8 * noise)]
    for x in kinds:
        unit = _vectors.unit_rows(x, rotation=rotation)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        assert np.abs(jnp.matmul(unit, unit.T, precision="highest") - x @ x.T).max() < band / 2


@pytest.mark.parametrize("dim", [500, 512, 1000])
@pytest.mark.parametrize("block_size", [None, 64])
def test_rounding_that_goes_one_way(dim, block_size):
    """Vectors of few values, whose true order is known.

    A plain float32 product gives a collapsed network a Recall@1 of 1.
    """
    labels = np.repeat(np.arange(100), 3)
    scores = metrics.retrieval_metrics(
        np.ones((300, dim), np.float32), labels, ks=(1, 297, 298), block_size=block_size
    )
    assert [scores[f"recall@{k}"] for k in (1, 297, 298)] == [0, 0, 1]
    signs = np.ones((300, dim), np.float32)
    signs[np.arange(300), np.arange(300)] = -1  # each differs from each in two places
    scores = metrics.retrieval_metrics(signs, labels, ks=(1, 298), block_size=block_size)
    assert (scores["recall@1"], scores["recall@298"], scores["mrr"]) == (
        0,
        1,
        pytest.approx(1 / 298),
    )


def test_a_tie_counts_against_the_query():
    x = np.ones((4, 3), np.float32)
    scores = metrics.retrieval_metrics(x, np.array([0, 0, 1, 1]), ks=(1, 2, 3))
    assert [scores[f"recall@{k}"] for k in (1, 2, 3)] == [0, 0, 1]


def test_other_types_and_lengths_of_vectors():
    x, labels = make("clustered")
    expected = metrics.retrieval_metrics(x, labels)
    assert metrics.retrieval_metrics(x * 1e37, labels) == pytest.approx(expected)
    assert metrics.retrieval_metrics(
        x.astype(np.float64) * 1e300, labels.astype(np.uint64)
    ) == pytest.approx(expected)
    assert metrics.retrieval_metrics(jnp.asarray(x), jnp.asarray(labels - 2**30)) == expected
    coarse = np.asarray(jnp.asarray(x, jnp.bfloat16))
    assert metrics.retrieval_metrics(coarse, labels) == metrics.retrieval_metrics(
        coarse.astype(np.float32), labels
    )


def test_equals_pytorch_metric_learning():
    torch = pytest.importorskip("torch", reason="the peer is not installed")
    pytest.importorskip("faiss", reason="the peer's search is not installed")
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    include = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
    calculator = AccuracyCalculator(include=include, k="max_bin_count", device=torch.device("cpu"))
    for kind in ("random", "clustered", "ragged"):
        x, labels = make(kind)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        ours = metrics.retrieval_metrics(x, labels)
        theirs = calculator.get_accuracy(torch.from_numpy(x), torch.from_numpy(labels))
        pairs = {
            "recall@1": "precision_at_1",
            "map@r": "mean_average_precision_at_r",
            "r_precision": "r_precision",
        }
        for name, peer in pairs.items():
            assert ours[name] == pytest.approx(theirs[peer], abs=1e-5), (kind, name)


def test_clustering():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(20), 10))
    far_apart = rng.normal(size=(20, 32))[labels] + 0.01 * rng.normal(size=(200, 32))
    assert metrics.clustering_metrics(far_apart, labels) == pytest.approx(
        {"nmi": 1, "f1": 1, "ami": 1}
    )
    noise = rng.normal(size=(200, 32))
    scores = metrics.clustering_metrics(noise, labels, seed=3)
    assert (
        scores
        == metrics.clustering_metrics(noise, labels, seed=3)
        != metrics.clustering_metrics(noise, labels, seed=4)
    )
    assert 0.2 < scores["nmi"] < 0.7 and abs(scores["ami"]) < 0.1 and scores["f1"] < 0.2


def test_pairwise_f1_by_counting_pairs(monkeypatch):
    """Against the definition, on the very clusters that the function found."""
    seen = []
    normalized_mutual_info_score = sklearn.metrics.normalized_mutual_info_score

    def recorded(labels, clusters):
        seen.append(clusters)
        return normalized_mutual_info_score(labels, clusters)

    monkeypatch.setattr(sklearn.metrics, "normalized_mutual_info_score", recorded)
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 8, 60)
    x = rng.normal(size=(8, 5))[labels] + 0.8 * rng.normal(size=(60, 5))
    scores = metrics.clustering_metrics(x, labels)
    upper = np.triu_indices(60, 1)
    same_class, same_cluster = ((y[:, None] == y[None, :])[upper] for y in (labels, seen[0]))
    both = np.sum(same_class & same_cluster)
    precision, recall = both / same_cluster.sum(), both / same_class.sum()
    assert scores["f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_every_image_alone_and_all_of_one_class():
    x = np.eye(6, dtype=np.float32)
    assert metrics.clustering_metrics(x, np.arange(6)) == {"nmi": 1, "f1": 0, "ami": 1}
    assert metrics.clustering_metrics(x, np.zeros(6, int)) == {"nmi": 1, "f1": 1, "ami": 1}


X, Y = np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1])
_UNIQUE = r"labels must be integers: use numpy.unique\(..., return_inverse=True\)"


@pytest.mark.parametrize(
    "error, text, arguments, options",
    [
        (ValueError, r"\(4, 4\) and \(3,\)", (X, Y[:3]), {}),
        (
            ValueError,
            r"1 of 4 rows of queries are not finite, the first: \[2\]",
            (np.where(X * [0, 0, 1, 0], np.nan, X), Y),
            {},
        ),
        (
            ValueError,
            r"2 of 4 rows of queries are zero vectors, the first: \[2, 3\]",
            (X * [[1], [1], [0], [0]], Y),
            {},
        ),
        (ValueError, "no class has two images", (X, np.arange(4)), {}),
        (ValueError, "no query's class is in the gallery", (X, Y, X, Y + 2), {}),
        (ValueError, "queries must be .* not empty", (X[:0], Y[:0]), {}),
        (ValueError, "gallery must be .* not empty", (X, Y, X[:0], Y[:0]), {}),
        (TypeError, "int64 and uint64", (X, Y, X, Y.astype(np.uint64)), {}),
        (ValueError, "go together", (X, Y, X), {}),
        (ValueError, "4 dimensions and gallery 3", (X, Y, X[:3, :3], Y[:3]), {}),
        (ValueError, r"at least 1, found \(0, 1\)", (X, Y), {"ks": (0, 1)}),
        (ValueError, r"at least 1, found \(1.5,\)", (X, Y), {"ks": (1.5,)}),
        (ValueError, "block_size must be an integer from 1", (X, Y), {"block_size": 0}),
        (TypeError, "queries must be floating, found int64", (X.astype(int), Y), {}),
        (TypeError, f"query_{_UNIQUE}.* found float64", (X, Y * 1.0), {}),
        (TypeError, _UNIQUE, (X, list("aabb")), {}),
        (TypeError, _UNIQUE, (X, np.array(list("aabb"), object)), {}),
        (TypeError, f"gallery_{_UNIQUE}", (X, Y, X, np.array(list("aabb"))), {}),
    ],
)
def test_errors(error, text, arguments, options):
    with pytest.raises(error, match=text):
        metrics.retrieval_metrics(*arguments, **options)


def test_clustering_refuses_texts():
    with pytest.raises(TypeError, match=_UNIQUE):
        metrics.clustering_metrics(X, list("aabb"))


def test_nearest():
    x = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [2, 0]], np.float32)
    rows, similarities = metrics.nearest(x, x, 3)
    # Of equally similar items the lower row comes first.
    np.testing.assert_array_equal(rows[:, :2], [[0, 4], [1, 0], [2, 3], [3, 2], [0, 4]])
    np.testing.assert_allclose(similarities[:, 0], 1, rtol=1e-6)
    assert (np.diff(similarities, axis=1) <= 0).all()
    many = np.random.default_rng(0).normal(size=(600, 8))
    rows, _ = metrics.nearest(many, many[:40], 40)
    unit = many / np.linalg.norm(many, axis=1, keepdims=True)
    np.testing.assert_array_equal(rows, np.argsort(-unit @ unit[:40].T, axis=1))
    rows, similarities = metrics.nearest(x, x, 2, leave_out=np.arange(5))
    np.testing.assert_array_equal(rows, [[4, 1], [0, 4], [3, 1], [2, 1], [0, 1]])  # the copy stays
    assert np.isfinite(similarities).all()
    groups = np.array([0, 1, 2, 2, 0])
    rows, similarities = metrics.nearest(x, x, 4, query_groups=groups, gallery_groups=groups)
    np.testing.assert_array_equal(rows[0, :3], [1, 3, 2])  # neither itself nor its copy
    assert np.isfinite(similarities[0, :3]).all() and similarities[0, 3] == -np.inf
    with pytest.raises(ValueError, match="go together"):
        metrics.nearest(x, x, 1, query_groups=groups)
    ids, others = np.array(list("abcca")), np.arange(5)
    given = {"query_groups": others, "gallery_groups": others}
    by_id = metrics.nearest(x, x, 4, query_ids=ids, gallery_ids=ids, **given)
    np.testing.assert_array_equal(by_id, (rows, similarities))  # an id leaves out as a group does
    with pytest.raises(ValueError, match="query_ids and gallery_ids go together"):
        metrics.nearest(x, x, 1, gallery_ids=ids)
    for k, leave_out, text in (
        (6, None, "k from 1 to 5"),
        (5, np.arange(5), "k from 1 to 4"),
        (1, [5] * 5, "from 0 to 4"),
        (1, [0.0] * 5, "float64"),
        (1, [0], r"\(5,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            metrics.nearest(x, x, k, leave_out=leave_out)
    with pytest.raises(
        ValueError, match=r"1 of 5 rows of gallery are zero vectors, the first: \[2\]"
    ):
        metrics.nearest(x, x * [[1], [1], [0], [1], [1]], 1)
