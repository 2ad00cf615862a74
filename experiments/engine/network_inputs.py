"""What the network gets of a run's pictures: the pictures, or what its frozen stages have made of them (--frozen_views)."""

import functools
import hashlib
import pathlib
import shutil
from typing import Any, Callable, NamedTuple

from experiments.engine import build, datasets
from rll_jax.data import cache, image_dataset
from rll_jax.training import cached_features, embedding, steps


class Input(NamedTuple):
    """What the network gets of a split: `view(data.image(row))`, of the train split with a generator as its second argument."""

    data: Any
    view: Callable


def of(prepared, state) -> tuple[steps.TrainState, dict[str, Input]]:
    """The state as steps take it and what they get: pictures, or what the state's frozen stages have made of them (--frozen_views).

    Raises:
      ValueError: what was kept of them is damaged, or cannot be kept.
      OSError: it cannot be written.
      images.BadImageError: a picture does not decode.
    """
    config, splits, runner = prepared.config, prepared.splits, prepared.runner
    views = datasets.views(config)
    of_train, of_test = views.train(config.image_size), views.test(config.image_size)
    if not config.frozen_views:
        return state, {
            "train": Input(splits["train"], of_train),
            "test": Input(splits["test"], of_test),
        }
    rest, here = (
        cached_features.trainable_part(build.make_model(config), config.image_size),
        runner.to_local(state.replace(opt_state=(), memory=None)),
    )
    chosen = {
        name: [tree[name] for tree in (state.params, state.batch_stats) if name in tree]
        for name in state.params
        if build.is_frozen(config, name)
    }
    weights = build.identity(chosen)
    embed = functools.partial(
        embedding.embed_images,
        here,
        view=lambda drawn: drawn,
        embed=runner.embed(cached_features.feature_step(rest)),
        runner=runner,
        batch_size=min(config.eval_batch_size, cached_features.batch_rows(rest)),
        threads=config.threads,
    )
    found = {}
    for split, number, view, read in (
        ("train", config.frozen_views, of_train, cached_features.random_view),
        ("test", 1, lambda picture, rng: of_test(picture), cached_features.first_view),
    ):
        path = pathlib.Path(
            config.data_dir,
            f"frozen_{split}_{kept_as(config, rest, splits[split], number, weights)}.npy",
        )
        cached_features.write(path, splits[split], view, number, rest, embed)
        found[split] = Input(cached_features.CachedFeatures(path, splits[split].labels, rest), read)
    return state.replace(apply_fn=rest.apply), found


def check_room(splits, config) -> None:
    """Tells what --frozen_views takes; raises ValueError where there is not so much room. What may be there already is not counted."""
    directory, width = (
        pathlib.Path(config.data_dir),
        cached_features.feature_size(
            cached_features.trainable_part(build.make_model(config), config.image_size)
        ),
    )
    need = {
        split: 2 * width * len(data) * (config.frozen_views if split == "train" else 1)
        for split, data in splits.items()
    }
    there = [path.stat().st_size for path in directory.glob("frozen_*.npy")]
    missing = sum(
        size for size in need.values() if not any(0 < found - size < 4096 for found in there)
    )  # a header longer
    free = shutil.disk_usage(directory).free
    print(
        f"frozen stages: what they make of the pictures takes {sum(need.values()) / 2**30:.2f} GiB in {directory}",
        flush=True,
    )
    if missing > free:
        raise ValueError(
            f"--frozen_views={config.frozen_views} needs {missing / 2**30:.2f} GiB in {directory}, {free / 2**30:.2f} GiB are free"
        )


def kept_as(config, rest, data: image_dataset.EncodedImageDataset, views: int, weights: str) -> str:
    """A digest of all that changes what frozen stages with these weights make of so many views of a set."""
    of_config = (
        config.network,
        rest.cached_stages,
        config.dtype,
        config.image_size,
        datasets.augment(config),
        config.cache,
    )
    what = (cache.digest(data), views, weights, *of_config)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]
