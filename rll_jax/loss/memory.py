"""Cross-batch memory (Wang et al., CVPR 2020, arXiv 1912.06798): the last embeddings, as a larger gallery to rank.

    bank = memory.init(8192, 512)
    bank = memory.push(bank, embeddings, labels)
    loss.ranked_list_loss(embeddings, labels, gallery=bank.embeddings, gallery_labels=bank.labels, gallery_where=bank.valid)

A plain pytree of arrays: carry it through jit, scan and checkpoints, donate it to the step. One per device: `axis_name` of the
loss gathers them.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from rll_jax.loss import _problem

__all__ = ["CrossBatchMemory", "init", "push"]


class CrossBatchMemory(NamedTuple):
    """`capacity` rows in ring order."""

    embeddings: jax.Array  # (capacity, dim)
    labels: jax.Array  # (capacity,) integer
    valid: jax.Array  # (capacity,) bool: False where nothing was stored yet
    cursor: jax.Array  # () int32: where the next row goes, the oldest once the ring is full


def init(capacity, dim, dtype=jnp.float32, label_dtype=jnp.int32):
    """An empty memory. ValueError unless capacity and dim are at least 1; TypeError unless label_dtype is an integer's."""
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


def push(memory, embeddings, labels, where=None):
    """Stores rows, in their order, over the oldest ones.

    Args:
      memory: a `CrossBatchMemory`.
      embeddings: (N, dim), stored as constants in the memory's dtype. More rows than the capacity: the last ones stay.
      labels: (N,), integer.
      where: (N,) bool: False rows are not stored.

    Returns:
      The new memory.

    Raises:
      TypeError, ValueError: as `loss.ranked_list_loss` does for these rows, another dim, or labels that don't fit.
    """
    capacity, dim = memory.embeddings.shape
    _problem.check_rows("embeddings", embeddings, "labels", labels, "where", where)
    n = embeddings.shape[0]
    if embeddings.shape != (n, dim):
        raise ValueError(
            f"embeddings must be (N, {dim}) for this memory: found shape {embeddings.shape}"
        )
    if isinstance(labels, np.ndarray) and np.any(labels.astype(memory.labels.dtype) != labels):
        raise ValueError(
            f"labels must fit the memory's {memory.labels.dtype}: found {labels.min()} to {labels.max()}"
        )
    stored = jnp.ones(n, bool) if where is None else jnp.asarray(where)
    rank = jnp.cumsum(stored, dtype=jnp.int32)
    count = rank[-1]
    # Two rows for one place would race: of more rows than there are places, only the last are written.
    stored = stored & (rank > count - capacity)
    place = jnp.where(stored, (memory.cursor + rank - 1) % capacity, capacity)

    def write(ring, rows):
        return ring.at[place].set(rows.astype(ring.dtype), mode="drop")

    return CrossBatchMemory(
        write(memory.embeddings, lax.stop_gradient(jnp.asarray(embeddings))),
        write(memory.labels, jnp.asarray(labels)),
        write(memory.valid, jnp.ones(n, bool)),
        (memory.cursor + count) % capacity,
    )
