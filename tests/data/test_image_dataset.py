import dataclasses
import gc
import io
import os
import sys
import time

from absl import flags
import numpy as np
import pytest

from rll_jax.data import (
    array_records,
    benchmarks,
    cache,
    image_dataset,
    images,
    listings,
    pipeline,
    sampler,
    views,
)
from tests.helpers.benchmark_trees import jpeg, make_cub, make_inshop, make_sop


def test_emoji_is_what_its_readme_says(emoji):
    train, test = emoji["train"], emoji["test"]
    assert (len(np.unique(train.labels)), len(np.unique(test.labels))) == (718, 719)
    assert len(train) + len(test) == 9467
    image_dataset.check_splits(train, test)
    for data in (train, test):
        assert np.unique(data.labels, return_counts=True)[1].min() >= 4
        assert all(data.decoded_image(row).size == (64, 64) for row in range(0, len(data), 400))
    drawings = {data.image_bytes(row) for data in (train, test) for row in range(len(data))}
    assert len(drawings) == 9467  # no drawing twice


def test_classes_in_both_splits_are_refused(emoji):
    with pytest.raises(ValueError, match="718 classes are in train and in test"):
        image_dataset.check_splits(emoji["train"], emoji["train"])


def test_nothing_prepared(tmp_path):
    with pytest.raises(ValueError, match="cannot read a prepared dataset in .*nowhere"):
        array_records.open_dataset(tmp_path / "nowhere")


@pytest.fixture
def sets(tmp_path):
    """CUB's layout as files, and prepared."""
    make_cub(tmp_path)
    root, rows = benchmarks.read_listing("cub", tmp_path)
    array_records.write_dataset(root, rows, tmp_path / "prepared_cub")
    return (
        image_dataset.from_rows(root, rows),
        array_records.open_dataset(tmp_path / "prepared_cub"),
        root,
    )


def test_prepared_files_are_the_files(sets):
    files, written, root = sets
    for split in ("train", "test"):
        image_dataset.check_splits(files["train"], files["test"])
        for name in ("labels", "paths", "sizes"):
            np.testing.assert_array_equal(
                getattr(files[split], name), getattr(written[split], name)
            )
        assert len(written[split]) == 20
        for row in range(20):
            data = (root / files[split].paths[row]).read_bytes()
            assert files[split].image_bytes(row) == written[split].image_bytes(row) == data


def test_the_kept_index_is_what_was_read(sets, tmp_path):
    _, written, _ = sets
    kept = tmp_path / "prepared_cub/rll_jax_index.train.image.label.npz"
    again = array_records.open_dataset(tmp_path / "prepared_cub")
    kept.write_bytes(b"damaged")
    repaired = array_records.open_dataset(tmp_path / "prepared_cub")
    for other in (again, repaired):
        np.testing.assert_array_equal(other["train"].labels, written["train"].labels)
        np.testing.assert_array_equal(other["train"].paths, written["train"].paths)
    assert kept.read_bytes() != b"damaged"


def test_query_and_gallery(tmp_path):
    make_inshop(tmp_path)
    root, rows = benchmarks.read_listing("inshop", tmp_path)
    array_records.write_dataset(root, rows, tmp_path / "prepared_inshop")
    for found in (
        image_dataset.from_rows(root, rows),
        array_records.open_dataset(tmp_path / "prepared_inshop"),
    ):
        assert found["train"].in_gallery is None and found["test"].in_gallery.sum() == 12
        assert len(found["test"]) == 16 and len(found["train"]) == 16
        queries = found["test"].take(np.flatnonzero(~found["test"].in_gallery))
        assert sorted(queries.labels) == [4, 5, 6, 7]
        image_dataset.check_splits(found["train"], found["test"])


def test_all_classes_as_test_keep_all_that_a_row_has(tmp_path):
    rows = []
    for number, (label, split) in enumerate(
        [(0, "train"), (0, "train"), (1, "query"), (1, "gallery")]
    ):
        name = f"{number}.jpg"
        (tmp_path / name).write_bytes(jpeg(number))
        rows.append(listings.Row(name, label, split, label, f"g{number % 2}", f"i{number}"))
    splits = image_dataset.from_rows(tmp_path, rows)
    whole = image_dataset.all_as_test(splits)
    assert len(whole["train"]) == 0 and whole["test"].in_gallery is None
    test = whole["test"]
    for name, column in test.columns().items():
        assert column is None or len(column) == 4, name
    assert test.groups is not None and test.image_ids is not None
    np.testing.assert_array_equal(test.groups[[0, 1]], test.groups[[2, 3]])
    assert len(set(test.image_ids)) == 4
    assert [test.image_bytes(row) for row in range(4)] == [jpeg(row) for row in range(4)]


def test_super_labels(tmp_path):
    make_sop(tmp_path)
    root, rows = benchmarks.read_listing("sop", tmp_path)
    for data in image_dataset.from_rows(root, rows).values():
        np.testing.assert_array_equal(data.super_labels, (data.labels + 1) % 2)


def test_splits_that_cannot_be_measured():
    rows = [
        listings.Row(f"{c}/{i}", c, "train" if c < 2 else "test")
        for c in range(4)
        for i in range(2)
    ]
    sets = image_dataset.from_rows("nowhere", rows)
    image_dataset.check_splits(sets["train"], sets["test"])
    for train, test, text in (
        (sets["train"], sets["test"].take([0, 2]), "each of the 2 test classes has a single image"),
        (sets["train"], sets["test"].take([]), "the test split has no images"),
        (
            sets["test"].take([0]),
            sets["test"],
            r"1 classes are in train and in test, such as \[2\]",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            image_dataset.check_splits(train, test)


def test_bad_images_are_found_and_left_out(tmp_path):
    """One is missing, one empty, one cut off: the quick check finds two, the full one all.

    The class that is left with one image is skipped too.
    """
    rows = [listings.Row(f"{c}/{i}.jpg", c, "train") for c in range(3) for i in range(3)]
    for row in rows:
        (tmp_path / row.path).parent.mkdir(exist_ok=True)
        (tmp_path / row.path).write_bytes(jpeg(row.label))
    (tmp_path / "0/1.jpg").unlink()
    (tmp_path / "1/0.jpg").write_bytes(b"")
    (tmp_path / "1/2.jpg").write_bytes(jpeg(1)[:300])
    data = image_dataset.from_rows(tmp_path, rows)["train"]
    assert image_dataset.find_bad(data, full=False) == {
        1: "0/1.jpg: missing or empty",
        3: "1/0.jpg: missing or empty",
    }
    full = image_dataset.find_bad(data, full=True)
    assert list(full) == [1, 3, 5] and "cannot decode the image '1/2.jpg'" in full[5]
    assert image_dataset.skip_bad(data, full).paths.tolist() == [
        "0/0.jpg",
        "0/2.jpg",
        "2/0.jpg",
        "2/1.jpg",
        "2/2.jpg",
    ]


def test_a_stock_set_of_tensorflow_datasets(tmp_path):
    """CUB with the features that tensorflow-datasets gives it is split by class."""
    import tensorflow_datasets as tfds

    class CaltechBirds2011(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("0.1.1")

        def _info(self):
            features = {
                "image": tfds.features.Image(),
                "image/filename": tfds.features.Text(),
                "label": tfds.features.ClassLabel(num_classes=8),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": self._of(0), "test": self._of(1)}

        def _generate_examples(self):
            raise NotImplementedError

        def _of(self, part):
            for c in range(8):
                for i in range(2):
                    yield (
                        f"{c}{part}{i}",
                        {"image": io.BytesIO(jpeg(c)), "image/filename": "x", "label": c},
                    )

    with pytest.raises(
        ValueError,
        match="not prepared as array_record .* needs TensorFlow, .* pip install tensorflow-cpu "
        ".*download_and_prepare",
    ):
        array_records.open_tfds("caltech_birds2011", tmp_path)
    CaltechBirds2011(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    sets = array_records.open_tfds("caltech_birds2011", tmp_path)
    assert {split: sorted(set(data.labels)) for split, data in sets.items()} == {
        "train": [0, 1, 2, 3],
        "test": [4, 5, 6, 7],
    }
    assert len(sets["test"]) == 16
    for row in range(16):
        assert sets["test"].image_bytes(row) == jpeg(sets["test"].labels[row])
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="name those of image and class"):
        array_records.open_tfds("caltech_birds2011", tmp_path, image_key="picture")
    with pytest.raises(ValueError, match="knows no dataset 'no_such_set'"):
        array_records.open_tfds("no_such_set", tmp_path)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_cached_pictures_are_shrunk_and_kept(kind, tmp_path):
    rows = [listings.Row(f"{i}.jpg", i // 2, "train") for i in range(6)]
    for i, row in enumerate(rows):
        (tmp_path / row.path).write_bytes(jpeg(i, size=(200 + i, 150)))
    data = image_dataset.from_rows(tmp_path, rows)["train"]
    assert 6 * 3 * 50 * 66 <= cache.estimated_bytes(data, 50) <= 6 * 3 * 50 * 70
    make = (
        (lambda: cache.in_memory(data, 50))
        if kind == "memory"
        else (lambda: cache.on_disk(data, 50, tmp_path, "train"))
    )
    cached = make()
    for row in range(6):
        expected = images.shrink(data.image_bytes(row), "x", 50)
        np.testing.assert_array_equal(np.asarray(cached.decoded_image(row)), np.asarray(expected))
        assert min(cached.image(row).size) == 50
    for row in rows:
        (tmp_path / row.path).unlink()
    again = make() if kind == "disk" else cached
    assert (
        again.take([4, 1]).decoded_image(0).size == again.decoded_image(4).size
    )  # read nowhere else any more


def test_a_cache_with_a_missing_file_has_a_bad_image(tmp_path):
    rows = [listings.Row(f"{i}.jpg", i, "train") for i in range(2)]
    (tmp_path / "1.jpg").write_bytes(jpeg(0, size=(200, 150)))
    cached = cache.on_disk(image_dataset.from_rows(tmp_path, rows)["train"], 50, tmp_path, "train")
    assert min(cached.decoded_image(1).size) == 50
    with pytest.raises(images.BadImageError, match="0.jpg"):
        cached.decoded_image(0)


def test_a_cache_that_does_not_fit(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    data = image_dataset.from_rows(tmp_path, [listings.Row("a.jpg", 0, "train")])["train"]
    monkeypatch.setattr(cache, "estimated_bytes", lambda *_: 2**50)
    with pytest.raises(ValueError, match="--cache=disk would take 1048576.0 GiB"):
        cache.on_disk(data, 50, tmp_path, "train")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jpg"]
    assert 2**20 < cache.free_memory() < 2**50


def test_a_changed_file_is_cached_anew(tmp_path):
    """The same name, the same number of bytes."""
    rows = [listings.Row("a.ppm", 0, "train")]
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 255, (20, 20, 3), np.uint8)
        (tmp_path / "a.ppm").write_bytes(b"P6 20 20 255 " + pixels.tobytes())
        os.utime(tmp_path / "a.ppm", (seed + 1, seed + 1))
        cached = cache.on_disk(
            image_dataset.from_rows(tmp_path, rows)["train"], 50, tmp_path, "train"
        )
        np.testing.assert_array_equal(np.asarray(cached.decoded_image(0)), pixels)


def test_many_files_for_a_large_split(tmp_path, monkeypatch):
    """Beyond a size a split goes on in another file, in the order of the rows."""
    make_cub(tmp_path)
    monkeypatch.setattr(array_records, "_SHARD_BYTES", 3000)
    root, rows = benchmarks.read_listing("cub", tmp_path)
    array_records.write_dataset(root, rows, tmp_path / "prepared_cub")
    assert len(list((tmp_path / "prepared_cub").glob("*train.array_record*"))) > 3
    train = array_records.open_dataset(tmp_path / "prepared_cub")["train"]
    assert train.paths.tolist() == [row.path for row in rows if row.split == "train"]
    assert [train.image_bytes(row) for row in range(20)] == [
        (root / path).read_bytes() for path in train.paths
    ]
    assert (tmp_path / "prepared_cub").stat().st_mode & 0o777 == 0o755


def test_a_damaged_prepared_file_is_a_bad_image(tmp_path):
    make_cub(tmp_path)
    root, rows = benchmarks.read_listing("cub", tmp_path)
    array_records.write_dataset(root, rows, tmp_path / "prepared_cub")
    (file,) = (tmp_path / "prepared_cub").glob("*train.array_record*")
    file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size))
    try:
        train = array_records.open_dataset(tmp_path / "prepared_cub")["train"]
    except ValueError:
        return
    with pytest.raises(images.BadImageError, match="images/001.Some_Bird"):
        train.decoded_image(0)


def test_train_batches_depend_on_the_step_alone(emoji):
    classes = sampler.ClassSampler(emoji["train"].labels, 5, 3, seed=1)
    augment = views.RandomAffine(16)
    straight = list(
        pipeline.train_batches(emoji["train"], classes, augment, start=0, stop=6, threads=1)
    )
    later = list(
        pipeline.train_batches(emoji["train"], classes, augment, start=4, stop=6, threads=3)
    )
    assert len(straight) == 6 and straight[0]["image"].shape == (15, 16, 16, 3)
    for one, other in zip(straight[4:], later, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])
    # spread: one image of each class, then the next; or a class's side by side
    assert (straight[0]["label"].reshape(3, 5) == straight[0]["label"][:5]).all()
    together = next(
        pipeline.train_batches(emoji["train"], classes, augment, start=0, stop=1, spread=False)
    )
    assert (together["label"].reshape(5, 3) == together["label"][::3, None]).all()
    order = np.arange(15).reshape(5, 3).T.ravel()
    np.testing.assert_array_equal(together["image"][order], straight[0]["image"])


def test_worker_processes_make_the_same_batches(emoji):
    flags.FLAGS.mark_as_parsed()
    classes = sampler.ClassSampler(emoji["train"].labels, 5, 3, seed=1)
    made = [
        list(
            pipeline.train_batches(
                emoji["train"],
                classes,
                views.RandomAffine(16),
                start=2,
                stop=7,
                processes=processes,
            )
        )
        for processes in (0, 2)
    ]
    for one, other in zip(*made, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])


@pytest.mark.parametrize("processes", [1, 2])
def test_no_file_is_closed_twice(emoji, monkeypatch, processes):
    """By a thread of grain's and by the garbage collector: the second time it is another's file."""
    flags.FLAGS.mark_as_parsed()
    classes = sampler.ClassSampler(emoji["train"].labels, 5, 3, seed=1)
    augment, close, twice = views.RandomAffine(16), os.close, []

    def slow_close(descriptor):
        try:
            close(descriptor)
        except OSError:
            twice.append(descriptor)
            raise
        time.sleep(0.1)

    monkeypatch.setattr(os, "close", slow_close)
    held = []
    for batch in pipeline.train_batches(
        emoji["train"], classes, augment, start=0, stop=3, processes=processes
    ):
        held.append(batch)
        gc.collect()
    held.append(held)
    del batch, held
    gc.collect()
    assert not twice


class Breaking:
    """Pictures by position, some of which are broken."""

    def __init__(self, read, broken):
        self.read, self.broken = read, broken

    def __call__(self, position):
        return b"broken" if position in self.broken else self.read(position)


def test_a_broken_picture_gives_way_to_another_of_its_class(emoji):
    train = emoji["train"]
    classes = sampler.ClassSampler(train.labels, 5, 3, seed=1)
    rows = classes.batch(0)
    broken = dataclasses.replace(train, read=Breaking(train.read, {int(train.positions[rows[4]])}))
    with pytest.raises(images.BadImageError):
        list(pipeline.train_batches(broken, classes, views.RandomAffine(16), start=0, stop=1))
    told = []
    (batch,) = pipeline.train_batches(
        broken, classes, views.RandomAffine(16), start=0, stop=1, spread=False, on_bad=told.append
    )
    (whole,) = pipeline.train_batches(
        train, classes, views.RandomAffine(16), start=0, stop=1, spread=False
    )
    assert told == [rows[4]]
    np.testing.assert_array_equal(batch["label"], whole["label"])
    same = (batch["image"] == whole["image"]).all(axis=(1, 2, 3))
    assert same.tolist() == [i != 4 for i in range(15)]
    class_rows = np.flatnonzero(train.labels == train.labels[rows[4]])
    seed = (1, 2, 0, 4)
    candidates = [
        views.RandomAffine(16)(train.decoded_image(row), np.random.default_rng(seed))
        for row in class_rows
        if row != rows[4]
    ]
    assert any(np.array_equal(batch["image"][4], candidate) for candidate in candidates)
    assert not any(
        np.array_equal(batch["image"][4], batch["image"][i]) for i in (3, 5)
    )  # not one that is there already
    hopeless = dataclasses.replace(
        train, read=Breaking(train.read, {int(p) for p in train.positions[class_rows]})
    )
    (batch,) = pipeline.train_batches(
        hopeless, classes, views.RandomAffine(16), start=0, stop=1, spread=False, on_bad=told.append
    )
    assert set(class_rows) == set(told) and not np.isin(
        train.labels[rows[4]], batch["label"]
    )  # other classes take its place
    nothing = dataclasses.replace(train, read=Breaking(train.read, set(range(10**5)))).take(
        range(40)
    )
    few = sampler.ClassSampler(nothing.labels, 2, 3)
    with pytest.raises(images.BadImageError):
        list(
            pipeline.train_batches(
                nothing, few, views.RandomAffine(16), start=0, stop=1, on_bad=told.append
            )
        )


def test_a_broken_test_picture_is_told_and_white(emoji):
    data = emoji["test"].take(range(10))
    broken = dataclasses.replace(data, read=Breaking(data.read, {int(data.positions[3])}))
    told = []
    (batch,) = pipeline.test_batches(
        broken, lambda p: np.asarray(p.resize((4, 4), None)), batch_size=10, on_bad=told.append
    )
    assert told == [3] and (batch[3] == 255).all()
    with pytest.raises(images.BadImageError):
        list(
            pipeline.test_batches(
                broken, lambda p: np.asarray(p.resize((4, 4), None)), batch_size=10
            )
        )


@pytest.mark.parametrize("batch_size", [7, 100, 4771, 5000])
def test_test_batches_have_every_row_once(emoji, batch_size):
    data = emoji["test"]
    small = data.take(range(300))

    def view(image):
        return np.asarray(image.resize((4, 4), None))

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
