"""The batches of a run: their options and their sampler."""

import dataclasses
from typing import ClassVar

from experiments.engine.options import Section, option
from rll_jax import typing
from rll_jax.data import sampler
from rll_jax.data.image_dataset import EncodedImageDataset


@dataclasses.dataclass(frozen=True)
class BatchOptions(Section):
    """Which images make a batch."""

    title: ClassVar[str] = "Batches"

    classes_per_batch: int = option(40, "P, the number of classes in a batch.", low=2, main=True)
    images_per_class: int = option(
        4, "K, the number of images of each class in a batch.", low=2, main=True
    )
    sampling: str = option(
        "classes",
        "How a batch is drawn: P classes of K images; the same with the classes from few super "
        "classes; or P x K images in random order, each with --min_positives others of its class.",
        choices=("classes", "hierarchical", "shuffle"),
    )
    super_classes_per_batch: int = option(
        2, "The number of super classes in a batch of --sampling=hierarchical.", low=1
    )
    min_positives: int = option(
        1, "The number of positives drawn with each image in --sampling=shuffle.", low=1
    )
    class_on_one_device: bool = option(
        False,
        "Keep the images of a class on one device. Otherwise they are spread over the devices.",
    )

    @property
    def batch_size(self) -> int:
        """P x K."""
        return self.classes_per_batch * self.images_per_class

    def check_devices(self, devices: int, embed_chunk: int) -> None:
        """Raises ValueError where so many devices cannot share a batch."""
        if self.batch_size % devices:
            raise ValueError(
                f"a batch of {self.classes_per_batch} classes x {self.images_per_class} images = "
                f"{self.batch_size} images cannot be shared by {devices} devices: change "
                "--classes_per_batch or --images_per_class"
            )
        if self.class_on_one_device and self.classes_per_batch % devices:
            raise ValueError(
                f"--class_on_one_device: {self.classes_per_batch} classes cannot be shared by "
                f"{devices} devices: change --classes_per_batch"
            )
        if embed_chunk and self.batch_size // devices % embed_chunk:
            raise ValueError(
                f"--embed_chunk={embed_chunk} does not divide the {self.batch_size // devices} "
                "images of each device"
            )


def make_sampler(
    options: BatchOptions, train: EncodedImageDataset, seed: int, dataset: str
) -> typing.Sampler:
    """Returns the sampler of the training images of the dataset of that name.

    Raises:
      ValueError: the dataset cannot give such batches.
    """
    classes, images = options.classes_per_batch, options.images_per_class
    if options.sampling == "shuffle":
        return sampler.ShuffleSampler(train.labels, options.batch_size, options.min_positives, seed)
    if options.sampling == "hierarchical":
        if train.super_labels is None:
            raise ValueError(f"--sampling=hierarchical: {dataset} has no super classes")
        return sampler.HierarchicalSampler(
            train.labels,
            train.super_labels,
            classes,
            images,
            options.super_classes_per_batch,
            seed,
        )
    return sampler.ClassSampler(train.labels, classes, images, seed)
