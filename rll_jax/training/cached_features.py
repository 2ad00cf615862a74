"""Features of a network's frozen stages, computed once for some views of each image and cached.

Cached are the maps at the ends of the stages from which the rest of the network continues, as
float16: rounded to one part in 2,000.
"""

from collections.abc import Callable, Mapping
import dataclasses
import glob
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from rll_jax.data import files, pipeline
from rll_jax.data.random_streams import Stream
from rll_jax.networks import embedding_net
from rll_jax.training.steps import TrainState

_BATCH_BYTES = 2**28  # of the features that are computed between two writes


def trainable_part(
    model: embedding_net.EmbeddingNet, image_size: int
) -> embedding_net.EmbeddingNet:
    """Returns the network that continues from cached features.

    Args:
      model: the whole network, with `frozen_stages`.
      image_size: side of the images in pixels, which decides the features' shapes.

    Returns:
      A network with the same parameters, which takes cached features instead of images.

    Raises:
      ValueError: no stage is frozen.
    """
    if not model.frozen_stages:
        raise ValueError("frozen_stages=0: there is nothing to cache, expected at least 1")
    of_level = embedding_net.level_stages(model.backbone)
    frozen_ends = {
        of_level[level] for level in model.levels if of_level[level] <= model.frozen_stages
    }
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.uint8)
    ends = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, features=True)[0], images
    )
    stages = sorted(frozen_ends | {model.frozen_stages})
    return model.clone(cached_stages=tuple((stage, ends[stage - 1].shape[1:]) for stage in stages))


def feature_size(part: embedding_net.EmbeddingNet) -> int:
    """Returns the number of values cached of a view, for what `trainable_part` returned."""
    return sum(math.prod(shape) for _, shape in part.cached_stages)


def feature_step(
    part: embedding_net.EmbeddingNet,
) -> Callable[[TrainState, jax.Array | np.ndarray], dict[str, jax.Array]]:
    """Returns the step that computes features, for `devices.Runner.embed`.

    Args:
      part: what `trainable_part` returned.

    Returns:
      (state of the whole network, (n, H, W, 3) images) -> {"features": (n, `feature_size`)
      float16}: the maps one after the other.
    """
    network = part.clone(cached_stages=())

    def compute(state: TrainState, images: jax.Array | np.ndarray) -> dict[str, jax.Array]:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        ends: Any = network.apply(variables, images, train=False, features=True)
        maps = [ends[stage - 1].reshape(len(images), -1) for stage, _ in part.cached_stages]
        return {"features": jnp.concatenate(maps, axis=1).astype(np.float16)}

    return compute


class CachedFeatures:
    """Cached features in the place of a dataset of images.

    Args:
      path: a file that `write` wrote.
      labels: (N,) integer classes of the images.
      part: what `trainable_part` returned.

    Raises:
      ValueError: the file is damaged, or does not have N rows of `feature_size(part)` values.
    """

    def __init__(
        self, path: str | os.PathLike, labels: np.ndarray, part: embedding_net.EmbeddingNet
    ):
        self.labels = labels
        size = feature_size(part)
        try:
            self._features = np.load(path, mmap_mode="r", allow_pickle=False)
            shape = self._features.shape
            wrong = "" if shape[::2] == (len(labels), size) else f"it holds {shape}"
        except (ValueError, EOFError) as error:
            wrong = str(error)
        if wrong:
            raise ValueError(
                f"{path} is damaged: remove it to have it written again "
                f"({wrong}, expected ({len(labels)}, views, {size}))"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, row: int) -> np.ndarray:
        """Returns (views, `feature_size`) float16, read from the disk when it is used."""
        return self._features[row]


def random_view(features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the features of one of an image's cached views, for training."""
    return features[rng.integers(len(features))]


def first_view(features: np.ndarray) -> np.ndarray:
    """Returns the features of an image's first cached view, for tests."""
    return features[0]


def batch_rows(part: embedding_net.EmbeddingNet) -> int:
    """Returns the number of images whose features are computed between two writes."""
    return max(1, _BATCH_BYTES // (2 * feature_size(part)))


def write(
    path: str | os.PathLike,
    data: pipeline.Images,
    view: Callable[[Any, np.random.Generator], np.ndarray],
    views: int,
    part: embedding_net.EmbeddingNet,
    embed: Callable[[pipeline.Images], Mapping[str, np.ndarray]],
) -> None:
    """Writes the file that `CachedFeatures` reads, unless it exists.

    The file is complete or absent. Of several processes that want the same file, one writes it and
    the others wait.

    Args:
      path: the file. A lock file beside it, `.NAME.lock`, is created and stays: a process may wait
        for it, and a new file of that name would be another lock.
      data: the images.
      view: (image, rng) -> (H, W, 3) uint8. The generator is keyed by the row and the number of
        the view, by no run's seed: runs with other seeds share the file.
      views: number of views of each image.
      part: what `trainable_part` returned.
      embed: a dataset whose `image(row)` is a view -> {"features": (N, `feature_size`)}, such as
        `embedding.embed_images` with `feature_step`.

    Raises:
      ValueError: a value is not finite in float16.
      data.images.BadImageError: an image cannot be read.
      OSError: the file cannot be written, such as on a full disk.
    """
    path = pathlib.Path(path)
    if path.exists():  # before the lock: the folder may be read-only
        return
    with files.exclusive_lock(path.with_name(f".{path.name}.lock"), wait=True):
        if path.exists():  # another process wrote it meanwhile
            return
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            leftover.unlink(missing_ok=True)  # a process was killed; these files are large
        with files.atomic_write(path) as temporary:
            features = _allocate(temporary, (len(data), views, feature_size(part)))
            rows = batch_rows(part)
            pieces = [
                _DrawnViews(data, view, number, first, min(first + rows, len(data)))
                for number in range(views)
                for first in range(0, len(data), rows)
            ]
            text = f"writing {path.name}"
            for piece in tqdm.tqdm(pieces, desc=text, unit="part", mininterval=1):
                features[piece.start : piece.stop, piece.number] = _finite_features(embed, piece)
            features.flush()


def _allocate(path: pathlib.Path, shape: tuple[int, int, int]) -> np.memmap:
    """Creates a float16 .npy file whose room on the disk is taken already.

    A full disk is told of now. In a file with holes, a later write would end in SIGBUS.
    """
    features = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return features


@dataclasses.dataclass(frozen=True)
class _DrawnViews:
    """View `number` of the images of rows `start` to `stop - 1`."""

    data: pipeline.Images
    view: Callable[[Any, np.random.Generator], np.ndarray]
    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def image(self, row: int) -> np.ndarray:
        row += self.start
        rng = np.random.default_rng((0, Stream.CACHED_VIEW, self.number, row))
        return self.view(self.data.image(row), rng)


def _finite_features(
    embed: Callable[[pipeline.Images], Mapping[str, np.ndarray]], views: _DrawnViews
) -> np.ndarray:
    """Returns (N, `feature_size`) features.

    Raises:
      ValueError: a value is not finite in float16.
    """
    features = embed(views)["features"]
    if not np.isfinite(features).all():
        raise ValueError(
            f"features of images {views.start} to {views.stop - 1} are not finite in float16 and "
            "cannot be cached: train without cached features, or with other weights"
        )
    return features
