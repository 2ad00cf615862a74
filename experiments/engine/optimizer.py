"""The optimiser of a run: its options and its learning rate over the steps."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from experiments.engine.network import NetworkOptions
from experiments.engine.options import Section, option
from rll_jax.networks import embedding_net, vit, weights
from rll_jax.training import steps


@dataclasses.dataclass(frozen=True)
class OptimizerOptions(Section):
    """How the parameters move."""

    title: ClassVar[str] = "Optimiser"

    optimizer: str = option(
        "adamw", "The optimiser. sgd has momentum 0.9.", choices=("adamw", "sgd"), main=True
    )
    learning_rate: float = option(2e-3, "The highest learning rate.", low=1e-12, main=True)
    head_lr_multiplier: float = option(
        1.0,
        "The factor of the learning rate of the embedding heads L, M and H, of the layers that "
        "--head_lr_layers names.",
        low=0,
    )
    head_lr_layers: str = option(
        "all",
        "The layers of the heads that --head_lr_multiplier is of: all, or the last one, which "
        "gives the embedding, as in the authors' recipes.",
        choices=("all", "last"),
    )
    head_warmup_steps: int = option(
        0,
        "The number of first steps in which the embedding heads and the loss's proxies train "
        "alone. Running statistics of batch norm move all the same.",
        low=0,
    )
    layer_decay: float = option(
        1.0,
        "The factor of the learning rate from each stage of the backbone to the one before: the "
        "last stage has this factor, the one before its square, and the stem one power more than "
        "the first stage. A vision transformer's blocks are its stages. 1: no decay.",
        low=0.01,
        high=1,
    )
    weight_decay: float = option(
        0.05, "The weight decay: decoupled for adamw, an L2 penalty for sgd.", low=0
    )
    decay_norm_and_bias: bool = option(
        False, "Decay the scales and biases too, not the kernels alone."
    )
    clip_gradient: float = option(
        0.0,
        "The largest norm of the gradient; a larger gradient is scaled down. 0: no limit.",
        low=0,
    )
    ema: float = option(
        0.0,
        "The decay per step of a moving average of the parameters, which is then evaluated in "
        "their place. 0: no average.",
        low=0,
        high=0.999999,
    )
    schedule: str = option(
        "cosine",
        "The learning rate over the steps: a cosine with a warm-up, or falls at --decay_at.",
        choices=("cosine", "step"),
    )
    warmup: float = option(
        0.1,
        "With --schedule=cosine: the share of the steps, 0 to 0.99, in which the learning rate "
        "rises.",
        low=0,
        high=0.99,
    )
    decay_at: tuple[int, ...] = option(
        (),
        "With --schedule=step: the steps at which the learning rate is multiplied by "
        "--decay_factor, such as 5000,10000.",
    )
    decay_factor: float = option(
        0.5, "With --schedule=step: the factor of the learning rate at --decay_at.", low=0
    )

    @property
    def needs_all_steps(self) -> bool:
        """Whether the learning rate of a step depends on the number of steps of the run."""
        return self.schedule == "cosine"


def learning_rate(options: OptimizerOptions, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, from 0."""
    if options.schedule == "step":
        falls = dict.fromkeys(options.decay_at, options.decay_factor)
        return optax.piecewise_constant_schedule(options.learning_rate, falls)
    warmup = round(options.warmup * num_steps)
    return optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, warmup, max(num_steps, warmup + 1)
    )


def make_optimizer(
    options: OptimizerOptions,
    network: NetworkOptions,
    num_steps: int,
    proxy_lr_multiplier: float = 1.0,
) -> optax.GradientTransformation:
    """Returns the optimiser of a network's parameters, and of the loss's proxies."""
    rate = learning_rate(options, num_steps)
    decayed = None if options.decay_norm_and_bias else _matrices
    parts: list[optax.GradientTransformation]
    if options.optimizer == "adamw":
        parts = [optax.adamw(rate, weight_decay=options.weight_decay, mask=decayed)]
    else:
        decay = optax.add_decayed_weights(options.weight_decay, decayed)
        parts = [decay, optax.sgd(rate, momentum=0.9)]
    if options.clip_gradient:
        parts.insert(0, optax.clip_by_global_norm(options.clip_gradient))
    if options.head_lr_multiplier != 1:
        last = options.head_lr_layers == "last"
        names = embedding_net.LAST_LAYERS if last else weights.HEAD_PREFIXES
        heads = _modules(lambda name: name.startswith(names))
        parts.append(optax.masked(optax.scale(options.head_lr_multiplier), heads))
    if proxy_lr_multiplier != 1:
        proxies = _modules(lambda name: name == steps.PROXIES)
        parts.append(optax.masked(optax.scale(proxy_lr_multiplier), proxies))
    if options.layer_decay != 1:
        parts.append(_layer_decay(options.layer_decay, network))
    if warmup := options.head_warmup_steps:
        waits = optax.scale_by_schedule(lambda step: jnp.greater_equal(step, warmup))
        parts.append(optax.masked(waits, _modules(network.is_of_backbone)))
    if network.frozen_stages:
        # Last, as weight decay would move frozen parameters too.
        parts.append(optax.masked(optax.set_to_zero(), _modules(network.is_frozen)))
    if network.lora_rank:
        labels = functools.partial(_beside_lora, network)
        return optax.partition(
            {"trains": optax.chain(*parts), "fixed": optax.set_to_zero()}, labels
        )
    return optax.chain(*parts)


def _layer_decay(factor: float, network: NetworkOptions) -> optax.GradientTransformation:
    """Returns what scales the updates of the backbone's modules by their distance to the heads."""
    backbone = network.backbone_config

    def factor_of(name: str) -> float:
        if not network.is_of_backbone(name):
            return 1.0
        return factor ** (backbone.num_stages + 1 - backbone.stage_of(name))

    def scaled(updates: Any, _: Any = None) -> Any:
        factors = {name: _like(module, factor_of(name)) for name, module in updates.items()}
        return jax.tree.map(jnp.multiply, updates, factors)

    return optax.stateless(scaled)


def _beside_lora(network: NetworkOptions, params: Any) -> Any:
    """Returns "trains" for LoRA's parameters, the heads' and the proxies', and else "fixed"."""

    def label(path: Any, _: Any) -> str:
        top, *inner = (key.key for key in path)
        trains = not network.is_of_backbone(top) or vit.LORA in inner
        return "trains" if trains else "fixed"

    return jax.tree_util.tree_map_with_path(label, params)


_matrices = functools.partial(jax.tree.map, lambda parameter: parameter.ndim > 1)


def _modules(chosen: Callable[[str], bool]) -> Callable[[Any], Any]:
    """Returns a mask of the parameters of the top-level modules that are chosen by name."""

    def mask(params: Any) -> Any:
        return {name: _like(module, chosen(name)) for name, module in params.items()}

    return mask


def _like(tree: Any, value: float) -> Any:
    return jax.tree.map(lambda _: value, tree)
