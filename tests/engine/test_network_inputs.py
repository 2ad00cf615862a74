"""--frozen_views: the name of the cache, what does not go together, the room it takes."""

import dataclasses
import types

import numpy as np
import pytest

from experiments.engine import config, network, network_inputs
from experiments.engine.augmentation import VIEWS
from rll_jax.data import image_dataset
from rll_jax.training import cached_features


def test_the_name_of_the_cache_depends_on_all_that_changes_it(monkeypatch):
    labels = np.arange(4)
    data = image_dataset.EncodedImageDataset(None, labels, labels, labels.astype(str), labels)
    usual = dict(
        dataset="folder",
        frozen_stages=1,
        batch_norm="frozen",
        backbone="resnet50",
        stage_sizes="1,1",
        image_size=32,
    )

    def name(data=data, views=2, weights="w", **changed):
        options = config.from_flat(**usual | changed)
        return network_inputs.cache_name(
            options,
            cached_features.trainable_part(
                network.make_model(options.network), options.data.image_size
            ),
            data,
            views,
            weights,
        )

    changes = [
        {"backbone": "resnet50_v1"},
        {"stem": "3x3"},
        {"image_size": 40},
        {"augment": "resize_crop"},
        {"interpolation": "bicubic"},
        {"pixel_mean": "1,2,3"},
        {"dtype": "bfloat16"},
        {"cache": "memory"},
        {"frozen_stages": 2},
        {"views": 3},
        {"weights": "v"},
        {"data": data.take([0, 1, 3])},
        {"data": dataclasses.replace(data, sizes=labels + 1)},
    ]
    assert len({name(), *(name(**change) for change in changes)}) == len(changes) + 1
    for change in (
        {"learning_rate": 1.0},
        {"seed": 3},
        {"loss": "sup_con"},
        {"augment": "random_resized_crop"},
        {"classes_per_batch": 7},
    ):
        assert name(**change) == name()
    before = name()
    monkeypatch.setitem(VIEWS, "random_resized_crop", VIEWS["wide_crop"])
    assert name() != before  # another view under the same name


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="give --frozen_stages too"):
        config.from_flat(frozen_views=2)
    usual = dict(frozen_views=2, frozen_stages=1, batch_norm="frozen")
    apart = dict(class_augment=1, multihost=1, dry_run=1, worker_processes=1, test_image_size=48)
    for name, value in apart.items():
        with pytest.raises(ValueError, match=f"--{name} do not go together"):
            config.from_flat(**usual, **{name: value})
    config.from_flat(**usual, image_size=48, test_image_size=48)
    with pytest.raises(ValueError, match="give --verify_images=full"):
        config.from_flat(**usual, on_bad_image="skip")


def test_room_is_looked_for_first(tmp_path, monkeypatch, capsys):
    labels = np.zeros(1024)
    splits = dict.fromkeys(
        ("train", "test"), image_dataset.EncodedImageDataset(None, labels, labels, labels, labels)
    )
    options = config.from_flat(
        data_dir=str(tmp_path),
        frozen_views=3,
        frozen_stages=1,
        batch_norm="frozen",
        backbone="resnet_tiny",
        image_size=8,
    )
    monkeypatch.setattr(
        network_inputs.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**21)
    )
    with pytest.raises(ValueError, match="--frozen_views=3 needs 0.00 GiB in"):
        network_inputs.check_room(options, splits)
    assert "frozen stages: 0.00 GiB in" in capsys.readouterr().out
    np.save(tmp_path / "frozen_train_0.npy", np.zeros((1024, 3, 512), np.float16))
    network_inputs.check_room(options, splits)  # the test split alone is missing
