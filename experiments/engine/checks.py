"""Checks a run before it begins. Before the checks pass, a run writes into --data_dir only."""

import hashlib
import json
import pathlib
import shutil
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np

from experiments.engine import (
    augmentation,
    batches,
    datasets,
    network_inputs,
    options,
    pretrained,
    processes,
    startup,
)
from experiments.engine import config as config_lib
from experiments.engine.config import Config
from experiments.engine.datasets import DataOptions, Splits
from experiments.engine.runtime import RuntimeOptions
from rll_jax import typing
from rll_jax.data import cache, image_dataset, paths
from rll_jax.data.image_dataset import EncodedImageDataset
from rll_jax.training import devices


class CheckedRun(NamedTuple):
    """A run that can begin.

    Attributes:
      config: its options.
      workdir: its folder.
      runner: the devices.
      splits: {"train": ..., "test": ...}, without their bad images.
      sampler: the sampler of the training batches.
      starting_weights: {published name: array} of --pretrained or --init_from, or None.
      skipped_images: a line for each image that was skipped.
    """

    config: Config
    workdir: pathlib.Path
    runner: devices.Runner
    splits: Splits
    sampler: typing.Sampler
    starting_weights: dict[str, np.ndarray] | None
    skipped_images: list[str]


def check_run(config: Config) -> CheckedRun:
    """Checks a run and opens what it needs.

    Raises:
      ValueError: the options, the data or the workdir are at fault.
    """
    startup.take_bfloat16_products(config.network.dtype)  # before anything starts a device
    workdir = pathlib.Path(config.runtime.workdir)
    config = _check_workdir(workdir, config)
    runner = devices.make_runner(config.devices.parallel)
    config.batches.check_devices(runner.num_devices, config.devices.embed_chunk)
    _check_memory(config, runner.num_devices)
    _check_frozen_views(config)
    _check_shared_memory(config)
    # A run that is resumed has its own weights.
    resumed = any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))
    starting_weights = None if resumed else pretrained.read_starting_weights(config)
    splits, skipped_images = _open_in_turn(config)
    image_dataset.check_splits(splits["train"], splits["test"])
    if len(splits["test"]) < jax.process_count():
        raise ValueError(
            f"{len(splits['test'])} test images are fewer than the {jax.process_count()} processes"
        )
    check_same_data(workdir, splits)
    sampler = batches.make_sampler(
        config.batches, splits["train"], config.schedule.seed, config.data.dataset
    )
    # A view may need a package that is not installed.
    config.data.train_view()
    splits = cached_splits(splits, config.data, config.runtime)
    if config.network.frozen_views:
        network_inputs.check_room(config, splits)
    # Other processes look at the workdir until here: no process writes into it earlier.
    multihost_utils.sync_global_devices("checked")
    return CheckedRun(config, workdir, runner, splits, sampler, starting_weights, skipped_images)


def _open_in_turn(config: Config) -> tuple[Splits, list[str]]:
    """Opens the datasets; the first process prepares files, and the others find them."""
    if not processes.is_first():
        multihost_utils.sync_global_devices("data")
    splits, skipped_images = datasets.open_usable(config.data, config.runtime)
    if processes.is_first():
        multihost_utils.sync_global_devices("data")
        for split, data in splits.items():
            classes = len(np.unique(data.labels))
            print(f"{split}: {len(data)} images of {classes} classes", flush=True)
        if skipped_images:
            print(
                f"{len(skipped_images)} images are skipped, such as {skipped_images[0]}",
                flush=True,
            )
    return splits, skipped_images


def _check_memory(config: Config, num_devices: int) -> None:
    size, batch_size = config.loss.memory_size, config.batches.batch_size
    if size and (size < batch_size or size % num_devices):
        raise ValueError(
            f"--memory_size={size}: expected 0, or a multiple of the {num_devices} devices and at "
            f"least the {batch_size} images of a batch"
        )


def _check_frozen_views(config: Config) -> None:
    views, data_dir = config.network.frozen_views, config.runtime.data_dir
    if views and (not data_dir or paths.is_remote(data_dir)):
        raise ValueError(
            f"--frozen_views={views} writes into --data_dir, a local folder, and it is "
            f"{data_dir!r}: use a local copy"
        )


def _check_shared_memory(config: Config) -> None:
    """Raises ValueError where the worker processes have no room to hand over a batch each."""
    workers, shared = config.runtime.worker_processes, pathlib.Path("/dev/shm")
    if not workers or not shared.is_dir():
        return
    pixels = max(
        config.batches.batch_size // jax.process_count() * config.data.image_size**2,
        config.schedule.eval_batch_size * config.data.searched_size**2,
    )
    need = workers * 3 * pixels
    free = shutil.disk_usage(shared).free
    if need > free:
        raise ValueError(
            f"--worker_processes={workers} hand over batches in {shared}: they need at least "
            f"{need / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free; make it larger (docker "
            "run --shm-size), take fewer, or --worker_processes=0"
        )


def _check_workdir(workdir: pathlib.Path, config: Config) -> Config:
    """Returns the options with which the run in the workdir begins or goes on.

    Raises:
      ValueError: the workdir is not local, or neither free nor holding this very run.
    """
    if paths.is_remote(config.runtime.workdir):
        raise ValueError(f"--workdir={config.runtime.workdir}: expected a local folder")
    if config.runtime.profile_steps and not paths.is_utf8(workdir.absolute()):
        raise ValueError(
            f"--profile_steps: JAX needs a --workdir whose name is UTF-8, not {workdir}"
        )
    saved = workdir / "flags.txt"
    if not saved.exists():
        if workdir.exists() and (not workdir.is_dir() or _has_files(workdir)):
            raise ValueError(
                f"--workdir={workdir} is in use and holds no run to resume: choose another folder"
            )
        return config
    config, changed = config_lib.as_begun(config, saved)
    before = config_lib.from_flagfile(saved)
    differing = config_lib.differences(before, config)
    only_steps = len(differing) == 1 and differing[0].startswith("--steps=")
    if only_steps and config.schedule.steps > before.schedule.steps:
        raise ValueError(
            f"--steps={config.schedule.steps}: --workdir={workdir} holds a run of "
            f"{before.schedule.steps} steps, over which its learning rate falls by a cosine. More "
            "steps can be given with --schedule=step alone. To train on from its weights, choose "
            f"another --workdir and --init_from={workdir}"
        )
    if differing:
        raise ValueError(
            f"--workdir={workdir} holds another run ({'; '.join(differing)}): choose another "
            f"--workdir, and --init_from={workdir} to start from its weights; or go on with that "
            f"run by --flagfile={saved}"
        )
    if changed and processes.is_first():
        earlier = " ".join(f"--{name}={options.to_text(value)}" for name, value in changed.items())
        print(f"the run in {workdir} goes on as it began: {earlier}", flush=True)
    return config


def _has_files(folder: pathlib.Path) -> bool:
    return any(not path.name.startswith(".") for path in folder.iterdir())


def data_digests(splits: Splits) -> dict[str, str]:
    """Returns {split: a digest of its images' paths, classes and roles}, for data.json."""
    return {split: data_digest(data) for split, data in splits.items()}


def data_digest(data: EncodedImageDataset) -> str:
    """Returns a digest of the paths, classes and roles of a dataset's images."""
    digest = hashlib.sha256("\n".join(data.paths.tolist()).encode(errors="surrogateescape"))
    roles = (data.in_gallery, data.is_query)
    for column in (data.labels, *roles, data.groups, data.image_ids):
        if column is not None:
            digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()[:16]


def check_same_data(workdir: pathlib.Path, splits: Splits) -> None:
    """Raises ValueError where the run in the workdir had other images.

    Classes that it trained on might be searched now.
    """
    saved = workdir / "data.json"
    if not saved.exists():
        return
    try:
        before = json.loads(saved.read_text())
    except ValueError:
        raise ValueError(
            f"{saved} is damaged: remove it if the images are those that the run began with"
        ) from None
    now = data_digests(splits)
    if differing := [split for split in splits if before.get(split) != now[split]]:
        raise ValueError(
            f"--workdir={workdir} holds a run on other images: its {' and '.join(differing)} "
            "images or their classes have changed; choose another --workdir, or bring them back"
        )


def cached_splits(splits: Splits, data: DataOptions, runtime: RuntimeOptions) -> Splits:
    """Returns the datasets as --cache keeps them, and first prints what the cache takes.

    Raises:
      ValueError: they cannot be cached, or there is not so much memory or room (how much).
    """
    if data.cache == "none":
        return splits
    _check_cache(data, runtime)
    short_side = augmentation.resized_side(max(data.image_size, data.searched_size))
    need = sum(cache.estimated_bytes(part, short_side) for part in splits.values())
    images = sum(map(len, splits.values()))
    where = "in memory" if data.cache == "memory" else "on disk"
    print(f"cache: about {need / 2**20:,.0f} MiB {where} for {images} images", flush=True)
    if data.cache == "disk":
        return {
            split: cache.on_disk(part, short_side, runtime.data_dir, split, data.interpolation)
            for split, part in splits.items()
        }
    if need > (free := cache.free_memory()):
        raise ValueError(
            f"--cache=memory would take {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: "
            "use --cache=disk or none"
        )
    return {
        split: cache.in_memory(part, short_side, data.interpolation)
        for split, part in splits.items()
    }


def _check_cache(data: DataOptions, runtime: RuntimeOptions) -> None:
    if data.augmentation == "border_crop":
        raise ValueError(
            "--cache keeps shrunk images, in which a border is no longer what "
            "--augment=border_crop cuts: leave one of them out"
        )
    if data.cache == "memory" and runtime.worker_processes:
        raise ValueError(
            "--cache=memory is of one process: use --cache=disk with --worker_processes"
        )
    local = runtime.data_dir and not paths.is_remote(runtime.data_dir)
    if data.cache == "disk" and not local:
        raise ValueError(
            "--cache=disk is written into --data_dir, a local folder, and it is "
            f"{runtime.data_dir!r}: use --cache=memory, or a local copy"
        )
