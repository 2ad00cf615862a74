"""The parts of a training run: its first state, its step and its batches."""

from collections.abc import Iterator
import functools
from typing import Any

import jax
import numpy as np

from experiments.engine import build, losses
from experiments.engine.checks import CheckedRun
from experiments.engine.config import Config
from experiments.engine.network_inputs import Input
from rll_jax.data import pipeline, views
from rll_jax.training import steps


def make_train_step(config: Config, train_labels: np.ndarray) -> functools.partial[Any]:
    """Returns `steps.train_step` with the run's loss, for `devices.Runner.train`."""
    watch = functools.partial(
        steps.watch_distances, alpha=config.loss.alpha, margin=config.loss.margin
    )
    return functools.partial(
        steps.train_step,
        loss=losses.make_loss(config.loss, train_labels),
        ema_decay=config.optimizer.ema,
        embed_chunk=config.devices.embed_chunk,
        watch=watch,
        drop_path_seed=config.schedule.seed if config.network.drop_path else None,
    )


def fresh_state(checked: CheckedRun) -> steps.TrainState:
    """Returns the state before the first step, on all devices."""
    proxies = losses.num_proxies(checked.config.loss, checked.splits["train"].labels)
    return build.make_state(checked.config, checked.runner, checked.starting_weights, proxies)


def train_batches(
    checked: CheckedRun,
    source: Input,
    start: int,
    on_bad: pipeline.OnBad | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's share of the batches after step `start`."""
    config = checked.config
    return pipeline.train_batches(
        source.data,
        checked.sampler,
        source.view,
        views.ClassTransform() if config.data.class_augment else None,
        start=start,
        stop=config.schedule.steps,
        spread=not config.batches.class_on_one_device,
        share=(jax.process_index(), jax.process_count()),
        threads=config.runtime.threads,
        processes=config.runtime.worker_processes,
        on_bad=on_bad,
    )
