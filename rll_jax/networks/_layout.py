"""Where in memory XLA's CPU backend puts a transposed matrix of bfloat16."""

import jax
from jax.experimental import layout
import jax.numpy as jnp


def in_rows(x: jax.Array) -> jax.Array:
    """Returns an array, one of bfloat16 with its last axis contiguous.

    A CPU's instructions for bfloat16 serve products of such matrices alone. XLA leaves a transposed
    one where it is, and multiplies it in float32. `jax.export` refuses the constraint.
    """
    # Before jax 0.12 the constraint gathers what is divided over devices.
    if x.dtype != jnp.bfloat16 or jax.__version_info__ < (0, 12):
        return x
    return layout.with_layout_constraint(x, layout.Layout(tuple(range(x.ndim))))
