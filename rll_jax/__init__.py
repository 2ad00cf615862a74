"""Ranked List Loss (Wang et al., CVPR 2019; TPAMI 2021) in JAX.

    loss      the loss in every published variant, fourteen baselines, a cross-batch memory
    metrics   Recall@K, MAP@R, R-precision, MRR, exactly; NMI, F1 and AMI of K-means
    networks  ResNets, ViTs and others with embedding heads; weights under their published names
    data      datasets of labelled images, augmentation, samplers, and the pipeline to batches
    training  the train step, the devices it runs on, checkpoints, and the embeddings of a dataset
    typing    what a loss, a backbone, a dataset, a view and a sampler are to each other

The loss needs jax and numpy alone. A room is imported when it is first named: `import rll_jax`
alone imports nothing else.
"""

import importlib
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rll_jax import data, loss, metrics, networks, training, typing
    from rll_jax.loss import baselines as _baselines
    from rll_jax.loss import memory as memory

    losses_baseline = _baselines

__version__ = "0.1.0"
__all__ = ["data", "loss", "metrics", "networks", "training", "typing"]

_EARLIER_NAMES = {"losses_baseline": "rll_jax.loss.baselines", "memory": "rll_jax.loss.memory"}


def __getattr__(name: str) -> types.ModuleType:
    if name in __all__:
        return importlib.import_module(f"rll_jax.{name}")
    if name in _EARLIER_NAMES:
        return importlib.import_module(_EARLIER_NAMES[name])
    raise AttributeError(f"module 'rll_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
