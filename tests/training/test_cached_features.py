"""Cached features of frozen stages: the network that continues from them is the same network."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rll_jax import loss
from rll_jax.data import benchmarks, image_dataset, images
from rll_jax.networks import backbones, embedding_net
from rll_jax.training import cached_features, devices, embedding, steps
from tests.helpers.benchmark_trees import jpeg

RESNET = backbones.ResNetConfig((1, 1, 1, 1), width=8)
NETWORKS = {
    "two_maps": dict(
        backbone=RESNET, levels=("L", "M", "H"), frozen_stages=3
    ),  # L's stage and the last frozen one
    "all": dict(backbone=RESNET, levels=("M", "H"), frozen_stages=4),
    "googlenet": dict(
        backbone=backbones.GoogLeNetV2Config(width=0.1), levels=("L", "H"), frozen_stages=2
    ),
    "vit": dict(backbone=backbones.BACKBONES["vit_test"], levels=("L", "H"), frozen_stages=2),
}
SIDE = 32


def network(name):
    return embedding_net.EmbeddingNet(embedding_dim=8, batch_norm="frozen", **NETWORKS[name])


def make_images(n=12):
    return np.random.default_rng(0).integers(0, 255, (n, SIDE, SIDE, 3), np.uint8)


@pytest.mark.parametrize(
    "name",
    [
        "two_maps",
        "vit",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("all", "googlenet")),
    ],
)
def test_the_trainable_part_embeds_as_the_whole_network(name):
    model = network(name)
    part = cached_features.trainable_part(model, SIDE)
    assert [stage for stage, _ in part.cached_stages] == {
        "two_maps": [2, 3],
        "all": [3, 4],
        "googlenet": [1, 2],
        "vit": [1, 2],
    }[name]
    state = steps.create_train_state(model, optax.sgd(0.1), SIDE, 0)

    @jax.jit
    def all_of_it(state, images):
        cached = cached_features.feature_step(part)(state, images)["features"]
        return (
            cached,
            steps.embed_step(state, images),
            steps.embed_step(state.replace(apply_fn=part.apply), cached),
        )

    cached, expected, found = all_of_it(state, make_images())
    assert cached.shape == (12, cached_features.feature_size(part)) and cached.dtype == np.float16
    for level in model.levels:
        np.testing.assert_allclose(found[level], expected[level], atol=2e-3)


def test_a_step_on_cached_features_is_a_step_on_the_images():
    """The trained parameters and the heads' statistics move alike, the frozen stages not at all."""
    model = network("two_maps")
    part = cached_features.trainable_part(model, SIDE)
    labels = jnp.arange(12) // 3
    state = steps.create_train_state(model, optax.sgd(0.1), SIDE, 0)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    ends = jax.jit(functools.partial(model.apply, features=True))(variables, make_images())
    cached = jnp.concatenate(
        [ends[stage - 1].reshape(12, -1) for stage, _ in part.cached_stages], axis=1
    )  # not rounded
    step = jax.jit(
        lambda state, image: steps.train_step(
            state, {"image": image, "label": labels}, loss=loss.ranked_list_loss
        )[0]
    )
    expected, found = step(state, make_images()), step(state.replace(apply_fn=part.apply), cached)
    moved = 0
    for name in expected.params:
        trees = (expected.params, found.params, state.params)
        leaves = (jax.tree.leaves(tree[name]) for tree in trees)
        for a, b, before in zip(*leaves, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
            moved += np.abs(a - before).max() > 1e-4
    assert moved > 8
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        expected.batch_stats,
        found.batch_stats,
    )


class Frozen(NamedTuple):
    """A network's trainable part, and what computes the features of its frozen stages."""

    part: embedding_net.EmbeddingNet
    state: steps.TrainState
    embed: Callable[[Any], Any]


@pytest.fixture
def six_images(tmp_path):
    rows = [benchmarks.Row(f"{i}.jpg", i // 2, "train") for i in range(6)]
    for i, row in enumerate(rows):
        (tmp_path / row.path).write_bytes(jpeg(i))
    return image_dataset.from_rows(tmp_path, rows)["train"]


@pytest.fixture
def frozen(monkeypatch):
    model = network("two_maps")
    monkeypatch.setattr(cached_features, "batch_rows", lambda part: 4)  # so that there are pieces
    part, runner = (
        cached_features.trainable_part(model, SIDE),
        devices.make_runner("pmap", jax.devices()[:2]),
    )
    state = runner.replicate(steps.create_train_state(model, optax.sgd(0.1), SIDE, 0))
    embed_batch = runner.embed(cached_features.feature_step(part))

    def embed(views):
        return embedding.embed_images(
            state, views, lambda x: x, embed_batch, runner, batch_size=4, threads=1
        )

    return Frozen(part, state, embed)


def noise(image, rng):
    return rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def test_each_view_of_each_image_is_cached_once(tmp_path, six_images, frozen):
    data, part, seen = six_images, frozen.part, []

    def view(image, rng):
        seen.append(rng.integers(2**31))
        return np.full((SIDE, SIDE, 3), seen[-1] % 256, np.uint8)

    for _ in range(2):  # once
        cached_features.write(tmp_path / "cached.npy", data, view, 3, part, frozen.embed)
    assert len(seen) == len(set(seen)) == 18
    cached = cached_features.CachedFeatures(tmp_path / "cached.npy", data.labels, part)
    assert len(cached) == 6 and cached.image(5).shape == (3, cached_features.feature_size(part))
    pixels = np.stack([np.full((SIDE, SIDE, 3), seed % 256, np.uint8) for seed in seen])
    expected = np.asarray(
        jax.jit(cached_features.feature_step(part))(frozen.state, pixels)["features"]
    ).reshape(3, 6, -1)
    np.testing.assert_allclose(
        np.stack([cached.image(row) for row in range(6)], axis=1), expected, rtol=2e-3, atol=2e-3
    )
    drawn = {
        int(
            np.abs(
                cached_features.random_view(cached.image(0), np.random.default_rng(seed)).astype(
                    float
                )
                - cached.image(0)
            )
            .max(axis=1)
            .argmin()
        )
        for seed in range(20)
    }
    assert drawn == {0, 1, 2} and np.array_equal(
        cached_features.first_view(cached.image(0)), cached.image(0)[0]
    )
    assert left_in(tmp_path, six_images) == {"cached.npy", ".cached.npy.lock"}


def left_in(folder, data):
    """Returns the names of what is in a folder beside the images."""
    return {path.name for path in folder.iterdir()} - set(data.paths)


def test_a_damaged_cache_is_refused(tmp_path, six_images, frozen):
    data, part = six_images, frozen.part
    cached_features.write(tmp_path / "cached.npy", data, noise, 3, part, frozen.embed)
    for labels, size, text in (
        (data.labels[1:], None, r"it holds \(6, 3, "),
        (data.labels, 1000, "is damaged: remove it"),
    ):
        with (tmp_path / "cached.npy").open("r+b") as file:
            file.truncate(size or (tmp_path / "cached.npy").stat().st_size)
        with pytest.raises(ValueError, match=text):
            cached_features.CachedFeatures(tmp_path / "cached.npy", labels, part)


def test_what_cannot_be_cached_leaves_nothing(tmp_path, six_images, frozen):
    data, part = six_images, frozen.part
    (tmp_path / "3.jpg").write_bytes(b"broken")
    (tmp_path / ".again.npy.0.tmp").write_bytes(b"")  # of a process that was killed: removed
    with pytest.raises(images.BadImageError, match="3.jpg"):
        cached_features.write(
            tmp_path / "again.npy",
            data,
            lambda image, rng: np.asarray(image.rgb().resize((SIDE, SIDE))),
            1,
            part,
            frozen.embed,
        )
    with pytest.raises(ValueError, match="not finite in float16"):
        cached_features.write(
            tmp_path / "again.npy",
            data.take([0]),
            noise,
            1,
            part,
            lambda views: {"features": np.full((1, cached_features.feature_size(part)), np.inf)},
        )
    # A lock file stays: others may wait for it.
    assert left_in(tmp_path, six_images) == {".again.npy.lock"}


def test_a_network_without_frozen_stages_has_nothing_to_cache():
    with pytest.raises(ValueError, match="there is nothing to cache"):
        cached_features.trainable_part(
            dataclasses.replace(network("two_maps"), frozen_stages=0), SIDE
        )
