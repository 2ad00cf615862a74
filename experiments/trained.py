"""What every command starts from: the network of a config, and a run's checkpoint put back into it."""
import functools
import hashlib
import pathlib
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import config as config_lib
from experiments import sources
from rll_jax import backbones, checkpoint, evaluate, models, parallel, train, weights


def make_model(config) -> models.EmbeddingNet:
    return models.EmbeddingNet(
        backbones.BACKBONES[config.backbone],
        config.embedding_dim,
        config.level_names,
        dtype=jnp.dtype(config.dtype),
        batch_norm=config.batch_norm,
        axis_name=parallel.AXIS,
        remat=config.numbers("remat"),
    )


def make_optimizer(config) -> optax.GradientTransformation:
    decayed = None if config.decay_norm_and_bias else functools.partial(jax.tree.map, lambda p: p.ndim > 1)
    if config.optimizer == "adamw":
        steps = [optax.adamw(_schedule(config), weight_decay=config.weight_decay, mask=decayed)]
    else:
        steps = [optax.add_decayed_weights(config.weight_decay, decayed), optax.sgd(_schedule(config), momentum=0.9)]
    if config.clip_gradient:
        steps.insert(0, optax.clip_by_global_norm(config.clip_gradient))
    if config.head_lr_multiplier != 1:
        steps.append(optax.masked(optax.scale(config.head_lr_multiplier), _heads))
    return optax.chain(*steps)


def _heads(params):
    """Which parameters are of the embedding layers."""
    return {name: jax.tree.map(lambda _: name.startswith(weights.HEADS), module) for name, module in params.items()}


def _schedule(config) -> optax.Schedule:
    if config.schedule == "step":
        at = {step: config.decay_factor for step in config.numbers("decay_at")}
        return optax.piecewise_constant_schedule(config.learning_rate, at)
    warmup = round(config.warmup * config.steps)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(config.steps, warmup + 1))


def make_state(config, runner: parallel.Runner) -> train.TrainState:
    """A fresh state, on all devices."""
    state = train.create_train_state(
        make_model(config), make_optimizer(config), config.image_size, config.seed, with_ema=bool(config.ema)
    )
    return runner.replicate(state)


def start_from(state: train.TrainState, config) -> train.TrainState:
    """The state with the weights of --pretrained.

    Raises:
      ValueError: they cannot be found or read, or are not of this network (what is missing, unexpected or of another shape).
    """
    name, path = config.pretrained, pathlib.Path(config.pretrained)
    try:
        if path.is_dir():
            donor = load(name)
            published = weights.to_published({"params": donor.params, "batch_stats": donor.batch_stats})
        else:
            published = weights.read(path if path.suffix in weights.SUFFIXES else _from_hub(name))
        variables = {"params": jax.device_get(state.params), "batch_stats": jax.device_get(state.batch_stats)}
        variables = weights.from_published(published, variables, heads=config.pretrained_head)
    except ValueError as error:
        raise ValueError(f"--pretrained={name}: {error}")
    place = lambda new, old: jax.tree.map(lambda n, o: jax.device_put(n, o.sharding), new, old)
    params = place(variables["params"], state.params)
    return state.replace(
        params=params,
        batch_stats=place(variables["batch_stats"], state.batch_stats),
        ema=None if state.ema is None else jax.tree.map(jnp.copy, params),
    )


def _from_hub(name: str) -> str:
    """The file of a repository's weights, downloaded once."""
    if name.count("/") != 1:
        raise ValueError(f"expected a file ({', '.join(weights.SUFFIXES)}), a run's workdir or a hub name such as timm/resnet50.tv_in1k")
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError("names of the hub need huggingface_hub (pip install huggingface_hub); a file works without")
    try:
        return huggingface_hub.hf_hub_download(name, "model.safetensors")
    except Exception as error:  # its many kinds: offline, no such repository, no such file
        raise ValueError(f"cannot get model.safetensors of {name} from the hub: {str(error).splitlines()[0]}")


class Trained(NamedTuple):
    """A trained network.

    Attributes:
      config: of the run that trained it.
      step: of the checkpoint.
      source: the data set that it was trained on.
      embed: a set with a length and `image(row)` -> {level: (N, D) float32}.
      identity: a digest of the weights.
      params, batch_stats: the weights; the moving average's where the run keeps one.
    """

    config: config_lib.Config
    step: int
    source: sources.Source
    embed: Callable
    identity: str
    params: Any
    batch_stats: Any


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
        if not steps:
            raise ValueError(f"--workdir={workdir} holds no checkpoint yet: let the run go on to its first")
        step = steps[-1] if step is None else step
        if step not in steps:
            there = ", ".join(map(str, steps))
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
    params = state.params if state.ema is None else state.ema
    return Trained(config, step, source, embed, _digest((params, state.batch_stats)), params, state.batch_stats)


def _digest(tree) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()[:16]
