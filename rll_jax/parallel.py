"""All that knows of devices: running a step over them, and placing what it needs. Nothing else here does."""
import functools
from typing import Callable, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

AXIS = "batch"


class Runner(NamedTuple):
    """How steps run over all local devices; states are replicated, batches split by rows.

    Attributes:
      num_devices: that share a batch.
      train: train_step(state, batch, axis_name=...) -> (state, batch) -> (state, metrics); the old state is donated.
      embed: embed_step(state, images) -> the same over the devices, rows in order.
      replicate: a tree of arrays -> the same on every device.
      place: a tree of host arrays, rows first -> the same, split by rows over the devices.
    """

    num_devices: int
    train: Callable
    embed: Callable
    replicate: Callable
    place: Callable


def make_runner(parallel: str, devices=None) -> Runner:
    """A `Runner` by "pmap" or "shard_map": the same results, to rounding.

    Raises:
      ValueError: another name.
    """
    devices = jax.local_devices() if devices is None else devices
    # Auto axes: those that jax.make_mesh gives by default refuse what shard_map is handed here
    mesh = Mesh(np.array(devices), (AXIS,))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
    replicate = functools.partial(jax.device_put, device=everywhere)
    if parallel == "pmap":

        def stack(x):
            return x.reshape(len(devices), -1, *x.shape[1:])

        def train(step):
            step = functools.partial(step, axis_name=AXIS)
            return jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=(None, None), devices=devices, donate_argnums=0)

        def embed(step):
            mapped = jax.pmap(step, AXIS, in_axes=(None, 0), devices=devices)
            return lambda state, x: jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), mapped(state, x))

        return Runner(
            len(devices), train, embed, replicate, lambda x: jax.device_put(jax.tree.map(stack, x), split)
        )
    if parallel == "shard_map":
        rows, whole = PartitionSpec(AXIS), PartitionSpec()

        def train(step):
            step = functools.partial(step, axis_name=AXIS)
            mapped = jax.shard_map(step, mesh=mesh, in_specs=(whole, rows), out_specs=(whole, whole))
            return jax.jit(mapped, donate_argnums=0)

        def embed(step):
            return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(whole, rows), out_specs=rows))

        return Runner(len(devices), train, embed, replicate, lambda x: jax.device_put(x, split))
    raise ValueError(f"parallel must be 'pmap' or 'shard_map', got {parallel!r}")
