"""Trains on Stanford Online Products (Song et al. 2016).

    python -m experiments.sop --flagfile=experiments/flagfiles/sop_2020.flags --data_dir=DIR

11,318 classes train, 11,316 others are searched. DIR holds the published archive, unpacked:
Stanford_Online_Products/ with Ebay_train.txt, Ebay_test.txt and the images; or the lists in
Info_Files/ and the images in images/.
"""

from absl import app

from experiments.engine import command, flags, train_loop

if __name__ == "__main__":
    flags.define(dataset="sop", workdir="runs/sop", backbone="resnet50", image_size=224)
    app.run(train_loop.main, flags_parser=command.parse_flags)
