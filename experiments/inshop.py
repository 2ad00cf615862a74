"""Ranked List Loss on In-shop Clothes Retrieval (Liu et al. 2016): 3,997 items train, pictures of 3,985 others are searched in a gallery.

    python -m experiments.inshop --flagfile=experiments/flagfiles/inshop_2020.flags --data_dir=DIR

DIR holds the published files: list_eval_partition.txt, or Eval/ with it, and img/, unpacked.
"""

from absl import app

from experiments.engine import config, train_loop

if __name__ == "__main__":
    config.define_flags(
        dataset="inshop", workdir="runs/inshop", backbone="resnet50", image_size=224
    )
    app.run(train_loop.main, flags_parser=config.parse_flags)
