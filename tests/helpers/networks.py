"""Networks that compile at once."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Linear(nn.Module):
    """{"H": (B, 8)} of unit length: one matrix product of the pixels."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        x = nn.Dense(8, use_bias=False)(images.reshape(len(images), -1) / 255 - 0.5)
        return {"H": x / jnp.linalg.norm(x, axis=-1, keepdims=True)}


def variables_of(model, side=64):
    """Variables of zeros: values that a test forgot to fill in would show."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), dict(shapes))


def random_variables(model, side=64, scale=1.0):
    """Variables of normal values. Vectors are positive: variances are among them."""
    rng = np.random.default_rng(0)

    def drawn(like):
        values = rng.normal(0, scale, like.shape).astype(np.float32)
        return np.abs(values) if values.ndim == 1 else values

    return jax.tree.map(drawn, variables_of(model, side))
