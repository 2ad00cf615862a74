"""Devices: how a step runs over them, how arrays are placed on them, and how rows are gathered."""

import abc
from collections.abc import Callable, Sequence
import functools
from typing import Any, TypeAlias

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
import numpy as np

AXIS = "batch"

_Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm] jax assigns this name

_ROWS = PartitionSpec(AXIS)  # the first axis is split over the devices
_REPLICATED = PartitionSpec()  # every device has the whole array


class Runner(abc.ABC):
    """How steps run over the devices of all processes. `make_runner` makes one.

    The state is replicated: every device has the whole of it. A batch is split by rows: every
    device has an equal share.

    Attributes:
      num_devices: the number of devices that share a batch, counted over all processes.
    """

    def __init__(self, devices: Sequence[_Device]):
        own = [device for device in devices if device.process_index == jax.process_index()]
        self.num_devices = len(devices)
        self._num_own = len(own)
        self._one_process = len(own) == len(devices)
        # Not jax.make_mesh: shard_map refuses these arguments on the explicit axes it makes.
        self._mesh = Mesh(np.array(devices), (AXIS,))
        self._own_mesh = Mesh(np.array(own), (AXIS,))
        self._all_rows = NamedSharding(self._mesh, _ROWS)
        self._all_replicated = NamedSharding(self._mesh, _REPLICATED)
        self._own_rows = NamedSharding(self._own_mesh, _ROWS)
        self._own_replicated = NamedSharding(self._own_mesh, _REPLICATED)

    @abc.abstractmethod
    def train(self, step: Callable) -> Wrapped:
        """Turns a step on one device's rows into a compiled step over all devices.

        Args:
          step: (state, batch, *, axis_name) -> (state, metrics), such as `steps.train_step` with
            its options bound.

        Returns:
          (state, batch) -> (state, metrics). The state comes from `replicate` and its arrays are
          donated: the old state cannot be used afterwards. The batch comes from `shard`.
        """

    @abc.abstractmethod
    def replicate(self, tree: Any) -> Any:
        """Copies a tree of arrays, equal in every process, to every device."""

    @abc.abstractmethod
    def shard(self, tree: Any) -> Any:
        """Splits a tree of host arrays by rows over all devices, for `train`.

        Args:
          tree: this process's rows of the batch, a multiple of the number of its devices.
        """

    def embed(self, step: Callable) -> Wrapped:
        """Turns (state, images) -> tree of rows into the same over this process's devices.

        Args:
          step: such as `steps.embed_step`.

        Returns:
          The compiled function, whose rows are in the order of the images. The state comes from
          `to_local` and the images come from `shard_local`.
        """
        mapped = jax.shard_map(
            step, mesh=self._own_mesh, in_specs=(_REPLICATED, _ROWS), out_specs=_ROWS
        )
        return jax.jit(mapped)

    def shard_local(self, tree: Any) -> Any:
        """Splits a tree of host arrays by rows over this process's devices."""
        return jax.device_put(tree, self._own_rows)

    def to_local(self, tree: Any) -> Any:
        """Converts a replicated tree to arrays on this process's devices, for `embed`."""
        if self._one_process:
            return tree
        return jax.device_put(jax.tree.map(_local_copy, tree), self._own_replicated)

    def to_global(self, tree: Any) -> Any:
        """Converts a replicated tree to arrays over the devices of all processes.

        Checkpoints are written from and restored to such arrays. `replicate` takes them too.
        """
        if self._one_process:
            return tree
        return jax.tree.map(self._globally_replicated, tree)

    def _globally_replicated(self, x: jax.Array | np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(
            self._all_replicated, np.asarray(_local_copy(x))
        )


class _PmapRunner(Runner):
    """Runs steps by `jax.pmap`, which takes and returns arrays of this process alone."""

    def __init__(self, devices: Sequence[_Device] | None):
        super().__init__(jax.devices() if devices is None else devices)
        self._pmap_devices = devices

    def train(self, step: Callable) -> Wrapped:
        return jax.pmap(
            functools.partial(step, axis_name=AXIS),
            AXIS,
            in_axes=(None, 0),
            out_axes=(None, None),  # pyright: ignore[reportArgumentType] stub: one axis alone
            devices=self._pmap_devices,
            donate_argnums=0,
        )

    def replicate(self, tree: Any) -> Any:
        local = tree if self._one_process else jax.tree.map(_local_copy, tree)
        return jax.device_put(local, self._own_replicated)

    def shard(self, tree: Any) -> Any:
        return jax.device_put(jax.tree.map(self._rows_of_each_device, tree), self._own_rows)

    def _rows_of_each_device(self, x: np.ndarray) -> np.ndarray:
        """Returns (devices, rows, ...) of (devices * rows, ...)."""
        return x.reshape(self._num_own, -1, *x.shape[1:])


class _ShardMapRunner(Runner):
    """Runs steps by `jax.shard_map` under `jax.jit`, on arrays over all processes."""

    def __init__(self, devices: Sequence[_Device] | None):
        super().__init__(jax.devices() if devices is None else devices)

    def train(self, step: Callable) -> Wrapped:
        mapped = jax.shard_map(
            functools.partial(step, axis_name=AXIS),
            mesh=self._mesh,
            in_specs=(_REPLICATED, _ROWS),
            out_specs=(_REPLICATED, _REPLICATED),
        )
        return jax.jit(mapped, donate_argnums=0)

    def replicate(self, tree: Any) -> Any:
        if self._one_process:
            return jax.device_put(tree, self._all_replicated)
        return self.to_global(tree)

    def shard(self, tree: Any) -> Any:
        if self._one_process:
            return self.shard_local(tree)
        return jax.tree.map(self._rows_of_all_processes, tree)

    def _rows_of_all_processes(self, x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(self._all_rows, x)


_CHOICES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES")  # of devices
_RUNNERS = {"pmap": _PmapRunner, "shard_map": _ShardMapRunner}


def make_runner(parallel: str, devices: Sequence[_Device] | None = None) -> Runner:
    """Returns the `Runner` for "pmap" or "shard_map". Both give the same results to rounding.

    Args:
      parallel: "pmap" or "shard_map".
      devices: the devices to use. None: the devices of all processes.

    Raises:
      ValueError: `parallel` is another name, or JAX finds no devices.
    """
    if parallel not in _RUNNERS:
        raise ValueError(f"parallel must be 'pmap' or 'shard_map', got {parallel!r}")
    if devices is None:
        _check_that_jax_starts()
    return _RUNNERS[parallel](devices)


def _check_that_jax_starts() -> None:
    try:
        jax.devices()
    except Exception as error:  # AssertionError of a missing plugin, RuntimeError of the rest
        chosen = {name: getattr(jax.config, name.lower(), None) for name in _CHOICES}
        given = ", ".join(
            f"{name}={value}" for name, value in chosen.items() if value not in (None, "", -1)
        )
        reason = str(error).splitlines()[0] if str(error) else "its plugin is not installed"
        raise ValueError(
            f"JAX finds no devices{' with ' if given else ''}{given}: {reason}; expected cpu, or "
            "cuda or tpu where jax[cuda13] or jax[tpu] is installed; without these variables JAX "
            "takes what is there"
        ) from error


def gather_over_processes(tree: Any, counts: Sequence[int]) -> Any:
    """Gathers the rows of all processes. Every process must call it, and all get the same.

    Args:
      tree: numpy arrays of this process, (`counts[jax.process_index()]`, ...) each.
      counts: the number of rows of each process.

    Returns:
      The tree of (sum of `counts`, ...) numpy arrays, rows in the order of the processes.
    """
    if jax.process_count() == 1:
        return tree
    most = max(counts)  # processes exchange arrays of one shape: padded, and cut again
    padded = jax.tree.map(functools.partial(_pad_rows, most=most), tree)
    gathered = multihost_utils.process_allgather(padded, tiled=True)
    wanted = np.concatenate([most * i + np.arange(count) for i, count in enumerate(counts)])
    return jax.tree.map(lambda x: x[wanted], gathered)


def _pad_rows(x: np.ndarray, most: int) -> np.ndarray:
    """Returns (most, ...) with zeros after the rows of `x`."""
    return np.pad(x, [(0, most - len(x))] + [(0, 0)] * (x.ndim - 1))


def _local_copy(x: Any) -> Any:
    """Returns this process's copy of a replicated array."""
    return x.addressable_data(0) if isinstance(x, jax.Array) else x
