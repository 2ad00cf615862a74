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
Rows = TypeVar("Rows")
Whole = TypeVar("Whole")


def mesh_of(x: jax.Array | np.ndarray) -> Any:
    """Returns the abstract mesh on which an array lies, of several devices or explicit, or None.

    None within `shard_map` and `pmap`, where an array is the part of one device. An explicit axis
    has rules of its own even where it is one device long.
    """
    mesh: Any = jax.typeof(x).sharding.mesh
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return None
    return mesh if mesh.size > 1 or AxisType.Explicit in mesh.axis_types else None


def on_own_device(x: jax.Array) -> jax.Array:
    """Returns an array of `shard_map` in whole, if explicit axes beside its own ones divide it."""
    sharding: Any = jax.typeof(x).sharding
    is_divided = any(part is not None for part in sharding.spec)
    if not is_divided or not has_explicit_axes_beside(x):
        return x
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    return cast("jax.Array", jax.sharding.reshard(x, whole))


def has_explicit_axes_beside(x: jax.Array) -> bool:
    """Returns whether an array lies within `shard_map` over some axes of an explicit mesh."""
    kinds: Any = jax.typeof(x).sharding.mesh.axis_types
    return {AxisType.Manual, AxisType.Explicit} <= set(kinds)


def pad_rows(x: jax.Array | np.ndarray, mesh: Any) -> jax.Array:
    """Returns the rows, with zeros behind them so that every device of a mesh has as many."""
    x = jnp.asarray(x)
    missing = -x.shape[0] % mesh.size
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x


def first_rows(x: jax.Array, count: int) -> jax.Array:
    """Returns the first `count` rows, without those that `pad_rows` added."""
    return x if x.shape[0] == count else cast("jax.Array", _cut_rows(x, count))


@functools.partial(jax.jit, static_argnums=1)
def _cut_rows(x: jax.Array, count: int) -> jax.Array:
    mesh = mesh_of(x)
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        # Explicit axes divide rows evenly or not at all.
        x = jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))
    return x[:count]


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
    return mapped(rows, replicated)


def map_rows(function: Callable[[Rows, Whole], Tree], rows: Rows, whole: Whole) -> Tree:
    """Returns `function` of each row, in the memory of one: the gradient computes it again.

    Within `on_meshes` each device takes its own rows, one at a time.

    Args:
      function: from one row of each array, and `whole`, to a tree of arrays.
      rows: a tree of arrays of as many rows.
      whole: a tree of arrays, the same for each row. What is differentiated must be in it: a mesh
        with explicit axes refuses what a function holds.
    """

    def one_by_one(rows: Rows, whole: Whole) -> Tree:
        def of_row(row: Rows) -> Tree:
            return function(row, whole)

        return cast("Tree", jax.lax.map(cast("Any", jax.checkpoint(of_row)), rows))

    first = cast("list[jax.Array]", jax.tree.leaves(rows))[0]
    mesh = mesh_of(first)
    if mesh is None or AxisType.Explicit in mesh.axis_types:
        return one_by_one(rows, whole)

    def pad(x: jax.Array) -> jax.Array:
        return pad_rows(x, mesh)

    def unpad(x: jax.Array) -> jax.Array:
        return x[: first.shape[0]]

    return jax.tree.map(unpad, over_rows(one_by_one, mesh, jax.tree.map(pad, rows), whole))


def on_meshes(loss: Callable[Options, jax.Array]) -> Callable[Options, jax.Array]:
    """Makes a loss of plain jax.numpy divide its pairs where its embeddings lie on a mesh.

    The rows are divided over all axes, so that the compiler divides the pairs. The loss may not
    gather: explicit axes are automatic within.
    """

    @functools.wraps(loss)
    def on_any_mesh(*args: Options.args, **kwargs: Options.kwargs) -> jax.Array:
        if not args and "embeddings" in kwargs:
            embeddings = kwargs.pop("embeddings")
            return cast("Any", on_any_mesh)(embeddings, **kwargs)
        mesh = mesh_of(cast("Any", args[0])) if args and hasattr(args[0], "dtype") else None
        if mesh is None:
            return loss(*args, **kwargs)
        leaves, tree = cast("tuple[list[Any], Any]", jax.tree.flatten((args, kwargs)))
        arrays = {k: leaf for k, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

        def call(arrays: dict[int, jax.Array]) -> jax.Array:
            if arrays[0].shape[0] % mesh.size == 0:
                rows = NamedSharding(mesh.update(axis_types=automatic), axes)
                arrays = {**arrays, 0: jax.lax.with_sharding_constraint(arrays[0], rows)}
            filled = [arrays.get(k, leaf) for k, leaf in enumerate(leaves)]
            args, kwargs = jax.tree.unflatten(tree, filled)
            return cast("Any", loss)(*args, **kwargs)

        axes, automatic = PartitionSpec(mesh.axis_names), (AxisType.Auto,) * len(mesh.axis_names)
        if AxisType.Explicit not in mesh.axis_types:
            return call(arrays)
        whole = NamedSharding(mesh, PartitionSpec())
        return cast("Any", jax.sharding.auto_axes(call, out_sharding=whole))(arrays)

    return on_any_mesh
