"""The train state and one step of training: pure functions, for one device or an axis of many."""
from typing import Any

from flax.training import train_state
import jax
import jax.numpy as jnp
from jax import lax
import optax


class TrainState(train_state.TrainState):
    """Parameters, batch statistics, optimiser state and step: all that the next step depends on.

    `ema` is a moving average of the parameters, or None.
    """

    batch_stats: Any
    ema: Any = None


def create_train_state(model, optimizer, image_size: int, seed: int, *, with_ema: bool = False) -> TrainState:
    """A fresh state of `model` for (B, image_size, image_size, 3) images; the same for the same seed."""

    @jax.jit
    def init():
        images = jnp.zeros((1, image_size, image_size, 3), jnp.float32)
        return model.init(jax.random.key(seed), images, train=False)

    variables = init()
    params = variables["params"]
    return TrainState.create(
        apply_fn=model.apply,
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        tx=optimizer,
        ema=jax.tree.map(jnp.copy, params) if with_ema else None,  # a copy: steps donate both
    )


def train_step(state: TrainState, batch, *, loss, axis_name=None, ema_decay=0.0):
    """One update from this device's share of the batch; (new state, metrics), the same on all devices of `axis_name`.

    Args:
      state: replicated over the axis.
      batch: {"image": (n, H, W, 3) uint8, "label": (n,) integer}: each device its own rows.
      loss: (embeddings, labels, *, axis_name) -> scalar, by the convention of `rll_jax.loss`: the mean over the axis of
        the devices' values is the loss of the whole batch, each query ranking the rows of all devices.
      axis_name: of pmap, shard_map or vmap, or None on one device.
      ema_decay: of the state's moving average, where it has one; smaller in the first steps, (1 + step) / (10 + step).
    """
    params = state.params
    if axis_name is not None:  # see `ranked_list_loss` on several devices; no effect under pmap
        params = jax.tree.map(lambda p: lax.pcast(p, axis_name, to="varying"), params)

    def objective(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        levels, updates = state.apply_fn(variables, batch["image"], train=True, mutable=["batch_stats"])
        losses = {level: loss(e, batch["label"], axis_name=axis_name) for level, e in levels.items()}
        return sum(losses.values()), (updates.get("batch_stats", {}), losses)

    (total, (batch_stats, losses)), grads = jax.value_and_grad(objective, has_aux=True)(params)
    if axis_name is not None:
        total, losses, grads, batch_stats = lax.pmean((total, losses, grads, batch_stats), axis_name)
    metrics = {"loss": total, "gradient_norm": optax.tree.norm(grads)}
    if len(losses) > 1:
        metrics |= {f"loss_{level}": value for level, value in losses.items()}
    state = state.apply_gradients(grads=grads, batch_stats=batch_stats)
    if state.ema is not None:
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        state = state.replace(ema=optax.incremental_update(state.params, state.ema, 1 - decay))
    return state, metrics


def embed_step(state: TrainState, images):
    """{level: (n, D)} of (n, H, W, 3) images, with the running batch statistics and the moving average where there is one."""
    params = state.params if state.ema is None else state.ema
    return state.apply_fn({"params": params, "batch_stats": state.batch_stats}, images, train=False)
