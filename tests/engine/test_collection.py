"""The collection of a page to search in: numbers, classes, and the nearest of one query."""

import numpy as np
import pytest

from experiments.engine import collection as collection_lib
from rll_jax import metrics


def unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def embeddings():
    """Of 300 images, among them copies at places that fall into different parts of any loop."""
    x = np.random.default_rng(0).normal(size=(300, 24))
    x[[17, 18, 150, 299]] = x[3]
    return unit(x)


@pytest.mark.parametrize("k", [1, 5, 298, 299, 1000])
def test_nearest_is_that_of_the_metrics(embeddings, k):
    for row in (0, 3, 299):
        rows, similarities = collection_lib.nearest(embeddings, embeddings[row], k, leave_out=row)
        expected, expected_similarities = metrics.nearest(
            embeddings[row][None], embeddings, min(k, 299), leave_out=[row]
        )
        assert row not in rows and similarities.dtype == np.float32
        np.testing.assert_array_equal(rows, expected[0])
        np.testing.assert_allclose(similarities, expected_similarities[0], atol=1e-6)


def test_of_equal_images_the_lower_number_comes_first(embeddings):
    rows, similarities = collection_lib.nearest(embeddings, embeddings[150], 3, leave_out=150)
    assert rows.tolist() == [3, 17, 18] and len(set(similarities.tolist())) == 1
    same = unit(np.ones((5000, 7)))
    rows, _ = collection_lib.nearest(same, same[0], 4, leave_out=1)
    assert rows.tolist() == [0, 2, 3, 4]


def test_nearest_among_some(embeddings):
    among = np.arange(1, 300, 7)
    rows, similarities = collection_lib.nearest(embeddings, embeddings[8], 4, among=among)
    expected, _ = metrics.nearest(embeddings[8][None], embeddings[among], 4)
    assert rows.tolist() == among[expected[0]].tolist() and rows[0] == 8
    assert similarities[0] == pytest.approx(1)
    none, _ = collection_lib.nearest(embeddings, embeddings[8], 4, among=np.array([8]), leave_out=8)
    assert none.tolist() == []


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (["a/1.png", "b/2.png", "b/c/3.png"], ["a", "b", "b"]),
        (["1.png", "a/2.png"], ["", "a"]),
        (["1.png", "2.png"], ["", ""]),
        (["a/1.png", "a/2.png"], ["a", "a"]),
        (["train/a/1.png", "test/b/2.png"], ["a", "b"]),
        (["test/a/1.png", "test/b/2.png"], ["a", "b"]),
        (["images/001.cat/1.jpg", "images/002.dog/2.jpg"], ["001.cat", "002.dog"]),
        (["x/train/a/1.jpg", "x/test/b/2.jpg"], ["a", "b"]),
        (["train/a/1.png", "val/b/2.png", "test/c/3.png"], ["a", "b", "c"]),
        (["Train/a/1.png", "Query/b/2.png", "Gallery/b/3.png"], ["a", "b", "b"]),
        (["query/1.png", "gallery/2.png"], ["query", "gallery"]),
        (["train/a/1.png", "test/b/2.png", "more/c/3.png"], ["train", "test", "more"]),
    ],
)
def test_the_class_is_the_folder(files, classes):
    assert collection_lib.class_names(files) == classes


def test_an_image_keeps_its_number():
    def made(names, known=None):
        return collection_lib.make([(names, unit(np.ones((len(names), 3))))], known)

    first = made(["b/1", "a/1", "b/2"])
    assert list(first.files) == ["a/1", "b/1", "b/2"] and first.numbers.tolist() == [0, 1, 2]
    known = dict(zip(first.files, first.numbers.tolist(), strict=True))
    second = made(["a/0", "b/1", "b/2"], known)
    assert list(second.files) == ["b/1", "b/2", "a/0"] and second.numbers.tolist() == [1, 2, 3]
    assert second.row(0) is None and second.row(3) == 2 and second.row(4) is None
    assert list(second.classes) == ["a", "b"] and second.class_of.tolist() == [1, 1, 0]


def test_two_runs_share_the_images_that_both_have():
    names, embeddings = ["a/1", "a/2", "b/1"], unit(np.eye(3))
    both = collection_lib.make([(names, embeddings), (names[:0:-1], embeddings[:2, :2])])
    assert list(both.files) == ["a/2", "b/1"]
    np.testing.assert_array_equal(both.embeddings[0], embeddings[1:])
    np.testing.assert_array_equal(both.embeddings[1], [[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="no image was embedded by each"):
        collection_lib.make([(["a"], embeddings[:1]), (["b"], embeddings[:1])])
    with pytest.raises(ValueError, match="not finite"):
        collection_lib.make([(["a"], np.array([[np.nan, 1]]))])


def test_right_at_one_is_recall_at_one():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(1000), 3)  # more images than are compared at once
    x = unit(rng.normal(size=(1000, 64))[labels] + rng.normal(size=(3000, 64)))
    names = [f"{label:04}/{row:04}" for row, label in enumerate(labels)]
    known = collection_lib.make([(names, x)])
    right = np.concatenate(list(collection_lib.right_at_one(known, 0)))
    expected = metrics.retrieval_metrics(x, labels, ks=(1,))["recall@1"]
    assert 0.1 < expected < 0.9 and right.mean() == pytest.approx(expected, abs=1e-9)
    (alone,) = collection_lib.right_at_one(collection_lib.make([(["a/1"], np.ones((1, 1)))]), 0)
    assert alone.tolist() == [False]
    known = collection_lib.make([(["1", "2", "a/3", "a/4"], np.ones((4, 1)))])
    right = np.concatenate(list(collection_lib.right_at_one(known, 0)))
    assert right.tolist() == [False, False, False, False]
