"""Trains on your own images.

    python -m experiments.folder --data_dir=DIR
    python -m experiments.folder --data_dir=DIR --index=TABLE.csv

DIR has a folder of images for each class. A share of the classes (--test_share, drawn by
--split_seed) is searched, the others train; --test_classes=second_half searches the second half in
the order of their names. Or DIR has train/ and test/ (or val/) with such folders, or train/, query/
and gallery/. Or a table names the images by the columns path (from DIR), label and optionally
split: train and test (or val), or train, query and gallery. Tables of open-metric-learning are read
too.
"""

from absl import app

from experiments.engine import command, flags, train_loop

if __name__ == "__main__":
    flags.define(dataset="folder", workdir="runs/folder", backbone="resnet50", image_size=224)
    app.run(train_loop.main, flags_parser=command.parse_flags)
