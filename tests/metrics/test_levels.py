"""All combinations of levels in one pass, and counts that are interrupted and resumed."""

import numpy as np
import pytest

from rll_jax import metrics
from rll_jax.metrics import _counts

N, CLASSES = 420, 90
KS = (1, 4, 100)
NAMES = ["L", "M", "H", "L,M", "L,H", "M,H", "L,M,H"]


def make(kind="random"):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, CLASSES, N)
    levels = {}
    for level, dim in (("L", 12), ("M", 20), ("H", 12)):
        x = rng.normal(size=(CLASSES, dim))[labels] + rng.normal(size=(N, dim))
        if kind == "tied":
            x = np.sign(x[:, :4])
        if kind == "large classes":
            labels = labels % 4
        levels[level] = (x * rng.uniform(0.1, 9, (N, 1))).astype(np.float32)
    return levels, labels, rng.integers(0, 5, N)


def concatenated(levels, names):
    parts = [levels[name].astype(np.float64) for name in names.split(",")]
    return np.concatenate([x / np.linalg.norm(x, axis=1, keepdims=True) for x in parts], axis=1)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", ["random", "tied", "large classes"])
@pytest.mark.parametrize("apart", [False, True])
def test_combinations_equal_their_concatenations(kind, apart):
    levels, labels, groups = make(kind)
    queries = slice(0, 150 if apart else N)
    gallery = slice(150, N)

    def arguments(x):
        taken = {name: values[queries] for name, values in x.items()}
        grouped = {"query_groups": groups[queries]}
        if not apart:
            return (taken, labels), grouped
        items = {name: values[gallery] for name, values in x.items()}
        grouped["gallery_groups"] = groups[gallery]
        return (taken, labels[queries], items, labels[gallery]), grouped

    given, grouped = arguments(levels)
    found = metrics.level_scores_by_query(*given, ks=KS, **grouped)
    assert list(found) == NAMES
    for names in NAMES:
        given, _ = arguments({names: concatenated(levels, names)})
        one = [part[names] if isinstance(part, dict) else part for part in given]
        assert_same(found[names], metrics.scores_by_query(*one, ks=KS, **grouped))
    means = metrics.mean_scores(found["L,M,H"], len(labels[queries]), ks=KS)
    assert means == pytest.approx(metrics.retrieval_metrics(*one, ks=KS, **grouped), abs=1e-12)


def test_chosen_combinations_are_the_same():
    levels, labels, _ = make()
    all_of_them = metrics.level_scores_by_query(levels, labels, ks=KS)
    found = metrics.level_scores_by_query(levels, labels, combinations=[("M", "H"), "L"], ks=KS)
    assert list(found) == ["M,H", "L"]
    for name, scores in found.items():
        assert_same(scores, all_of_them[name])


def test_a_level_that_float32_cannot_tell_is_settled_in_float64():
    """The negative beats the positive in the mean alone, by less than float32 can tell."""
    angles = np.array([[0.0, 0.5, 0.5 + 1e-9, 1.2], [0.0, 0.5, 0.5 - 2e-9, 1.3]])
    first, second = (np.stack([np.cos(a), np.sin(a)], axis=1) for a in angles)
    labels = np.array([0, 0, 1, 2])
    found = metrics.level_scores_by_query(
        {"a": first[:1], "b": second[:1]}, labels[:1], {"a": first[1:], "b": second[1:]}, labels[1:]
    )
    assert {name: part["first_rank"][0] for name, part in found.items()} == {
        "a": 1,
        "b": 2,
        "a,b": 2,
    }


def test_an_interrupted_count_goes_on(tmp_path, monkeypatch):
    levels, labels, groups = make()
    options = {"ks": KS, "block_size": 64, "query_groups": groups}
    expected = metrics.level_scores_by_query(levels, labels, **options)
    file = tmp_path / "counts.npz"
    told = []

    def stop(what, done, total):
        told.append((what, done, total))
        if what == "ranks" and done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        metrics.level_scores_by_query(levels, labels, **options, progress=stop, state_file=file)
    assert file.exists() and [what for what, *_ in told][0] == "positives"
    counted = told[-1][1]
    for wrong in (
        {"ks": KS, "block_size": 128, "query_groups": groups},
        {**options, "query_groups": None},
    ):
        with pytest.raises(ValueError, match="counts of other embeddings"):
            metrics.level_scores_by_query(levels, labels, **wrong, state_file=file)
    with monkeypatch.context() as other, pytest.raises(ValueError, match="of other embeddings"):
        other.setattr(_counts, "METHOD", 1)
        metrics.level_scores_by_query(levels, labels, **options, state_file=file)
    told.clear()
    found = metrics.level_scores_by_query(
        levels, labels, **options, progress=lambda *a: told.append(a), state_file=file
    )
    ranks = [(done, total) for what, done, total in told if what == "ranks"]
    assert ranks[0][0] > counted and ranks[-1][0] == ranks[-1][1]
    assert not file.exists()
    for name in expected:
        assert_same(found[name], expected[name])
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="holds no counts"):
        metrics.level_scores_by_query(levels, labels, **options, state_file=file)
    assert file.read_bytes() == b"something else"
    with pytest.raises(ValueError, match="no folder"):
        metrics.retrieval_metrics(levels["L"], labels, state_file=tmp_path / "no" / "file")


def test_embeddings_of_a_file(tmp_path):
    levels, labels, _ = make()
    np.save(tmp_path / "x.npy", levels["L"])
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert metrics.retrieval_metrics(mapped, labels) == metrics.retrieval_metrics(
        levels["L"], labels
    )


@pytest.mark.parametrize(
    "text, change",
    [
        ("at least one level", {"queries": {}}),
        ("some of the levels", {"combinations": [("L", "L")]}),
        ("some of the levels", {"combinations": [("L", "X")]}),
        ("some of the levels", {"combinations": [()]}),
        ("queries of level H are zero", {"queries": {"H": None}}),
        ("expected the same", {"gallery": {"L": np.ones((2, 12))}, "gallery_labels": np.arange(2)}),
    ],
)
def test_errors(text, change):
    levels, labels, _ = make()
    if "H" in change.get("queries", {}):
        change = {"queries": levels | {"H": np.where(np.arange(N)[:, None] == 7, 0, levels["H"])}}
    with pytest.raises(ValueError, match=text):
        metrics.level_scores_by_query(**({"queries": levels, "query_labels": labels} | change))
