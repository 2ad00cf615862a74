import io

import numpy as np
from PIL import Image
import pytest

from rll_jax import datasets, images, pipeline, sampler


def test_emoji_is_what_its_readme_says(emoji):
    train, test = emoji["train"], emoji["test"]
    assert (len(np.unique(train.labels)), len(np.unique(test.labels))) == (718, 719)
    assert len(train) + len(test) == 9467
    datasets.check_splits(train, test)
    for data in (train, test):
        assert np.unique(data.labels, return_counts=True)[1].min() >= 4
        assert all(data.image(row).size == (64, 64) for row in range(0, len(data), 400))
    drawings = {data.encoded(row) for data in (train, test) for row in range(len(data))}
    assert len(drawings) == 9467  # no drawing twice


def test_classes_in_both_splits_are_refused(emoji):
    with pytest.raises(ValueError, match="718 classes are in train and in test"):
        datasets.check_splits(emoji["train"], emoji["train"])


def test_nothing_prepared(tmp_path):
    with pytest.raises(ValueError, match="cannot read the split 'train' of a prepared set in .*nowhere"):
        datasets.open_prepared(tmp_path / "nowhere", "train")


def jpeg(seed, size=(60, 40)):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), np.uint8)
    Image.fromarray(pixels).resize(size).save(out, "JPEG")
    return out.getvalue()


def make_sop(directory, classes=12, images_per_class=4):
    """A small tree in the layout of the published archive; the first half of the classes trains."""
    root, header = directory / "Stanford_Online_Products", "image_id class_id super_class_id path"
    lines = {"train": [header], "test": [header]}
    for c in range(1, classes + 1):
        folder = "bicycle_final" if c % 2 else "chair_final"
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(images_per_class):
            path = f"{folder}/{100 + c}_{i}.JPG"
            (root / path).write_bytes(jpeg(c))
            split = "train" if c <= classes // 2 else "test"
            lines[split].append(f"{c * images_per_class + i} {c} {1 + c % 2} {path}")
    for split, rows in lines.items():
        (root / f"Ebay_{split}.txt").write_text("\r\n".join(rows) + "\r\n")
    return root


def test_sop_reads_the_published_layout(tmp_path):
    root = make_sop(tmp_path)
    test = datasets.open_sop(tmp_path, "test")
    assert sorted(set(test.labels)) == list(range(6, 12)) and len(test) == 24
    for row in range(len(test)):
        assert test.encoded(row) == (root / test.paths[row]).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Stanford_Online_Products", "prepared_sop"]
    assert len(datasets.open_sop(tmp_path, "train")) == 24  # from what was prepared


@pytest.mark.parametrize("line, text", [
    ("1 2 x.jpg", "Ebay_test.txt, line 3"),
    ("9 9 1 ../../x.jpg", "a path inside the set"),
    ("9 9 1 /etc/passwd", "a path inside the set"),
    ("9 0 1 a.jpg", "expected three numbers"),
    ("9 9 1 chair_final/112_0.JPG", "listed twice"),
    ("9 9 1 chair_final/none.JPG", "1 images of .* are missing or empty, such as"),
])  # fmt: skip
def test_sop_bad_index(tmp_path, line, text):
    root = make_sop(tmp_path)
    index = root / "Ebay_test.txt"
    lines = index.read_text().split("\n")
    index.write_text("\n".join(lines[:2] + [line] + lines[2:]))
    with pytest.raises(ValueError, match=text):
        datasets.open_sop(tmp_path, "test")
    assert not (tmp_path / "prepared_sop").exists()


def test_sop_missing_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="download Stanford_Online_Products.zip .* --data_dir"):
        datasets.open_sop(tmp_path, "train")


def test_train_batches_depend_on_the_step_alone(emoji):
    classes = sampler.ClassSampler(emoji["train"].labels, 5, 3, seed=1)
    augment = images.RandomAffine(16)
    straight = list(pipeline.train_batches(emoji["train"], classes, augment, start=0, stop=6, threads=1))
    later = list(pipeline.train_batches(emoji["train"], classes, augment, start=4, stop=6, threads=3))
    assert len(straight) == 6 and straight[0]["image"].shape == (15, 16, 16, 3)
    for one, other in zip(straight[4:], later, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])
    assert (straight[0]["label"].reshape(5, 3) == straight[0]["label"][::3, None]).all()


@pytest.mark.parametrize("batch_size", [7, 100, 4771, 5000])
def test_test_batches_have_every_row_once(emoji, batch_size):
    data = emoji["test"]
    small = datasets.ImageSet(data.records, data.labels[:300], data.paths[:300])
    view = lambda image: np.asarray(image.resize((4, 4)))
    batches = list(pipeline.test_batches(small, view, batch_size=batch_size, threads=3))
    assert all(len(batch) == batch_size for batch in batches)
    expected = np.stack([view(data.image(row)) for row in range(300)])
    np.testing.assert_array_equal(np.concatenate(batches)[:300], expected)
    assert not np.concatenate(batches)[300:].any()


def test_prefetch_keeps_order_and_loses_nothing():
    placed = []
    source = pipeline.prefetch(range(5), lambda x: placed.append(x) or -x, ahead=2)
    assert next(source) == 0 and placed == [0, 1, 2]
    assert list(source) == [-1, -2, -3, -4]
