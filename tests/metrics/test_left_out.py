"""Who may answer whom: ids and groups, against a float64 sort and re-identification's protocol."""

import numpy as np
import pytest

from rll_jax import metrics

KS = (1, 2, 10, 100)
N, QUERIES = 500, 180


def make(kind, seed=0):
    """Embeddings, labels, ids and groups of N items."""
    rng = np.random.default_rng(seed)
    labels, ids = rng.integers(0, 60, N), np.arange(N)
    x = rng.normal(size=(60, 16))[labels] + 1.2 * rng.normal(size=(N, 16))
    groups = rng.integers(0, 6, N)  # cameras, which see all classes
    if kind == "groups in classes":
        groups = 6 * labels + groups
    if kind == "groups of one":
        groups = np.arange(N)
    if kind == "one group a class":
        groups = np.where(labels < 30, labels, np.arange(N) + 100)
    if kind == "ids twice":  # an id has two items, which may be of two classes
        ids = rng.integers(0, 300, N)
    if kind == "tied":
        x = np.sign(x[:, :4])
    if kind == "collapsed":
        x = np.ones_like(x)
    if kind == "large classes":
        labels = rng.integers(0, 4, N)
    return x.astype(np.float32), labels, ids, groups


KINDS = [
    "groups over classes",
    "groups in classes",
    "groups of one",
    "one group a class",
    "ids twice",
    "tied",
    "collapsed",
    "large classes",
]


def by_sorting(x, labels, query_rows, gallery_rows, may_answer):
    """The scores by their definitions, in float64; may_answer[q, g] of rows of x."""
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    scores = []
    for row in query_rows:
        items = gallery_rows[may_answer[row, gallery_rows]]
        same = labels[items] == labels[row]
        r = int(same.sum())
        if r:
            relevant = same[np.lexsort((same, -np.round(unit[items] @ unit[row], 14)))]
            precision = np.cumsum(relevant[:r]) / np.arange(1, r + 1)
            values = [relevant[:k].any() for k in KS]
            values += [np.sum(precision * relevant[:r]) / r, relevant[:r].mean()]
            scores.append([*values, 1 / (np.argmax(relevant) + 1)])
    names = [f"recall@{k}" for k in KS] + ["map@r", "r_precision", "mrr"]
    found = dict(zip(names, np.mean(scores, axis=0), strict=True))
    return found | {"queries_without_match": len(query_rows) - len(scores)}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_sorting(kind):
    x, labels, ids, groups = make(kind)
    rows = np.arange(N)
    other_id, other_group = ids[:, None] != ids, groups[:, None] != groups
    queries, gallery = rows[:QUERIES], rows[QUERIES // 2 :]  # half of the queries are in it
    for use_ids, use_groups in ((True, False), (False, True), (True, True)):
        allowed = (other_id | (not use_ids)) & (other_group | (not use_groups))
        if allowed[labels[:, None] == labels].sum() <= 0:
            continue
        named = {"ids": ids} if use_ids else {}
        named |= {"groups": groups} if use_groups else {}
        apart = {f"query_{name}": values[queries] for name, values in named.items()}
        apart |= {f"gallery_{name}": values[gallery] for name, values in named.items()}
        if kind != "groups of one" or use_ids:
            found = metrics.retrieval_metrics(
                x[queries], labels[queries], x[gallery], labels[gallery], ks=KS, **apart
            )
            assert_equal(found, by_sorting(x, labels, queries, gallery, allowed))
        alone = {f"query_{name}": values for name, values in named.items()}
        itself = rows[:, None] != rows
        expected = by_sorting(x, labels, rows, rows, allowed & itself)
        for block_size in (None, 70):
            found = metrics.retrieval_metrics(x, labels, ks=KS, block_size=block_size, **alone)
            assert_equal(found, expected)


def torchreid_market1501(distances, q_pids, g_pids, q_camids, g_camids):
    """The ranked matches of each valid query, as torchreid's `eval_market1501` keeps them.

    https://github.com/KaiyangZhou/deep-person-reid/blob/master/torchreid/metrics/rank.py
    """
    indices = np.argsort(distances, axis=1)
    matches = (g_pids[indices] == q_pids[:, np.newaxis]).astype(np.int32)
    kept = []
    for q_idx in range(len(q_pids)):
        order = indices[q_idx]
        remove = (g_pids[order] == q_pids[q_idx]) & (g_camids[order] == q_camids[q_idx])
        raw_cmc = matches[q_idx][~remove]
        if np.any(raw_cmc):
            kept.append(raw_cmc)
    return kept


@pytest.mark.parametrize("seed", range(3))
def test_re_identification(seed):
    """As the docstring of `retrieval_metrics` says: a group for each person and camera."""
    x, persons, _, cameras = make("groups over classes", seed)
    is_query = np.arange(N) < QUERIES
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    kept = torchreid_market1501(
        1 - unit[is_query] @ unit[~is_query].T,
        persons[is_query],
        persons[~is_query],
        cameras[is_query],
        cameras[~is_query],
    )
    _, groups = np.unique(np.stack([persons, cameras]), axis=1, return_inverse=True)
    found = metrics.retrieval_metrics(
        x[is_query],
        persons[is_query],
        x[~is_query],
        persons[~is_query],
        query_groups=groups[is_query],
        gallery_groups=groups[~is_query],
        ks=KS,
    )
    assert found["queries_without_match"] == QUERIES - len(kept)
    for k in KS:
        cmc = np.mean([raw_cmc[:k].any() for raw_cmc in kept])
        assert found[f"recall@{k}"] == pytest.approx(cmc, abs=1e-12)
    assert found["mrr"] == pytest.approx(np.mean([1 / (np.argmax(m) + 1) for m in kept]), abs=1e-12)
    r_precision = np.mean([raw_cmc[: raw_cmc.sum()].mean() for raw_cmc in kept])
    assert found["r_precision"] == pytest.approx(r_precision, abs=1e-12)


def test_ids_make_a_gallery_of_the_queries_equal_to_none():
    x, labels, ids, _ = make("plain")
    expected = metrics.retrieval_metrics(x, labels)
    order = np.random.default_rng(1).permutation(N)
    names = np.array([f"image {row}.jpg" for row in ids])
    for values in (
        ids,
        names,
        names.tolist(),
        names.astype(object),
        ids.astype(np.uint8) + 2**9 * (ids // 256),
    ):
        found = metrics.retrieval_metrics(
            x,
            labels,
            x[order],
            labels[order],
            query_ids=values,
            gallery_ids=np.asarray(values)[order],
        )
        assert found == pytest.approx(expected, abs=1e-12)


def test_copies_of_all_queries_are_refused():
    x, labels, ids, groups = make("plain")
    for rows in (np.arange(N), np.arange(40)):
        with pytest.raises(ValueError, match=f"all {len(rows)} queries are in the gallery"):
            metrics.retrieval_metrics(x[rows], labels[rows], x, labels)
    # Copies of some queries are data, and so is what a collapsed network gives.
    half = np.arange(N // 2)
    scores = metrics.retrieval_metrics(x, labels, x[half], labels[half])
    assert scores["recall@1"] < 1
    collapsed = np.ones((6, 3), np.float32)
    few = np.array([0, 0, 0, 1, 1, 1])
    assert metrics.retrieval_metrics(collapsed, few, collapsed, few, ks=(1,))["recall@1"] == 0
    codes = np.sign(x[:, :3])
    metrics.retrieval_metrics(codes, labels, codes, labels)
    # They are refused in no other class, and not where the items are known.
    metrics.retrieval_metrics(x, labels, x, (labels + 1) % 60)
    other = {"query_ids": ids, "gallery_ids": ids + N}
    assert metrics.retrieval_metrics(x, labels, x, labels, **other)["recall@1"] == 1
    grouped = {"query_groups": groups, "gallery_groups": groups}
    assert metrics.retrieval_metrics(x, labels, x, labels, **grouped)["recall@1"] < 1


X, Y = np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    "error, text, arguments, options",
    [
        (ValueError, "gallery_ids goes with a gallery", (X, Y), {"gallery_ids": Y}),
        (ValueError, "query_groups and gallery_groups go", (X, Y, X, Y), {"query_groups": Y}),
        (ValueError, "query_ids and gallery_ids go", (X, Y, X, Y), {"gallery_ids": Y}),
        (ValueError, r"query_ids must be \(4,\)", (X, Y), {"query_ids": Y[:3]}),
        (
            TypeError,
            "query_groups must be integers or text, found float",
            (X, Y),
            {"query_groups": Y / 2},
        ),
        (TypeError, "found bool", (X, Y), {"query_groups": Y > 0}),
        (
            TypeError,
            "query_ids and gallery_ids are <U1 and int64",
            (X, Y, X, Y),
            {"query_ids": list("abcd"), "gallery_ids": Y},
        ),
        (ValueError, "no class has two images that do not", (X, Y), {"query_groups": Y}),
        (
            ValueError,
            "that do not leave each other out",
            (X, Y, X, Y),
            {"query_groups": Y, "gallery_groups": Y},
        ),
    ],
)
def test_errors(error, text, arguments, options):
    with pytest.raises(error, match=text):
        metrics.retrieval_metrics(*arguments, **options)
