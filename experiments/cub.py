"""Trains on CUB-200-2011 (Wah et al. 2011): the first 100 classes train, the others are searched.

    python -m experiments.cub --flagfile=experiments/flagfiles/cub_2020.flags --data_dir=DIR

DIR holds CUB_200_2011.tgz, unpacked: images.txt, image_class_labels.txt and images/; or a folder
for each class, such as 001.Black_footed_Albatross.
"""

from absl import app

from experiments.engine import command, flags, train_loop

if __name__ == "__main__":
    flags.define(dataset="cub", workdir="runs/cub", backbone="resnet50", image_size=224)
    app.run(train_loop.main, flags_parser=command.parse_flags)
