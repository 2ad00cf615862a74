"""Networks from images to embeddings, and weights under their published names.

Each module is imported when it is first named.
"""

import importlib
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rll_jax.networks import (
        backbones,
        convnext,
        efficientnet,
        embedding_net,
        googlenet,
        resnet,
        vit,
        weights,
    )

__all__ = [
    "backbones",
    "convnext",
    "efficientnet",
    "embedding_net",
    "googlenet",
    "resnet",
    "vit",
    "weights",
]


def __getattr__(name: str) -> types.ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
