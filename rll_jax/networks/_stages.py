"""What the families of backbones share."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

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
