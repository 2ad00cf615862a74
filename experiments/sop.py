"""Ranked List Loss on Stanford Online Products (Song et al. 2016): 11,318 classes train, 11,316 others are searched.

    python -m experiments.sop --flagfile=experiments/flagfiles/sop.flags --data_dir=DIR

DIR holds the published archive, unpacked: Stanford_Online_Products/ with Ebay_train.txt, Ebay_test.txt and the images.
"""
import functools

from absl import app

from experiments import config, run
from rll_jax import datasets, images

_RESIZE = 256 / 227  # the recipes resize to 256 and keep 227


def main(_):
    run.main(
        datasets.open_sop,
        augment=lambda size: images.RandomResizedCrop(size),
        test_view=lambda size: functools.partial(images.resize_center_crop, size=size, resize=round(size * _RESIZE)),
        ks=(1, 10, 100, 1000),
    )


if __name__ == "__main__":
    config.define_flags(workdir="runs/sop", backbone="resnet50", image_size=224)
    app.run(main, flags_parser=config.parse_flags)
