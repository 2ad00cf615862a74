"""What the network gets of a run's images: views of them, or cached features of frozen stages."""

from collections.abc import Callable
import functools
import hashlib
import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np

from experiments.engine import build, network
from experiments.engine.config import Config
from experiments.engine.datasets import Splits
from rll_jax import typing
from rll_jax.data import cache
from rll_jax.data.image_dataset import EncodedImageDataset
from rll_jax.data.random_streams import Stream
from rll_jax.networks import embedding_net
from rll_jax.training import cached_features, devices, embedding, steps


class Input(NamedTuple):
    """The input of a split: `view(data.image(row))`.

    Attributes:
      data: the dataset, or its cached features.
      view: what the network gets of an item; for training with a generator as second argument.
    """

    data: typing.ImageDataset
    view: Callable[..., np.ndarray]


def make_inputs(
    config: Config, splits: Splits, runner: devices.Runner, state: steps.TrainState
) -> tuple[steps.TrainState, dict[str, Input]]:
    """Returns the state as steps take it, and the input of each split.

    With --frozen_views the features of the state's frozen stages are computed and cached, unless
    they are cached already, and the state applies the remaining stages alone.

    Raises:
      ValueError: cached features are damaged, or features cannot be cached.
      OSError: features cannot be written.
      images.BadImageError: an image does not decode.
    """
    train_view, test_view = config.data.train_view(), config.data.test_view()
    if not config.network.frozen_views:
        inputs = {
            "train": Input(splits["train"], train_view),
            "test": Input(splits["test"], test_view),
        }
        return state, inputs
    model = cached_features.trainable_part(
        network.make_model(config.network), config.data.image_size
    )
    write = functools.partial(_cache_features, config, model, runner, state)
    train = write("train", splits["train"], config.network.frozen_views, train_view)
    test = write("test", splits["test"], 1, lambda image, rng: test_view(image))
    inputs = {
        "train": Input(train, cached_features.random_view),
        "test": Input(test, cached_features.first_view),
    }
    return state.replace(apply_fn=model.apply), inputs


def _cache_features(
    config: Config,
    model: embedding_net.EmbeddingNet,
    runner: devices.Runner,
    state: steps.TrainState,
    split: str,
    data: EncodedImageDataset,
    num_views: int,
    view: typing.View,
) -> cached_features.CachedFeatures:
    name = cache_name(config, model, data, num_views, _frozen_digest(config, state))
    path = pathlib.Path(config.runtime.data_dir, f"frozen_{split}_{name}.npy")
    embed = functools.partial(
        embedding.embed_images,
        runner.to_local(state.replace(opt_state=(), memory=None)),
        view=lambda drawn: drawn,
        embed=runner.embed(cached_features.feature_step(model)),
        runner=runner,
        batch_size=min(config.schedule.eval_batch_size, cached_features.batch_rows(model)),
        threads=config.runtime.threads,
    )
    cached_features.write(path, data, view, num_views, model, embed)
    return cached_features.CachedFeatures(path, data.labels, model)


def _frozen_digest(config: Config, state: steps.TrainState) -> str:
    """Returns a digest of the weights of the frozen stages."""
    trees = (state.params, state.batch_stats)
    frozen = {
        name: [tree[name] for tree in trees if name in tree]
        for name in state.params
        if config.network.is_frozen(name)
    }
    return build.weights_digest(frozen)


def cache_name(
    config: Config,
    model: embedding_net.EmbeddingNet,
    data: EncodedImageDataset,
    num_views: int,
    frozen_digest: str,
) -> str:
    """Returns a digest of all that changes the cached features of a dataset."""
    parts: tuple[Any, ...] = (
        cache.digest(data),
        int(Stream.CACHED_VIEW),
        num_views,
        frozen_digest,
        config.network.backbone_config,
        model.cached_stages,
        config.network.dtype,
        config.data.image_size,
        config.data.train_view(),  # the name may stand for another view in a later version
        config.data.augmentation,
        config.data.interpolation,
        config.data.cache,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def check_room(config: Config, splits: Splits) -> None:
    """Prints what the cache of --frozen_views takes, and checks that the disk has room for it.

    Files that may be the cache already are not counted.

    Raises:
      ValueError: there is not so much room.
    """
    directory = pathlib.Path(config.runtime.data_dir)
    views = config.network.frozen_views
    model = network.make_model(config.network)
    values = cached_features.feature_size(
        cached_features.trainable_part(model, config.data.image_size)
    )
    need = {
        "train": 2 * values * len(splits["train"]) * views,
        "test": 2 * values * len(splits["test"]),
    }
    cached = [path.stat().st_size for path in directory.glob("frozen_*.npy")]
    # A file is longer than its values by a header.
    missing = sum(
        size for size in need.values() if not any(0 < found - size < 4096 for found in cached)
    )
    free = shutil.disk_usage(directory).free
    print(
        f"cached features of the frozen stages: {sum(need.values()) / 2**30:.2f} GiB in "
        f"{directory}",
        flush=True,
    )
    if missing > free:
        raise ValueError(
            f"--frozen_views={views} needs {missing / 2**30:.2f} GiB in {directory}, "
            f"{free / 2**30:.2f} GiB are free"
        )
