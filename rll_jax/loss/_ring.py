"""A gallery that lies in shards on the devices of an axis: each shard visits every device in turn.

Private to `rll_jax.loss`. Imports jax and numpy alone.
"""

# jax's stubs leave some parameters of ppermute without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar, cast

import jax
from jax import lax
import jax.numpy as jnp

from rll_jax.loss._pairs import Arrays, make_columns

Result = TypeVar("Result")
Tree = TypeVar("Tree")


class _Shard(NamedTuple):
    """What travels of one device's rows of the gallery. The rest is computed where it arrives."""

    gallery: jax.Array  # (m, D)
    label: jax.Array  # (1, m)
    number: jax.Array  # (1, m)
    valid: jax.Array | None  # (1, m)


def over_shards(
    axis_name: Hashable,
    arrays: Arrays,
    visit: Callable[[Arrays, Result], tuple[Result, jax.Array | None]],
    result: Result,
    on_gallery: jax.Array | None,
) -> tuple[Result, jax.Array | None]:
    """Lets each shard of the gallery visit each device, its own first, and returns home.

    A step computes with one shard while it is sent on.

    Args:
      axis_name: of the devices.
      arrays: this device's queries and its shard.
      visit: from the arrays with the visiting shard, and the result so far, to the next result and
        the derivative by that shard, or None.
      result: what the first visit takes.
      on_gallery: zeros of the shard's shape, to which its derivatives are added as it travels; None
        where the gallery is a constant, so that nothing comes back.

    Returns:
      The last result, and the sum of the derivatives by this device's shard.
    """
    devices = lax.axis_size(axis_name)

    def send(tree: Tree) -> Tree:
        to_next = [(k, (k + 1) % devices) for k in range(devices)]

        def send_array(x: jax.Array) -> jax.Array:
            return cast("jax.Array", lax.ppermute(x, axis_name, to_next))

        return jax.tree.map(send_array, tree)

    def step(
        state: tuple[_Shard, jax.Array | None, Result], _: None
    ) -> tuple[tuple[_Shard, jax.Array | None, Result], None]:
        shard, on_shard, result = state
        sent = send(shard)
        visited = arrays._replace(
            gallery=shard.gallery, columns=make_columns(*shard, arrays.origin)
        )
        result, gradient = visit(visited, result)
        if on_shard is not None and gradient is not None:
            on_shard = send(on_shard + gradient)
        return (sent, on_shard, result), None

    start = (_own_shard(arrays), on_gallery, result)
    (_, on_gallery, result), _ = lax.scan(step, start, length=devices)
    return result, on_gallery


def _own_shard(arrays: Arrays) -> _Shard:
    """Returns this device's shard.

    Under shard_map's check_vma all of it varies over the devices, as what arrives does.
    """
    columns = arrays.columns
    zero = jnp.zeros_like(columns.number[:, :1])
    return _Shard(
        arrays.gallery,
        columns.label + zero.astype(columns.label.dtype),
        columns.number,
        None if columns.valid is None else columns.valid & (zero == 0),
    )
