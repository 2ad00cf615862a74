"""Networks that compile at once."""

from flax import linen as nn
import jax.numpy as jnp


class Linear(nn.Module):
    """A network that compiles at once."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Dense(8, use_bias=False)(images.reshape(len(images), -1) / 255 - 0.5)
        return {"H": x / jnp.linalg.norm(x, axis=-1, keepdims=True)}
