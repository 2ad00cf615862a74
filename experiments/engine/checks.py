"""Everything about a run that can be refused, checked before anything is written but a benchmark's prepared files."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np

from experiments.engine import build, datasets, network_inputs
from experiments.engine import config as config_lib
from rll_jax.data import cache, image_dataset, sampler
from rll_jax.data.paths import is_remote
from rll_jax.training import devices as devices_lib


class Setup(NamedTuple):
    """A run that can begin.

    Attributes:
      runner: of `rll_jax.training.devices`.
      splits: {"train": ..., "test": ...}.
      batches: the sampler.
      published: the weights to start from, by their published names, or None.
      left_out: what is wrong with the pictures that were left out.
    """

    config: config_lib.Config
    workdir: pathlib.Path
    runner: devices_lib.Runner
    splits: dict[str, image_dataset.EncodedImageDataset]
    batches: Any
    published: dict[str, np.ndarray] | None
    left_out: list[str]


def prepare(config) -> Setup:
    """Raises ValueError where the options, the data or the workdir are at fault."""
    workdir = pathlib.Path(config.workdir)
    _check_workdir(workdir, config)
    runner = devices_lib.make_runner(config.parallel)
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
    if config.frozen_views and (not config.data_dir or is_remote(config.data_dir)):
        raise ValueError(
            f"--frozen_views={config.frozen_views} writes into --data_dir, a local folder, and it is {config.data_dir!r}: use a local copy"
        )
    if config.memory_size and (
        config.memory_size < batch_size or config.memory_size % runner.num_devices
    ):
        raise ValueError(
            f"--memory_size={config.memory_size}: expected 0, or a multiple of the {runner.num_devices} devices and at least the {batch_size} images of a batch"
        )
    begun = any(
        path.name.isdigit() for path in (workdir / "checkpoints").glob("*")
    )  # then its own weights are
    published = (
        build.read_pretrained(config)
        if (config.pretrained or config.init_from) and not begun
        else None
    )
    if jax.process_index():  # the first process prepares files; the others find them
        multihost_utils.sync_global_devices("data")
    splits, left_out = datasets.open_usable(config)
    if not jax.process_index():
        multihost_utils.sync_global_devices("data")
        for split, data in splits.items():
            print(
                f"{split}: {len(data)} images of {len(np.unique(data.labels))} classes", flush=True
            )
        if left_out:
            print(f"{len(left_out)} images are left out, such as {left_out[0]}", flush=True)
    image_dataset.check_splits(splits["train"], splits["test"])
    if len(splits["test"]) < jax.process_count():
        raise ValueError(
            f"{len(splits['test'])} test images are fewer than the {jax.process_count()} processes"
        )
    check_same_data(workdir, splits)
    batches = _sampler(splits["train"], config, runner.num_devices)
    datasets.views(config).train(config.image_size)  # may lack a package
    splits = cached(splits, config)
    if config.frozen_views:
        network_inputs.check_room(splits, config)
    multihost_utils.sync_global_devices(
        "checked"
    )  # before any writes into a workdir that others look at
    return Setup(config, workdir, runner, splits, batches, published, left_out)


def fingerprint(data: image_dataset.EncodedImageDataset) -> str:
    """Of which images of which classes a set holds."""
    digest = hashlib.sha256("\n".join(data.paths.tolist()).encode(errors="surrogateescape"))
    for column in (data.labels, data.in_gallery):
        digest.update(b"" if column is None else np.ascontiguousarray(column))
    return digest.hexdigest()[:16]


def check_same_data(workdir, splits) -> None:
    """Raises ValueError where the run in the workdir had other images: classes of its training might be searched now."""
    saved = workdir / "data.json"
    if saved.exists():
        try:
            before = json.loads(saved.read_text())
        except ValueError:
            raise ValueError(
                f"{saved} is damaged: remove it if the images are those that the run began with"
            )
        differing = [
            split for split, data in splits.items() if before.get(split) != fingerprint(data)
        ]
        if differing:
            raise ValueError(
                f"--workdir={workdir} holds a run on other images: its {' and '.join(differing)} images or their classes have changed; "
                "choose another --workdir, or bring them back"
            )


def _check_workdir(workdir: pathlib.Path, config) -> None:
    """Raises ValueError unless the workdir is local, and free or holds this very run."""
    if is_remote(config.workdir):
        raise ValueError(f"--workdir={config.workdir}: expected a local folder")
    saved = workdir / "flags.txt"
    if not saved.exists():
        if workdir.exists() and (
            not workdir.is_dir() or any(not path.name.startswith(".") for path in workdir.iterdir())
        ):
            raise ValueError(
                f"--workdir={workdir} is in use and holds no run to resume: choose another folder"
            )
        return
    before = config_lib.from_flagfile(saved)
    differing = [
        f"--{field.name}={getattr(before, field.name)} there, {getattr(config, field.name)} here"
        for field in dataclasses.fields(config)
        if getattr(before, field.name) != getattr(config, field.name)
        and field.name not in config_lib.FREE_TO_CHANGE
    ]
    if differing:
        raise ValueError(
            f"--workdir={workdir} holds another run ({'; '.join(differing)}): choose another --workdir, and --init_from={workdir} to start from its weights"
        )


def _sampler(data, config, devices: int):
    if config.class_on_one_device and config.classes_per_batch % devices:
        raise ValueError(
            f"--class_on_one_device: {config.classes_per_batch} classes cannot be shared by {devices} devices: change --classes_per_batch"
        )
    classes, each, seed = config.classes_per_batch, config.images_per_class, config.seed
    if config.sampling == "shuffle":
        return sampler.ShuffleSampler(data.labels, classes * each, config.min_positives, seed)
    if config.sampling == "hierarchical":
        if data.super_labels is None:
            raise ValueError(f"--sampling=hierarchical: {config.dataset} has no super classes")
        return sampler.HierarchicalSampler(
            data.labels, data.super_labels, classes, each, config.super_classes_per_batch, seed
        )
    return sampler.ClassSampler(data.labels, classes, each, seed)


def cached(splits: dict, config) -> dict:
    """The sets as --cache has them; what that takes is told first.

    Raises:
      ValueError: it cannot be, or there is not so much memory or space (how much).
    """
    if config.cache == "none":
        return splits
    if datasets.augment(config) == "border_crop":
        raise ValueError(
            "--cache keeps shrunk pictures, in which a border is no longer what --augment=border_crop cuts: leave one of them out"
        )
    if config.cache == "memory" and config.worker_processes:
        raise ValueError(
            "--cache=memory is of one process: use --cache=disk with --worker_processes"
        )
    if config.cache == "disk" and (not config.data_dir or is_remote(config.data_dir)):
        raise ValueError(
            f"--cache=disk is written into --data_dir, a local folder, and it is {config.data_dir!r}: use --cache=memory, or a local copy"
        )
    short_side = datasets.cached_side(config.image_size)
    need = {split: cache.estimated_bytes(data, short_side) for split, data in splits.items()}
    where = "in memory" if config.cache == "memory" else "on disk"
    print(
        f"cache: about {sum(need.values()) / 2**20:,.0f} MiB {where} for {sum(map(len, splits.values()))} images",
        flush=True,
    )
    if config.cache == "disk":
        return {
            split: cache.on_disk(data, short_side, config.data_dir, split)
            for split, data in splits.items()
        }
    if sum(need.values()) > (free := cache.free_memory()):
        raise ValueError(
            f"--cache=memory would take {sum(need.values()) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: use --cache=disk or none"
        )
    return {split: cache.in_memory(data, short_side) for split, data in splits.items()}
