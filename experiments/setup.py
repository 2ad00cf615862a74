"""Everything about a run that can be refused, checked before anything is written but a benchmark's prepared files."""
import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np

from experiments import config as config_lib
from experiments import sources, trained
from rll_jax import cache, datasets, parallel, sampler
from rll_jax.published import is_remote


class Setup(NamedTuple):
    """A run that can begin.

    Attributes:
      runner: of `rll_jax.parallel`.
      splits: {"train": ..., "test": ...}.
      batches: the sampler.
      published: the weights to start from, by their published names, or None.
      left_out: what is wrong with the pictures that were left out.
    """

    config: config_lib.Config
    workdir: pathlib.Path
    runner: parallel.Runner
    splits: dict[str, datasets.ImageSet]
    batches: Any
    published: dict[str, np.ndarray] | None
    left_out: list[str]


def prepare(config) -> Setup:
    """Raises ValueError where the options, the data or the workdir are at fault."""
    workdir = pathlib.Path(config.workdir)
    _check_workdir(workdir, config)
    runner = parallel.make_runner(config.parallel)
    batch_size = config.classes_per_batch * config.images_per_class
    if batch_size % runner.num_devices:
        raise ValueError(
            f"a batch of {config.classes_per_batch} classes x {config.images_per_class} images = {batch_size} images "
            f"cannot be shared by {runner.num_devices} devices: change --classes_per_batch or --images_per_class"
        )
    if config.embed_chunk and batch_size // runner.num_devices % config.embed_chunk:
        raise ValueError(
            f"--embed_chunk={config.embed_chunk} does not divide the {batch_size // runner.num_devices} images of each device"
        )
    published = trained.read_pretrained(config) if config.pretrained or config.init_from else None
    if jax.process_index():  # the first process prepares files; the others find them
        multihost_utils.sync_global_devices("data")
    splits, left_out = {}, []
    for split, data in sources.open_sets(config).items():
        bad = datasets.find_bad(data, full=config.verify_images == "full", threads=config.threads)
        sources.refuse_bad(bad, split, data, config)
        splits[split] = _cached(datasets.without(data, bad) if bad else data, split, config)
        left_out += bad.values()
    if not jax.process_index():
        multihost_utils.sync_global_devices("data")
    datasets.check_splits(splits["train"], splits["test"])
    multihost_utils.sync_global_devices("checked")  # before any writes into a workdir that others look at
    return Setup(config, workdir, runner, splits, _sampler(splits["train"], config), published, left_out)


def _check_workdir(workdir: pathlib.Path, config) -> None:
    """Raises ValueError unless the workdir is local, and free or holds this very run."""
    if is_remote(config.workdir):
        raise ValueError(f"--workdir={config.workdir}: expected a local folder")
    saved = workdir / "flags.txt"
    if not saved.exists():
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
            raise ValueError(f"--workdir={workdir} is in use and holds no run to resume: choose another folder")
        return
    before = config_lib.from_flagfile(saved)
    differing = [
        f"--{field.name}={getattr(before, field.name)} there, {getattr(config, field.name)} here"
        for field in dataclasses.fields(config)
        if getattr(before, field.name) != getattr(config, field.name) and field.name not in config_lib.FREE_TO_CHANGE
    ]
    if differing:
        raise ValueError(f"--workdir={workdir} holds another run ({'; '.join(differing)}): choose another --workdir, and --init_from={workdir} to start from its weights")


def _sampler(data, config):
    classes, each, seed = config.classes_per_batch, config.images_per_class, config.seed
    if config.sampling == "shuffle":
        return sampler.ShuffleSampler(data.labels, classes * each, config.min_positives, seed)
    if config.sampling == "hierarchical":
        if data.super_labels is None:
            raise ValueError(f"--sampling=hierarchical: {config.dataset} has no super classes")
        return sampler.HierarchicalSampler(data.labels, data.super_labels, classes, each, config.super_classes_per_batch, seed)
    return sampler.ClassSampler(data.labels, classes, each, seed)


def _cached(data, split: str, config):
    if config.cache == "none":
        return data
    if config.cache == "memory" and config.worker_processes:
        raise ValueError("--cache=memory is of one process: use --cache=disk with --worker_processes")
    if config.cache == "disk" and is_remote(config.data_dir):
        raise ValueError(f"--cache=disk writes into --data_dir, and {config.data_dir} is not a local folder: use --cache=memory, or a local copy")
    short_side = sources.cached_side(config.image_size)
    size = cache.estimated_bytes(data, short_side) / 2**30
    print(f"cache: about {size:.1f} GiB {'in memory' if config.cache == 'memory' else 'on disk'} for {len(data)} {split} images", flush=True)
    if config.cache == "memory":
        return cache.in_memory(data, short_side)
    if not config.data_dir:
        raise ValueError("--cache=disk needs --data_dir, where it is written")
    return cache.on_disk(data, short_side, config.data_dir, split)
