"""What the frozen stages of a network make of each picture, computed once for some views of each and read at every step after.

Kept are the maps at the ends of those stages from which the rest of the network goes on, as float16: rounded to one part in 2,000.
"""

import contextlib
import fcntl
import math
import os
import pathlib
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from rll_jax.networks import embedding_net

_VIEWS = 4  # the stream of random numbers of the views, beside the pipeline's
_BYTES = 2**28  # of what is embedded at a time


def trainable_part(
    model: embedding_net.EmbeddingNet, image_size: int
) -> embedding_net.EmbeddingNet:
    """The network behind the frozen stages: the same parameters, and what is kept of an image instead of the image.

    Raises:
      ValueError: no stage is frozen.
    """
    if not model.frozen_stages:
        raise ValueError("frozen_stages=0: there is nothing to keep")
    first_level = (
        model.backbone.num_stages - len(embedding_net.LEVELS) + 1
    )  # the stage at whose end L is taken
    of_levels = {first_level + embedding_net.LEVELS.index(level) for level in model.levels}
    stages = sorted(
        {stage for stage in of_levels if stage <= model.frozen_stages} | {model.frozen_stages}
    )
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.uint8)
    ends = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, features=True)[0], images
    )
    return model.clone(cached_stages=tuple((stage, ends[stage - 1].shape[1:]) for stage in stages))


def feature_size(rest: embedding_net.EmbeddingNet) -> int:
    """Values kept of a view."""
    return sum(math.prod(shape) for _, shape in rest.cached_stages)


def feature_step(rest: embedding_net.EmbeddingNet) -> Callable:
    """(state of the whole network, (n, H, W, 3) images) -> {"kept": (n, `feature_size`) float16}, for `parallel.Runner.embed`."""
    whole = rest.clone(cached_stages=())

    def kept(state, images):
        ends = whole.apply(
            {"params": state.params, "batch_stats": state.batch_stats},
            images,
            train=False,
            features=True,
        )
        return {
            "kept": jnp.concatenate(
                [ends[stage - 1].reshape(len(images), -1) for stage, _ in rest.cached_stages],
                axis=1,
            ).astype(np.float16)
        }

    return kept


class CachedFeatures:
    """What is kept of a set, in the place of the set: `image(row)` is (views, values) float16.

    Raises:
      ValueError: the file is damaged, or not of so many rows and values.
    """

    def __init__(self, path, labels, rest: embedding_net.EmbeddingNet):
        self.labels = labels
        try:
            self._maps = np.load(path, mmap_mode="r", allow_pickle=False)
            wrong = (
                ""
                if self._maps.shape[::2] == (len(labels), feature_size(rest))
                else f"it holds {self._maps.shape}"
            )
        except (ValueError, EOFError) as error:
            wrong = str(error)
        if wrong:
            raise ValueError(f"{path} is damaged: remove it, and it is written anew ({wrong})")

    def __len__(self):
        return len(self.labels)

    def image(self, row: int) -> np.ndarray:
        return self._maps[row]


def random_view(kept: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return kept[rng.integers(len(kept))]


def first_view(kept: np.ndarray) -> np.ndarray:
    return kept[0]


def batch_rows(rest: embedding_net.EmbeddingNet) -> int:
    return max(1, _BYTES // (2 * feature_size(rest)))


def write(
    path, data, view: Callable, views: int, rest: embedding_net.EmbeddingNet, embed: Callable
) -> None:
    """The file that `CachedFeatures` reads, unless it is there. Of processes that want the same, one writes and the others wait for it.

    Args:
      data: the set of pictures, such as `datasets.EncodedImageDataset`.
      view: (image, rng) -> (H, W, 3) uint8; the generator depends on the row and on which of the views it is.
      views: of each picture.
      embed: a set, whose `image(row)` is a view -> {"kept": (N, values)}: `evaluate.embed_images` with `feature_step`.

    Raises:
      ValueError: a value is too large for float16 or not finite.
      images.BadImageError: a picture does not decode.
      OSError: there is not so much room, and the like.
    """
    path = pathlib.Path(path)
    if path.exists():  # perhaps where nothing can be written
        return
    with _alone(path.with_name(f".{path.name}.lock")):
        if path.exists():  # by now
            return
        aside = path.with_name(f".{path.name}.tmp")
        try:
            _write(aside, path.name, data, view, views, rest, embed)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def _write(aside, name, data, view, views, rest, embed):
    maps = np.lib.format.open_memmap(
        aside, "w+", np.float16, (len(data), views, feature_size(rest))
    )
    if hasattr(os, "posix_fallocate"):
        with (
            aside.open("r+b") as file
        ):  # a full disk is told of now; in a file with holes it would be a SIGBUS on the way
            os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)
    rows = batch_rows(rest)
    parts = [(number, first) for number in range(views) for first in range(0, len(data), rows)]
    for number, first in tqdm.tqdm(parts, desc=f"writing {name}", unit="part", mininterval=1):
        part = _Drawn(data, view, number, first, min(first + rows, len(data)))
        found = embed(part)["kept"]
        if not np.isfinite(found).all():
            raise ValueError(
                "what the frozen stages make of a picture is not finite in float16: it cannot be kept"
            )
        maps[first : first + len(part), number] = found
    maps.flush()


@contextlib.contextmanager
def _alone(lock: pathlib.Path):
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


class _Drawn:
    """A view of each of some pictures, side by side."""

    def __init__(self, data, view, number, start, stop):
        self._data, self._view, self._number, self._start, self._stop = (
            data,
            view,
            number,
            start,
            stop,
        )

    def __len__(self):
        return self._stop - self._start

    def image(self, row):
        row += self._start
        return self._view(self._data.image(row), np.random.default_rng((_VIEWS, self._number, row)))
