"""The seams of the project: what a loss, a backbone, a dataset, a view and a sampler must offer.

Whatever has these methods fits; nothing needs to inherit from these classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

__all__ = ["Backbone", "ImageDataset", "Loss", "Sampler", "TokenBackbone", "View"]


class Loss(Protocol):
    """A batch's loss, as `rll_jax.training.steps.train_step` calls it."""

    def __call__(
        self, embeddings: jax.Array, labels: jax.Array, *, axis_name: str | None = None
    ) -> jax.Array:
        """Returns a scalar whose mean over the devices is the loss of the whole batch.

        Args:
          embeddings: (N, D) floating, this device's rows.
          labels: (N,) integer classes.
          axis_name: the device axis whose rows are ranked together, or None for one device.
        """
        ...


class Backbone(Protocol):
    """A network family's configuration: from images to one feature map per stage."""

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of the pixel values 0-255 that the weights expect, in their channel order."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation that goes with `mean`."""
        ...

    @property
    def bgr(self) -> bool:
        """Whether the weights expect blue, green, red instead of red, green, blue."""
        ...

    @property
    def num_stages(self) -> int:
        """The number of stages. Levels L, M and H are the ends of the last three."""
        ...

    def stage_of(self, module: str) -> int:
        """Returns the stage, from 1, of a top-level module by its name; 0 for the stem."""
        ...

    def array_name(self, modules: Sequence[str]) -> str:
        """Returns the name that published weights have for a module, given its path of names."""
        ...

    def from_published(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns arrays under the names of `array_name` from those of other publishers.

        What stands before the names stays, but for a vision transformer, which finds its tower.
        """
        ...

    def stage_ends(
        self,
        x: jax.Array | Mapping[int, jax.Array],
        conv: Callable[..., Any],
        norm: Callable[..., Any],
        remat: Sequence[int] = (),
        frozen: int = 0,
    ) -> list[jax.Array | None]:
        """Returns the feature map at the end of every stage, (B, h, w, channels) each.

        Args:
          x: (B, H, W, 3) normalised images, or the maps at the ends of some first stages by stage
            number: the network then goes on from the last of them, and the ends of stages that
            are not given are None.
          conv: makes a convolution, as `flax.linen.Conv` without a bias.
          norm: makes a batch norm.
          remat: stages, from 1, whose blocks are computed again for the gradient.
          frozen: the number of first stages that the gradient does not reach.
        """
        ...


@runtime_checkable
class TokenBackbone(Backbone, Protocol):
    """A backbone that was published with a pool of its own, and whose last stage ends with tokens.

    Stages end with (B, tokens, channels); of a ConvNeXt, whose first stages end with maps, the last
    alone. It has no batch norm.
    """

    @property
    def level_stages(self) -> tuple[int, int, int]:
        """The stages whose ends are the levels L, M and H; 0 for a level that does not exist."""
        ...

    def to_map(self, tokens: jax.Array, sides: Sequence[int] | None = None) -> jax.Array:
        """Returns the (B, h, w, channels) map of the patches from a stage's end.

        Args:
          tokens: (B, tokens, channels), or the map of a stage that ends with one.
          sides: the height and the width of the images in pixels; None: they are square.
        """
        ...

    def pooled(self, tokens: jax.Array) -> jax.Array:
        """Returns (B, channels), what the head H takes, from the tokens at the last stage's end."""
        ...

    def merged(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters without adapters, which are added to what they stand beside."""
        ...

    def to_huggingface(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns arrays under the names of `array_name` under those of Hugging Face."""
        ...


class ImageDataset(Protocol):
    """Labelled images by row number."""

    @property
    def labels(self) -> np.ndarray:
        """(N,) integer classes."""
        ...

    def __len__(self) -> int:
        """Returns N, the number of images."""
        ...

    def image(self, row: int) -> Any:
        """Returns what a view of this dataset takes, such as `data.images.EncodedImage`.

        Raises:
          data.images.BadImageError: the image cannot be read.
        """
        ...


class View(Protocol):
    """A random view of an image for training. A view for tests takes no generator."""

    def __call__(self, image: Any, rng: np.random.Generator, /) -> np.ndarray:
        """Returns (H, W, 3) uint8; the same for a generator in the same state."""
        ...


class Sampler(Protocol):
    """Row numbers of each step's batch: a pure function of (seed, step)."""

    @property
    def seed(self) -> int:
        """The seed, which also keys the augmentation."""
        ...

    @property
    def batch_size(self) -> int:
        """The number of rows in every batch."""
        ...

    @property
    def images_per_class(self) -> int:
        """The number of neighbouring rows of a batch that belong together."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps in which every class or image is drawn once."""
        ...

    def batch(self, step: int) -> np.ndarray:
        """Returns the (batch_size,) row numbers of the batch of `step`, counted from 0."""
        ...
