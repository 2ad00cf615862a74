"""What the families of backbones share."""

from typing import Any


def given_ends(maps: dict) -> tuple[list, Any]:
    """Those of the stages up to the last given, None where not given, and that last one."""
    last = max(maps)
    return [maps.get(stage) for stage in range(1, last + 1)], maps[last]
