"""Cross-batch memory (Wang et al., CVPR 2020, arXiv 1912.06798): the last rows, as a gallery.

    bank = memory.init(8192, 512)
    bank = memory.push(bank, embeddings, labels)
    loss.ranked_list_loss(
        embeddings,
        labels,
        gallery=bank.embeddings,
        gallery_labels=bank.labels,
        gallery_where=bank.valid,
    )

A memory is a plain pytree of arrays: carry it through jit, scan and checkpoints, and donate it to
the step. Keep one on each device: `axis_name` of the loss gathers them.
"""

# jax's stubs leave some parameters of asarray and auto_axes without a type.
# pyright: reportUnknownMemberType=false

from typing import Any, NamedTuple, cast

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.typing import DTypeLike
import numpy as np

from rll_jax.loss._mesh import mesh_of
from rll_jax.loss.rows import check_rows

__all__ = ["CrossBatchMemory", "init", "push"]


class CrossBatchMemory(NamedTuple):
    """A ring of `capacity` rows."""

    embeddings: jax.Array  # (capacity, dim)
    labels: jax.Array  # (capacity,) integer
    valid: jax.Array  # (capacity,) bool: False where no row is stored yet
    cursor: (
        jax.Array
    )  # () int32: the place of the next row, which is the oldest row's in a full ring


def init(
    capacity: int, dim: int, dtype: DTypeLike = jnp.float32, label_dtype: DTypeLike = jnp.int32
) -> CrossBatchMemory:
    """Returns an empty memory.

    Args:
      capacity: the number of rows that it keeps.
      dim: the dimension of the embeddings.
      dtype: of the stored embeddings.
      label_dtype: of the stored labels, an integer dtype.

    Raises:
      TypeError: label_dtype is not an integer dtype.
      ValueError: capacity or dim is less than 1.
    """
    if not jnp.issubdtype(label_dtype, jnp.integer):
        raise TypeError(f"label_dtype must be an integer dtype: found {jnp.dtype(label_dtype)}")
    if capacity < 1 or dim < 1:
        raise ValueError(f"capacity and dim must be at least 1: found {capacity} and {dim}")
    return CrossBatchMemory(
        jnp.zeros((capacity, dim), dtype),
        jnp.zeros(capacity, label_dtype),
        jnp.zeros(capacity, bool),
        jnp.int32(0),
    )


def push(
    memory: CrossBatchMemory,
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    where: jax.Array | np.ndarray | None = None,
    *,
    constant: bool = True,
) -> CrossBatchMemory:
    """Returns the memory with rows stored, in their order, over the oldest ones.

    Args:
      memory: the memory so far.
      embeddings: (N, dim), floating. They are stored in the memory's dtype. Of more rows than the
        capacity, the last ones stay.
      labels: (N,), integer.
      where: (N,) bool: False rows are not stored.
      constant: True: no gradient flows through what is stored. False: a loss with
        `gallery_gradient` moves these rows at both ends. Then keep `jax.lax.stop_gradient(memory)`
        for the next step.

    Raises:
      TypeError: as `loss.ranked_list_loss` raises it for these rows.
      ValueError: likewise; or another dim than the memory's, or labels that do not fit its dtype.
        Labels on a device are not checked for that.
    """
    dim = memory.embeddings.shape[1]
    check_rows(embeddings, labels, where)
    n = embeddings.shape[0]
    if embeddings.shape != (n, dim):
        raise ValueError(
            f"embeddings must be (N, {dim}) for this memory: found shape {embeddings.shape}"
        )
    if isinstance(labels, np.ndarray) and np.any(labels.astype(memory.labels.dtype) != labels):
        raise ValueError(
            f"labels must fit the memory's {memory.labels.dtype}: "
            f"found {labels.min()} to {labels.max()}"
        )
    if constant:
        embeddings = lax.stop_gradient(jnp.asarray(embeddings))
    mesh = mesh_of(embeddings)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return _push(memory, embeddings, labels, where)
    # Under explicit axes JAX asks where each result lies: as the memory did.
    specs = [jax.typeof(x).sharding.spec for x in memory]
    places = CrossBatchMemory(*(cast("Any", NamedSharding(mesh, spec)) for spec in specs))
    push_anywhere = cast("Any", jax.sharding.auto_axes(_push, out_sharding=places))
    return push_anywhere(memory, embeddings, labels, where)


def _push(
    memory: CrossBatchMemory,
    embeddings: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    where: jax.Array | np.ndarray | None,
) -> CrossBatchMemory:
    """Returns the memory with rows stored, without checks."""
    n, capacity = embeddings.shape[0], memory.embeddings.shape[0]
    stored = jnp.ones(n, bool) if where is None else jnp.asarray(where)
    rank = jnp.cumsum(stored, dtype=jnp.int32)
    count = rank[-1]
    # Of more rows than places only the last are written: two rows for one place would race.
    stored = stored & (rank > count - capacity)
    place = jnp.where(stored, (memory.cursor + rank - 1) % capacity, capacity)

    def write(ring: jax.Array, rows: jax.Array) -> jax.Array:
        return ring.at[place].set(rows.astype(ring.dtype), mode="drop")

    return CrossBatchMemory(
        write(memory.embeddings, jnp.asarray(embeddings)),
        write(memory.labels, jnp.asarray(labels)),
        write(memory.valid, jnp.ones(n, bool)),
        (memory.cursor + count) % capacity,
    )
