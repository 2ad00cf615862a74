import numpy as np
import pytest

from rll_jax.data import sampler

LABELS = np.repeat(np.arange(7), [1, 2, 3, 4, 5, 6, 7]) * 10


def test_batch_is_a_pure_function_of_seed_and_step():
    one, other = (
        sampler.ClassSampler(LABELS, 3, 4, seed=5),
        sampler.ClassSampler(LABELS, 3, 4, seed=5),
    )
    later = [one.batch(step) for step in range(9)]
    np.testing.assert_array_equal(other.batch(8), later[8])  # without the steps before it
    assert any(
        (sampler.ClassSampler(LABELS, 3, 4, seed=6).batch(s) != later[s]).any() for s in range(9)
    )


@pytest.mark.parametrize("step", range(12))
def test_classes_and_images(step):
    rows = sampler.ClassSampler(LABELS, 3, 4).batch(step).reshape(3, 4)
    classes = LABELS[rows]
    assert (classes == classes[:, :1]).all() and len(set(classes[:, 0])) == 3
    for row, label in zip(rows, classes[:, 0], strict=True):
        class_size = (label == LABELS).sum()
        assert len(set(row)) == min(4, class_size)  # repeats only where a class is short


def test_each_epoch_has_every_class_at_most_once_and_order_changes():
    s = sampler.ClassSampler(LABELS, 2, 2)
    assert s.steps_per_epoch == 3
    epochs = [
        np.concatenate([LABELS[s.batch(3 * e + b)].reshape(2, 2)[:, 0] for b in range(3)])
        for e in range(6)
    ]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert {label for epoch in epochs for label in epoch} == set(
        LABELS
    )  # the cut falls on other classes each time


@pytest.mark.parametrize(
    "kwargs, text",
    [
        (dict(classes_per_batch=8, images_per_class=2), "has only 7 classes"),
        (dict(classes_per_batch=0, images_per_class=2), "at least 1"),
        (dict(classes_per_batch=2, images_per_class=2, seed=-1), "seed at least 0"),
    ],
)
def test_errors(kwargs, text):
    with pytest.raises(ValueError, match=text):
        sampler.ClassSampler(LABELS, **kwargs)


def many_classes():
    """60 classes of 1 to 5 images in 6 super classes of 4 to 20 classes."""
    rng = np.random.default_rng(0)
    sizes = [20, 12, 10, 8, 6, 4]
    super_of_class = np.repeat(np.arange(6), sizes)
    labels = np.repeat(np.arange(60), rng.integers(1, 6, 60))
    order = rng.permutation(len(labels))
    return labels[order], super_of_class[labels[order]]


@pytest.mark.parametrize("classes, supers", [(8, 2), (6, 3), (4, 1), (12, 6)])
def test_hierarchical(classes, supers):
    labels, super_labels = many_classes()
    sampling = sampler.HierarchicalSampler(labels, super_labels, classes, 3, supers, seed=5)
    assert sampling.batch_size == 3 * classes and sampling.steps_per_epoch > 0
    for epoch in range(3):
        seen = []
        for step in range(epoch * sampling.steps_per_epoch, (epoch + 1) * sampling.steps_per_epoch):
            rows = sampling.batch(step)
            np.testing.assert_array_equal(rows, sampling.batch(step))
            of_batch = labels[rows].reshape(classes, 3)
            assert (of_batch == of_batch[:, :1]).all() and len(set(of_batch[:, 0])) == classes
            found, counts = np.unique(
                super_labels[rows].reshape(classes, 3)[:, 0], return_counts=True
            )
            assert len(found) == supers and (counts == classes // supers).all()
            for rows_of_class in rows.reshape(classes, 3):
                assert len(set(rows_of_class)) == min(3, (labels == labels[rows_of_class[0]]).sum())
            seen += of_batch[:, 0].tolist()
        assert len(seen) == len(set(seen))  # a class once an epoch
    assert not np.array_equal(sampling.batch(0), sampling.batch(sampling.steps_per_epoch))


def test_hierarchical_refuses():
    labels, super_labels = many_classes()
    with pytest.raises(ValueError, match="which 3 super classes cannot share"):
        sampler.HierarchicalSampler(labels, super_labels, 8, 3, 3)
    with pytest.raises(ValueError, match="only 1 super classes hold the 20 classes"):
        sampler.HierarchicalSampler(labels, super_labels, 40, 3, 2)
    with pytest.raises(ValueError, match="images of two super classes"):
        sampler.HierarchicalSampler(labels, np.arange(len(labels)), 8, 3, 2)


@pytest.mark.parametrize("positives", [1, 2, 4])
def test_shuffle(positives):
    labels, _ = many_classes()
    sampling = sampler.ShuffleSampler(labels, 6 * (1 + positives), positives, seed=2)
    sizes = np.bincount(labels)
    drawn = []
    for step in range(sampling.steps_per_epoch):
        rows = sampling.batch(step)
        np.testing.assert_array_equal(rows, sampling.batch(step))
        assert rows.shape == (6 * (1 + positives),)
        for first, *others in rows.reshape(6, 1 + positives):
            assert (labels[others] == labels[first]).all() and first not in others
            assert len(set(others)) == min(positives, sizes[labels[first]] - 1)
            drawn.append(first)
    assert len(drawn) == len(set(drawn)) and len(drawn) > (sizes[sizes > 1].sum()) - 6
    assert not (sizes[labels[drawn]] < 2).any()


def test_shuffle_refuses():
    with pytest.raises(ValueError, match="expected a multiple of 3"):
        sampler.ShuffleSampler(np.zeros(10), 8, 2)
    with pytest.raises(ValueError, match="only 0 training images have another"):
        sampler.ShuffleSampler(np.arange(10), 4, 1)
