"""Losses of batches that lie on a mesh of devices, in plain `jax.jit`.

JAX's types of arrays say on which mesh an array lies. Private to `rll_jax.loss`. Imports jax and
numpy alone.
"""

# jax's stubs leave some parameters of shard_map, auto_axes and reshard without a type.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable
import functools
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

Options = ParamSpec("Options")
Tree = TypeVar("Tree")


def mesh_of(x: jax.Array | np.ndarray) -> Any:
    """Returns the abstract mesh of several devices on which an array lies, or None.

    None within `shard_map` and `pmap`, where an array is the part of one device.
    """
    mesh = cast("Any", jax.typeof(x)).sharding.mesh
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


def pad_rows(x: jax.Array | np.ndarray, mesh: Any) -> jax.Array:
    """Returns the rows, with zeros behind them so that every device of a mesh has as many."""
    x = jnp.asarray(x)
    missing = -x.shape[0] % mesh.size
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x


def over_rows(function: Callable[..., Tree], mesh: Any, rows: Any, replicated: Any) -> Tree:
    """Returns what a function of each device's rows gives for all of them.

    Args:
      function: (rows, replicated) -> tree of arrays with a row for each row of the first leaf.
        `lax` collectives over `mesh.axis_names` reach the rows of the other devices.
      mesh: from `mesh_of`.
      rows: a tree of arrays whose rows are divided over all devices of the mesh.
      replicated: a tree of arrays that every device sees in whole.
    """
    explicit = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )
    divided, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    if explicit:

        def reshard(tree: Any, spec: PartitionSpec) -> Any:
            return jax.sharding.reshard(tree, NamedSharding(mesh, spec))

        rows, replicated = reshard(rows, PartitionSpec(explicit)), reshard(replicated, whole)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(divided, whole), out_specs=divided)
    return cast("Tree", mapped(rows, replicated))


def on_explicit_meshes(loss: Callable[Options, jax.Array]) -> Callable[Options, jax.Array]:
    """Makes a loss of plain jax.numpy accept embeddings on a mesh with explicit axes.

    Within, the compiler divides the work, as it does on a mesh with automatic axes.
    """

    @functools.wraps(loss)
    def on_any_mesh(*args: Options.args, **kwargs: Options.kwargs) -> jax.Array:
        mesh = mesh_of(cast("Any", args[0])) if args and hasattr(args[0], "dtype") else None
        if mesh is None or AxisType.Explicit not in mesh.axis_types:
            return loss(*args, **kwargs)
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda x: x is None)
        arrays = [isinstance(leaf, jax.Array) for leaf in leaves]

        def call(*given: jax.Array) -> jax.Array:
            given_arrays = iter(given)
            filled = [
                next(given_arrays) if is_array else leaf
                for leaf, is_array in zip(leaves, arrays, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(tree, filled)
            return loss(*args, **kwargs)

        automatic = jax.sharding.auto_axes(call, out_sharding=NamedSharding(mesh, PartitionSpec()))
        given = [leaf for leaf, is_array in zip(leaves, arrays, strict=True) if is_array]
        return cast("jax.Array", automatic(*given))

    return on_any_mesh
