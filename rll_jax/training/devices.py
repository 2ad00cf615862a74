"""All that knows of devices: running a step over them, and placing what it needs. Nothing else here does."""

import functools
from typing import Callable, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

AXIS = "batch"


class Runner(NamedTuple):
    """How steps run over the devices of all processes; states are replicated, batches split by rows.

    Attributes:
      num_devices: that share a batch, of all processes.
      train: train_step(state, batch, axis_name=...) -> (state, batch) -> (state, metrics); the old state is donated.
      embed: embed_step(state, images) -> the same over this process's devices, rows in order.
      replicate: a tree of arrays, the same in every process -> the same on every device.
      shard: a tree of host arrays, rows first, this process's share -> the same, split by rows over all devices.
      shard_local: the same over this process's devices alone, for `embed`.
      to_local: a replicated tree as `embed` takes it.
      to_global: a replicated tree as arrays over all processes, as checkpoints are written and read; and `replicate` takes them back.
    """

    num_devices: int
    train: Callable
    embed: Callable
    replicate: Callable
    shard: Callable
    shard_local: Callable
    to_local: Callable
    to_global: Callable


def make_runner(parallel: str, devices=None) -> Runner:
    """A `Runner` by "pmap" or "shard_map": the same results, to rounding.

    Args:
      devices: those of all processes by default.

    Raises:
      ValueError: another name.
    """
    if parallel not in ("pmap", "shard_map"):
        raise ValueError(f"parallel must be 'pmap' or 'shard_map', got {parallel!r}")
    given, devices = devices, jax.devices() if devices is None else devices
    own = [device for device in devices if device.process_index == jax.process_index()]
    # Auto axes: those that jax.make_mesh gives by default refuse what shard_map is handed here
    mesh, own_mesh = Mesh(np.array(devices), (AXIS,)), Mesh(np.array(own), (AXIS,))
    rows, all_of_it = PartitionSpec(AXIS), PartitionSpec()
    everywhere, everywhere_here = NamedSharding(mesh, all_of_it), NamedSharding(own_mesh, all_of_it)
    alone = len(own) == len(devices)

    def embed(step):
        return jax.jit(
            jax.shard_map(step, mesh=own_mesh, in_specs=(all_of_it, rows), out_specs=rows)
        )

    def to_global(tree):
        if alone:
            return tree
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(everywhere, np.asarray(_local(x))),
            tree,
        )

    def to_local(tree):
        return tree if alone else jax.device_put(jax.tree.map(_local, tree), everywhere_here)

    shard_local = functools.partial(jax.device_put, device=NamedSharding(own_mesh, rows))
    if parallel == "pmap":

        def train(step):
            step = functools.partial(step, axis_name=AXIS)
            return jax.pmap(
                step,
                AXIS,
                in_axes=(None, 0),
                out_axes=(None, None),
                devices=given,
                donate_argnums=0,
            )

        def shard(tree):  # what pmap takes and gives is of this process
            return jax.device_put(
                jax.tree.map(lambda x: x.reshape(len(own), -1, *x.shape[1:]), tree),
                NamedSharding(own_mesh, rows),
            )

        def replicate(tree):
            return jax.device_put(tree if alone else jax.tree.map(_local, tree), everywhere_here)

        return Runner(
            len(devices), train, embed, replicate, shard, shard_local, to_local, to_global
        )

    def train(step):
        step = functools.partial(step, axis_name=AXIS)
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(all_of_it, rows), out_specs=(all_of_it, all_of_it)
        )
        return jax.jit(mapped, donate_argnums=0)

    def shard(tree):
        if alone:
            return shard_local(tree)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(NamedSharding(mesh, rows), x), tree
        )

    def replicate(tree):
        return jax.device_put(tree, everywhere) if alone else to_global(tree)

    return Runner(len(devices), train, embed, replicate, shard, shard_local, to_local, to_global)


def _local(x):
    """This process's copy of a replicated array."""
    return x.addressable_data(0) if isinstance(x, jax.Array) else x
