"""Ranked List Loss on CARS196 (Krause et al. 2013): the first 98 models train, the other 98 are searched.

    python -m experiments.cars --flagfile=experiments/flagfiles/cars_2020.flags --data_dir=DIR

DIR holds the published files, unpacked: cars_annos.mat and car_ims/, or cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat.
"""

from absl import app

from experiments.engine import config, train_loop

if __name__ == "__main__":
    config.define_flags(dataset="cars", workdir="runs/cars", backbone="resnet50", image_size=224)
    app.run(train_loop.main, flags_parser=config.parse_flags)
