"""Trains on In-shop Clothes Retrieval (Liu et al. 2016).

    python -m experiments.inshop --flagfile=experiments/flagfiles/inshop_2020.flags --data_dir=DIR

3,997 items train. Images of 3,985 other items are the queries, searched in a gallery. DIR holds the
published files: list_eval_partition.txt, or Eval/ with it, and img/ or img_highres/, unpacked.
"""

from absl import app

from experiments.engine import command, flags, train_loop

if __name__ == "__main__":
    flags.define(dataset="inshop", workdir="runs/inshop", backbone="resnet50", image_size=224)
    app.run(train_loop.main, flags_parser=command.parse_flags)
