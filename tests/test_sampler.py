import numpy as np
import pytest

from rll_jax import sampler

LABELS = np.repeat(np.arange(7), [1, 2, 3, 4, 5, 6, 7]) * 10


def test_batch_is_a_pure_function_of_seed_and_step():
    one, other = sampler.ClassSampler(LABELS, 3, 4, seed=5), sampler.ClassSampler(LABELS, 3, 4, seed=5)
    later = [one.batch(step) for step in range(9)]
    np.testing.assert_array_equal(other.batch(8), later[8])  # without the steps before it
    assert any((sampler.ClassSampler(LABELS, 3, 4, seed=6).batch(s) != later[s]).any() for s in range(9))


@pytest.mark.parametrize("step", range(12))
def test_classes_and_images(step):
    rows = sampler.ClassSampler(LABELS, 3, 4).batch(step).reshape(3, 4)
    classes = LABELS[rows]
    assert (classes == classes[:, :1]).all() and len(set(classes[:, 0])) == 3
    for row, label in zip(rows, classes[:, 0]):
        assert len(set(row)) == min(4, np.sum(LABELS == label))  # repeats only where a class is short


def test_each_epoch_has_every_class_at_most_once_and_order_changes():
    s = sampler.ClassSampler(LABELS, 2, 2)
    assert s.steps_per_epoch == 3
    epochs = [np.concatenate([LABELS[s.batch(3 * e + b)].reshape(2, 2)[:, 0] for b in range(3)]) for e in range(6)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert {label for epoch in epochs for label in epoch} == set(LABELS)  # the cut falls on other classes each time


@pytest.mark.parametrize("kwargs, text", [
    (dict(classes_per_batch=8, images_per_class=2), "has only 7 classes"),
    (dict(classes_per_batch=0, images_per_class=2), "at least 1"),
    (dict(classes_per_batch=2, images_per_class=2, seed=-1), "seed at least 0"),
])  # fmt: skip
def test_errors(kwargs, text):
    with pytest.raises(ValueError, match=text):
        sampler.ClassSampler(LABELS, **kwargs)
