"""Streams of random numbers of a seed: each draw is keyed by (seed, stream, ...)."""

import enum


class Stream(enum.IntEnum):
    """The second entry of the key given to `numpy.random.default_rng`.

    The numbers are part of what a seed means: changing one changes every run.
    """

    EPOCH = 0  # the order of the classes or images in an epoch
    STEP = 1  # the images of a step's batch
    AUGMENT = 2  # the augmentation of one image
    CLASS_TRANSFORM = 3  # the transform that all images of a class share in a batch
    GROUPS = 4  # the groups of classes in a hierarchical epoch
    CACHED_VIEW = 5  # the views whose features are cached
