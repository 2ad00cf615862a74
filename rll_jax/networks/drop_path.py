"""Drop path (Huang et al. 2016, "stochastic depth"): images skip some blocks in training."""

from flax import linen as nn
import jax
import jax.numpy as jnp

NAME = "drop_path"  # the name of the random numbers that blocks are dropped by


def rate_of(largest: float, block: int, blocks: int, frozen: bool) -> float:
    """Returns the share of images that skip a block, which grows linearly with its depth.

    Args:
      largest: that of the last block.
      block: the block's number, from 0, which is never skipped.
      blocks: the number of blocks.
      frozen: whether the block is in a frozen stage, which is never skipped either.
    """
    return 0.0 if frozen else largest * block / max(blocks - 1, 1)


def drop(module: nn.Module, branch: jax.Array, rate: float) -> jax.Array:
    """Drops a residual branch for some images (Huang et al. 2016), and makes up for it in others.

    Args:
      module: the block. Nothing is dropped unless its network was given random numbers named
        `NAME`, as in training.
      branch: (B, ...), what is added to the shortcut.
      rate: the share of images without the branch, below 1.
    """
    if not rate or not module.has_rng(NAME):
        return branch
    shape = (branch.shape[0], *(1 for _ in branch.shape[1:]))
    kept = jax.random.bernoulli(module.make_rng(NAME), 1 - rate, shape)
    return jnp.where(kept, branch / (1 - rate), jnp.zeros_like(branch))


def check(rate: float) -> None:
    """Raises ValueError for a rate out of range."""
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path={rate}: expected at least 0, and below 1")
