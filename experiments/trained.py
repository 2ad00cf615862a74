"""What every command starts from: the network of a config, and a run's checkpoint put back into it."""
import functools
import hashlib
import pathlib
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import config as config_lib
from experiments import sources
from rll_jax import checkpoint, evaluate, models, parallel, train


def make_model(config) -> models.EmbeddingNet:
    return models.EmbeddingNet(
        models.RESNETS[config.backbone],
        config.embedding_dim,
        config.level_names,
        dtype=jnp.dtype(config.dtype),
        batch_norm=config.batch_norm,
        axis_name=parallel.AXIS,
    )


def make_optimizer(config) -> optax.GradientTransformation:
    if config.optimizer == "adamw":
        matrices = functools.partial(jax.tree.map, lambda p: p.ndim > 1)  # neither batch norm nor bias decays
        return optax.adamw(_schedule(config), weight_decay=config.weight_decay, mask=matrices)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(_schedule(config), momentum=0.9))


def _schedule(config) -> optax.Schedule:
    if config.schedule == "step":
        at = {int(step): config.decay_factor for step in config.decay_at.split(",") if step}
        return optax.piecewise_constant_schedule(config.learning_rate, at)
    warmup = round(config.warmup * config.steps)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(config.steps, warmup + 1))


def make_state(config, runner: parallel.Runner) -> train.TrainState:
    state = train.create_train_state(make_model(config), make_optimizer(config), config.image_size, config.seed)
    return runner.replicate(state)


class Trained(NamedTuple):
    """A trained network.

    Attributes:
      config: of the run that trained it.
      step: of the checkpoint.
      source: the data set that it was trained on.
      embed: a set with a length and `image(row)` -> {level: (N, D) float32}.
      identity: a digest of the weights.
    """

    config: config_lib.Config
    step: int
    source: sources.Source
    embed: Callable
    identity: str


def load(workdir: str, step: int | None = None) -> Trained:
    """The network of the last checkpoint of a run, or of that of `step`.

    Raises:
      ValueError: no run there, or no such checkpoint (with those that are there).
    """
    workdir = pathlib.Path(workdir)
    if not (workdir / "flags.txt").is_file():
        raise ValueError(f"--workdir={workdir} holds no run: expected a folder that an experiment wrote, with flags.txt")
    config = config_lib.from_flagfile(workdir / "flags.txt")
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"--workdir={workdir} holds no checkpoint yet: let the run go on to its first")
    with checkpoint.Checkpoints(workdir / "checkpoints", read_only=True) as saved:
        steps = saved.all_steps()
        step = max(steps, default=None) if step is None else step
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise ValueError(f"--workdir={workdir} holds no checkpoint of step {step}: there are {there}")
        runner = parallel.make_runner(config.parallel)
        state = saved.restore(step, make_state(config, runner))
    source = sources.SOURCES[config.dataset]
    embed = functools.partial(
        evaluate.embed_images,
        state,
        view=source.test_view(config.image_size),
        embed=runner.embed(train.embed_step),
        runner=runner,
        batch_size=config.eval_batch_size,
        threads=config.threads,
    )
    return Trained(config, step, source, embed, _digest((state.params, state.batch_stats)))


def _digest(tree) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()[:16]
