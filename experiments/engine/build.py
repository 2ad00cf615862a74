"""What every command starts from: the network of a config, and a run's checkpoint put back into it."""

import functools
import hashlib
import logging
import pathlib
from typing import Any, Callable, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.engine import config as config_lib
from experiments.engine import datasets
from rll_jax.networks import embedding_net, weights
from rll_jax.training import checkpoint, devices, embedding
from rll_jax.training import steps as steps_lib


def make_model(config) -> embedding_net.EmbeddingNet:
    return embedding_net.EmbeddingNet(
        config.network,
        config.embedding_dim,
        config.level_names,
        dtype=jnp.dtype(config.dtype),
        batch_norm=config.batch_norm,
        axis_name=devices.AXIS,
        remat=config.numbers("remat"),
        frozen_stages=config.frozen_stages,
    )


def make_optimizer(config) -> optax.GradientTransformation:
    decayed = (
        None
        if config.decay_norm_and_bias
        else functools.partial(jax.tree.map, lambda p: p.ndim > 1)
    )
    if config.optimizer == "adamw":
        steps = [optax.adamw(schedule(config), weight_decay=config.weight_decay, mask=decayed)]
    else:
        steps = [
            optax.add_decayed_weights(config.weight_decay, decayed),
            optax.sgd(schedule(config), momentum=0.9),
        ]
    if config.clip_gradient:
        steps.insert(0, optax.clip_by_global_norm(config.clip_gradient))
    if config.head_lr_multiplier != 1:
        steps.append(
            optax.masked(
                optax.scale(config.head_lr_multiplier),
                _where(lambda name: name.startswith(weights.HEAD_PREFIXES)),
            )
        )
    if config.proxy_lr_multiplier != 1:
        steps.append(
            optax.masked(
                optax.scale(config.proxy_lr_multiplier),
                _where(lambda name: name == steps_lib.PROXIES),
            )
        )
    if config.frozen_stages:
        steps.append(
            optax.masked(optax.set_to_zero(), _where(functools.partial(is_frozen, config)))
        )  # last: decay moves them too
    return optax.chain(*steps)


def is_frozen(config, module: str) -> bool:
    """Whether a module of the network, by its name, is one that --frozen_stages keeps as it is."""
    return (
        not module.startswith((*weights.HEAD_PREFIXES, steps_lib.PROXIES))
        and config.network.stage_of(module) <= config.frozen_stages
    )


def _where(chosen: Callable[[str], bool]) -> Callable:
    """A mask of the parameters of the modules chosen by name."""
    return lambda params: {
        name: jax.tree.map(lambda _: chosen(name), module) for name, module in params.items()
    }


def schedule(config) -> optax.Schedule:
    if config.schedule == "step":
        at = {step: config.decay_factor for step in config.numbers("decay_at")}
        return optax.piecewise_constant_schedule(config.learning_rate, at)
    warmup = round(config.warmup * config.steps)
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(config.steps, warmup + 1)
    )


def make_state(
    config, runner: devices.Runner, published: dict | None = None, proxies: int = 0
) -> steps_lib.TrainState:
    """A fresh state, on all devices, with the weights of --pretrained where `read_pretrained` gave them."""
    state = _create(config, proxies)
    if published is not None:
        params, batch_stats = jax.device_get((dict(state.params), state.batch_stats))
        learnt = {name: params.pop(name) for name in (steps_lib.PROXIES,) if name in params}
        variables = {"params": params, "batch_stats": batch_stats}
        new = weights.from_named_arrays(
            published,
            variables,
            config.network,
            heads=config.pretrained_head or bool(config.init_from),
        )
        params = {**new["params"], **learnt}
        # a copy for the average: steps donate both
        ema = None if state.ema is None else jax.tree.map(np.copy, params)
        state = state.replace(params=params, batch_stats=new["batch_stats"], ema=ema)
    return runner.replicate(state)


def _create(config, proxies: int = 0) -> steps_lib.TrainState:
    return steps_lib.create_train_state(
        make_model(config),
        make_optimizer(config),
        config.image_size,
        config.seed,
        with_ema=bool(config.ema),
        proxies=proxies,
        memory_size=config.memory_size,
    )


def read_pretrained(config) -> dict[str, np.ndarray]:
    """The weights of --pretrained or --init_from by their published names.

    Raises:
      ValueError: they cannot be found or read, or are not of this network (what is missing, unexpected or of another shape).
    """
    name = config.pretrained or config.init_from
    path = pathlib.Path(name)
    try:
        if path.is_dir() or config.init_from:
            trained = load(name)
            published = weights.to_named_arrays(trained.variables, trained.config.network)
        else:
            published = weights.read(path if path.suffix in weights.SUFFIXES else _from_hub(name))
        shapes = jax.eval_shape(functools.partial(_create, config))
        blank = jax.tree.map(
            lambda x: np.zeros(x.shape, x.dtype),
            {"params": shapes.params, "batch_stats": shapes.batch_stats},
        )
        weights.from_named_arrays(
            published,
            blank,
            config.network,
            heads=config.pretrained_head or bool(config.init_from),
        )
    except ValueError as error:
        raise ValueError(f"--{'pretrained' if config.pretrained else 'init_from'}={name}: {error}")
    return published


def _from_hub(name: str) -> str:
    """The file of a repository's weights, downloaded once."""
    if name.count("/") != 1:
        raise ValueError(
            f"expected a file ({', '.join(weights.SUFFIXES)}), a run's workdir or a hub name such as timm/resnet50.tv_in1k"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            "no such folder, and names of the hub need huggingface_hub (pip install huggingface_hub); a file works without"
        )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each of five attempts
    try:
        return huggingface_hub.hf_hub_download(name, "model.safetensors")
    except Exception as error:  # its many kinds: offline, no such repository, no such file
        reason = " ".join(str(error).split())[:300] or repr(error)
        raise ValueError(
            f"no such folder, and model.safetensors of {name} cannot be had from the hub: {reason}; a file works without"
        )


class Trained(NamedTuple):
    """A trained network.

    Attributes:
      config: of the run that trained it.
      step: of the checkpoint.
      embed: a set with a length and `image(row)` -> {level: (N, D) float32}; see `rll_jax.training.embedding.embed_images`.
      variables: {"params": ..., "batch_stats": ...}; the moving average's where the run keeps one.
    """

    config: config_lib.Config
    step: int
    embed: Callable
    variables: dict[str, Any]


def define_flags() -> None:
    """Those of every command that takes a trained network."""
    flags.DEFINE_string("workdir", None, "a run's folder", required=True)
    flags.DEFINE_integer("step", None, "of which checkpoint; the last by default")
    flags.DEFINE_bool("best", False, "of the best checkpoint, by the run's --best")


def load(workdir: str, step: int | None = None, best: bool = False) -> Trained:
    """The network of the last checkpoint of a run, or of that of `step`, or of the best.

    Raises:
      ValueError: no run there, no such checkpoint (with those that are there), or one that cannot be read.
    """
    workdir = pathlib.Path(workdir)
    if not (workdir / "flags.txt").is_file():
        raise ValueError(
            f"--workdir={workdir} holds no run: expected a folder that an experiment wrote, with flags.txt"
        )
    config = config_lib.from_flagfile(workdir / "flags.txt")
    runner = devices.make_runner(config.parallel)
    shapes = jax.eval_shape(functools.partial(_create, config))
    weights_name = "params" if shapes.ema is None else "ema"
    wanted = {weights_name: shapes.params, "batch_stats": shapes.batch_stats}
    directory = workdir / ("best" if best else "checkpoints")
    if not directory.is_dir():
        raise ValueError(
            f"--workdir={workdir} holds no checkpoint yet: let the run go on to its first"
        )
    with checkpoint.Checkpoints(directory, read_only=True) as saved:
        steps = saved.all_steps()
        if not steps or step not in (None, *steps):
            there = (
                f"of step {step}: there are {', '.join(map(str, steps))}"
                if steps
                else "yet: let the run go on to its first"
            )
            raise ValueError(f"--workdir={workdir} holds no checkpoint {there}")
        step = steps[-1] if step is None else step
        try:
            restored = runner.replicate(saved.restore_subset(step, wanted))
        except (
            Exception
        ) as error:  # orbax, tensorstore and json have their own for each kind of damage
            raise ValueError(
                f"--workdir={workdir}: the checkpoint of step {step} cannot be read: {str(error).splitlines()[0]}"
            )
    state = steps_lib.TrainState(
        step=step,
        apply_fn=make_model(config).apply,
        params=restored[weights_name],
        batch_stats=restored["batch_stats"],
        tx=None,
        opt_state=None,
        skipped=None,
    )
    embed = functools.partial(
        embedding.embed_images,
        runner.to_local(state),
        view=datasets.views(config).test(config.image_size),
        embed=runner.embed(steps_lib.embed_step),
        runner=runner,
        batch_size=config.eval_batch_size,
        threads=config.threads,
    )
    return Trained(config, step, embed, {"params": state.params, "batch_stats": state.batch_stats})


def identity(variables) -> str:
    """A digest of weights."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(variables)):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()[:16]
