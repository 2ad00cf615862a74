"""Embeddings of a whole dataset: each image exactly once, whatever the batch size and devices."""

from collections.abc import Callable, Mapping
import dataclasses
import itertools
import sys
from typing import Any

import jax
import numpy as np
import tqdm

from rll_jax.data import pipeline
from rll_jax.data.image_dataset import EncodedImageDataset
from rll_jax.networks import embedding_net
from rll_jax.training import devices as devices_lib


def embed_images(
    state: Any,
    data: pipeline.Images,
    view: Callable[[Any], np.ndarray],
    embed: Callable[[Any, Any], Mapping[str, jax.Array]],
    runner: devices_lib.Runner,
    *,
    batch_size: int,
    threads: int = 2,
    processes: int = 0,
    on_bad: Callable[[int], None] | None = None,
    progress: str = "",
) -> dict[str, np.ndarray]:
    """Embeds every image of a dataset. Each process embeds its share and gets the rows of all.

    Args:
      state: on the devices of this process, as `runner.to_local` returns it.
      data: the images, at least one for each process.
      view: image -> (H, W, 3) uint8.
      embed: `runner.embed(steps.embed_step)`, made once so that it compiles once.
      runner: the devices.
      batch_size: number of images embedded at a time in a process, rounded up to a multiple of the
        number of its devices.
      threads: that load images, in each process.
      processes: that load images beside this one; 0: threads alone.
      on_bad: called in every process with the row of each image that cannot be read. The embedding
        of such an image means nothing.
      progress: the name of a bar on stderr, where this takes more than two seconds; "": none.

    Returns:
      {level: (N, D) float32}, rows in the order of the dataset, the same in every process.

    Raises:
      data.images.BadImageError: an image cannot be read and `on_bad` is None.
    """
    index, count = jax.process_index(), jax.process_count()
    devices = runner.num_devices // count
    bounds = [len(data) * i // count for i in range(count + 1)]  # of the processes' rows
    share = _RowRange(data, bounds[index], bounds[index + 1])
    is_bad = np.zeros(len(share), bool)

    def mark_bad(row: int) -> None:
        is_bad[row] = True

    rows = -(-batch_size // devices) * devices
    batches = pipeline.test_batches(
        share,
        view,
        batch_size=rows,
        threads=threads,
        processes=processes,
        on_bad=None if on_bad is None else mark_bad,
    )
    parts: list[dict[str, np.ndarray]] = []
    with tqdm.tqdm(
        total=len(share), desc=progress, unit="image", delay=2, leave=False, disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    ) as bar:  # fmt: skip
        for images in pipeline.prefetch(batches, runner.shard_local):
            parts.append({level: np.asarray(e) for level, e in embed(state, images).items()})
            bar.update(min(rows, len(share) - bar.n))
    embeddings = {  # without the rows that fill up the last batch
        level: np.concatenate([part[level] for part in parts])[: len(share)] for level in parts[0]
    }
    counts = np.diff(bounds).tolist()
    embeddings, is_bad = devices_lib.gather_over_processes((embeddings, is_bad), counts)
    if on_bad is not None:
        for row in np.flatnonzero(is_bad):
            on_bad(int(row))
    return embeddings


@dataclasses.dataclass(frozen=True)
class _RowRange:
    """The images of rows `start` to `stop - 1`."""

    data: pipeline.Images
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def image(self, row: int) -> Any:
        return self.data.image(self.start + row)


def combinations(embeddings: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Concatenates the embeddings of each level alone, of each pair of levels, and of all levels.

    Args:
      embeddings: {level: (N, D)}.

    Returns:
      {"L": ..., "M": ..., "H": ..., "L,M": ..., ..., "L,M,H": ...} of (N, levels * D), of unit
      length again.
    """
    levels = [level for level in embedding_net.LEVELS if level in embeddings]
    combined = {}
    for size in range(1, len(levels) + 1):
        for some in itertools.combinations(levels, size):
            joined = embedding_net.concatenate_levels({level: embeddings[level] for level in some})
            combined[",".join(some)] = np.asarray(joined)
    return combined


def left_out(data: EncodedImageDataset) -> dict[str, Any]:
    """Returns the ids and groups of a dataset as `rll_jax.metrics.retrieval_metrics` takes them.

    Args:
      data: the dataset.

    Returns:
      Keyword arguments that go with what `queries_and_gallery` returns. Rows are images of their
      own where there are no ids: a query that is in the gallery does not answer itself, and a copy
      of it in another file does.
    """
    ids = data.image_ids
    if ids is None and data.in_gallery is not None:
        ids = np.arange(len(data.in_gallery))
    named = {"ids": ids, "groups": data.groups}
    arguments: dict[str, Any] = {}
    for name, values in named.items():
        if values is None:
            continue
        if data.in_gallery is None:
            arguments[f"query_{name}"] = values
        else:
            arguments[f"query_{name}"] = values[data.query_rows]
            arguments[f"gallery_{name}"] = values[data.gallery_rows]
    return arguments


def queries_and_gallery(
    embeddings: np.ndarray, data: EncodedImageDataset
) -> tuple[np.ndarray, ...]:
    """Returns the arguments of `rll_jax.metrics.retrieval_metrics` for a dataset.

    Args:
      embeddings: (N, D), rows in the order of the dataset.
      data: the dataset's labels, and which rows are the gallery.

    Returns:
      (embeddings, labels) if each image is query and gallery; otherwise
      (query embeddings, query labels, gallery embeddings, gallery labels).
    """
    if data.in_gallery is None:
        return embeddings, data.labels
    queries, gallery = data.query_rows, data.gallery_rows
    return embeddings[queries], data.labels[queries], embeddings[gallery], data.labels[gallery]
