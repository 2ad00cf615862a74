"""Training: one step, its devices, cached features, checkpoints, and embeddings of a dataset.

Each module is imported when its name is first used.
"""

import importlib
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rll_jax.training import cached_features, checkpoint, devices, embedding, steps

__all__ = [
    "cached_features",
    "checkpoint",
    "devices",
    "embedding",
    "steps",
]


def __getattr__(name: str) -> types.ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
