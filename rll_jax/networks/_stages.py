"""What the families of backbones share."""

from collections.abc import Callable, Mapping, Sequence
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Makes a module, as `flax.linen.Conv` without a bias or a batch norm does.
ModuleMaker = Callable[..., Any]


def cached_ends(maps: Mapping[int, jax.Array]) -> tuple[list[jax.Array | None], jax.Array]:
    """Returns the ends of the first stages, up to the last that is cached, and this last end.

    Args:
      maps: the cached feature maps by stage number, at least one.

    Returns:
      A list of the ends from stage 1 on, None where a stage is not cached, and the map from which
      the network goes on.
    """
    last = max(maps)
    return [maps.get(stage) for stage in range(1, last + 1)], maps[last]


def renamed(
    arrays: Mapping[str, np.ndarray],
    patterns: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]],
) -> dict[str, np.ndarray]:
    """Returns arrays whose names have parts replaced.

    Args:
      arrays: {name: array}.
      patterns: (regular expression, what replaces it as by `re.sub`), in their order.
    """
    named = dict(arrays)
    for pattern, new in patterns:
        named = {re.sub(pattern, new, name): array for name, array in named.items()}
    return named


def as_varying(*arrays: jax.Array) -> list[jax.Array]:
    """Makes all arrays differ between devices along all axes of shard_map where one of them does.

    A gradient with a rule of its own must vary as its argument does. The gradient of an array that
    is the same on all devices is then summed over them outside of the rule. Nothing is computed:
    the zeros that are added here are gone in the compiled program.
    """
    zero = sum(jnp.zeros_like(array.ravel()[:1].sum()) for array in arrays)
    return [array + jnp.asarray(zero, array.dtype) for array in arrays]
