"""Trains on CARS196 (Krause et al. 2013): the first 98 models train, the others are searched.

    python -m experiments.cars --flagfile=experiments/flagfiles/cars_2020.flags --data_dir=DIR

DIR holds the dataset's files, unpacked: cars_annos.mat and car_ims/; or cars_train/, cars_test/,
devkit/ and cars_test_annos_withlabels.mat, as from torchvision or Kaggle; or a folder for each
class.
"""

from absl import app

from experiments.engine import command, flags, train_loop

if __name__ == "__main__":
    flags.define(dataset="cars", workdir="runs/cars", backbone="resnet50", image_size=224)
    app.run(train_loop.main, flags_parser=command.parse_flags)
