"""The train state of a run: fresh, or with the weights that it starts from."""

import hashlib
from typing import Any

import jax
import numpy as np

from experiments.engine import network, optimizer
from experiments.engine.config import Config
from rll_jax.networks import weights
from rll_jax.training import devices, steps


def create_state(
    config: Config, proxies: int = 0, compiler_options: dict[str, Any] | None = None
) -> steps.TrainState:
    """Returns a fresh state.

    Args:
      config: the run's options.
      proxies: the number of proxies that the loss learns.
      compiler_options: as of `steps.create_train_state`.
    """
    multiplier = config.loss.proxy_lr_multiplier
    return steps.create_train_state(
        network.make_model(config.network),
        optimizer.make_optimizer(
            config.optimizer, config.network, config.schedule.steps, multiplier
        ),
        config.data.image_size,
        config.schedule.seed,
        with_ema=bool(config.optimizer.ema),
        proxies=proxies,
        memory_size=config.loss.memory_size,
        compiler_options=compiler_options,
    )


def make_state(
    config: Config,
    runner: devices.Runner,
    starting_weights: dict[str, np.ndarray] | None = None,
    proxies: int = 0,
) -> steps.TrainState:
    """Returns a fresh state on all devices.

    Args:
      config: the run's options.
      runner: the devices.
      starting_weights: {published name: array}, as `pretrained.read_starting_weights` reads them,
        or None for random weights.
      proxies: the number of proxies that the loss learns.
    """
    # At full optimisation, the program that draws the weights of a ResNet-50 compiles for 25 s on a
    # CPU, at this one for 5, to the same values.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    state = create_state(config, proxies, options)
    if starting_weights is not None:
        state = _with_weights(state, config.network, starting_weights)
    return runner.replicate(state)


def _with_weights(
    state: steps.TrainState, options: network.NetworkOptions, arrays: dict[str, np.ndarray]
) -> steps.TrainState:
    params, batch_stats = jax.device_get((dict(state.params), state.batch_stats))
    learnt = {steps.PROXIES: params.pop(steps.PROXIES)} if steps.PROXIES in params else {}
    variables = {"params": params, "batch_stats": batch_stats}
    new = weights.from_named_arrays(
        arrays, variables, options.backbone_config, heads=options.loads_heads
    )
    params = {**new["params"], **learnt}
    # The average is a copy, as steps donate both.
    ema = None if state.ema is None else jax.tree.map(np.copy, params)
    return state.replace(params=params, batch_stats=new["batch_stats"], ema=ema)


def weights_digest(variables: Any) -> str:
    """Returns a digest of a tree of weights: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(variables)):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()[:16]
