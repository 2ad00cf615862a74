"""Ranked List Loss on the emoji that come with the project: half of the classes train, the other half is searched.

    python -m experiments.emoji --flagfile=experiments/flagfiles/emoji.flags
"""
import functools
import pathlib

from absl import app

from experiments import config, run
from rll_jax import datasets, images

_SHIPPED = pathlib.Path(__file__).parent / "data" / "emoji"


def open_split(data_dir: str, split: str) -> datasets.ImageSet:
    return datasets.open_prepared(data_dir or _SHIPPED, split)


def main(_):
    run.main(
        open_split,
        augment=lambda size: images.RandomAffine(size),
        test_view=lambda size: functools.partial(images.resize_center_crop, size=size, resize=size),
    )


if __name__ == "__main__":
    config.define_flags(workdir="runs/emoji")
    app.run(main, flags_parser=config.parse_flags)
