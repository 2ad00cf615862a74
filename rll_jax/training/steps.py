"""The train state and one step of training: pure functions, for one device or an axis of many."""

import functools
from typing import Any

from flax.training import train_state
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from rll_jax.loss import memory as memory_lib

PROXIES = "proxies"  # of a loss that learns some, among the parameters


class TrainState(train_state.TrainState):
    """Parameters, batch statistics, optimiser state and step: all that the next step depends on.

    Attributes:
      ema: a moving average of the parameters, or None.
      memory: {level: `rll_jax.loss.memory.CrossBatchMemory`}, which the losses rank, or None.
      skipped: (3,) int32: steps without an update because something was not finite: the last ones in a row, most in a row, all.
    """

    batch_stats: Any
    skipped: Any
    ema: Any = None
    memory: Any = None


def create_train_state(
    model,
    optimizer,
    image_size: int,
    seed: int,
    *,
    with_ema: bool = False,
    proxies: int = 0,
    memory_size: int = 0,
) -> TrainState:
    """A fresh state of `model` for (B, image_size, image_size, 3) images; the same for the same seed.

    With `proxies`, for a loss that learns so many of them, the parameters of an `EmbeddingNet` have {"proxies": {level: (proxies, D)}} too.

    With `memory_size` an empty memory of so many rows for each level.
    """
    images = jnp.zeros((1, image_size, image_size, 3), jnp.float32)
    variables = jax.jit(lambda: model.init(jax.random.key(seed), images, train=False))()
    levels = (
        jax.eval_shape(lambda: model.apply(variables, images, train=False)) if memory_size else {}
    )
    params = variables["params"]
    if proxies:
        rng, scale = (
            np.random.default_rng(seed),
            (2 / proxies) ** 0.5,
        )  # as the authors of Proxy Anchor begin
        drawn = {
            level: scale * rng.normal(size=(proxies, model.embedding_dim)) for level in model.levels
        }
        params = {**params, PROXIES: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)}
    return TrainState.create(
        apply_fn=model.apply,
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        skipped=jnp.zeros(3, jnp.int32),
        tx=optimizer,
        ema=jax.tree.map(jnp.copy, params) if with_ema else None,  # a copy: steps donate both
        memory={level: memory_lib.init(memory_size, e.shape[-1]) for level, e in levels.items()}
        or None,
    )


def train_step(
    state: TrainState, batch, *, loss, axis_name=None, ema_decay=0.0, embed_chunk=0, watch=None
):
    """One update from this device's share of the batch; (new state, metrics), the same on all devices of `axis_name`.

    Where the loss, the gradient or the batch statistics are not finite, only `step` and `skipped` of the state change.

    Args:
      state: replicated over the axis. Where it has a memory, this batch is stored in it (the rows of all devices, whose number divides
        the memory's) and the loss ranks the memory instead of the batch alone, as constants.
      batch: {"image": (n, H, W, 3) uint8, "label": (n,) integer}: each device its own rows.
      loss: (embeddings, labels, *, axis_name) -> scalar, by the convention of `rll_jax.loss`: the mean over the axis of
        the devices' values is the loss of the whole batch, each query ranking the rows of all devices. With a memory it
        gets gallery, gallery_labels and gallery_where too; where the state has proxies, those of the level, as `proxies`.
      axis_name: of pmap, shard_map or vmap, or None on one device.
      ema_decay: of the state's moving average, where it has one; smaller in the first steps, (1 + step) / (10 + step).
      embed_chunk: 0, or how many of this device's images to have in the network at a time, a divisor of n: all are embedded without a
        gradient, the loss of the whole batch gives that of the embeddings, and each chunk takes its part back through the network
        (Gao et al. 2021). The same update to rounding, for two forward passes and the memory of a chunk, where batch norm is frozen;
        where it is not, it takes the statistics of each chunk (over all devices), and the running ones their mean.
      watch: (embeddings, labels, *, axis_name) -> {name: array} to add to the metrics for each level, or None.
    """
    params = state.params
    if axis_name is not None:  # see `ranked_list_loss` on several devices; no effect under pmap
        params = jax.tree.map(lambda p: lax.pcast(p, axis_name, to="varying"), params)

    def embed(params, images):
        variables = {"params": params, "batch_stats": state.batch_stats}
        levels, updates = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        return levels, updates.get("batch_stats", {})

    def objective(levels, params):
        stored, given = state.memory, {level: {} for level in levels}
        if stored is not None:
            stored, given = _remember(stored, levels, batch["label"], axis_name)
        for level, proxies in params.get(PROXIES, {}).items():
            given[level] = given[level] | {PROXIES: proxies}
        losses = {
            level: loss(e, batch["label"], axis_name=axis_name, **given[level])
            for level, e in levels.items()
        }
        # a pair with NaN is neither near nor far: the loss alone would not show it
        losses = {
            level: jnp.where(jnp.isfinite(levels[level]).all(), value, jnp.nan)
            for level, value in losses.items()
        }
        seen = (
            {}
            if watch is None
            else {
                level: watch(lax.stop_gradient(e), batch["label"], axis_name=axis_name)
                for level, e in levels.items()
            }
        )
        return sum(losses.values()), (losses, seen, stored)

    gradient = functools.partial(_chunked_gradient, chunk=embed_chunk) if embed_chunk else _gradient
    total, (losses, seen, stored), batch_stats, grads = gradient(
        embed, objective, params, batch["image"]
    )
    if axis_name is not None:
        total, losses, seen, grads, batch_stats = lax.pmean(
            (total, losses, seen, grads, batch_stats), axis_name
        )
    metrics = {"loss": total, "gradient_norm": optax.tree.norm(grads)}
    if len(losses) > 1:
        metrics |= {f"loss_{level}": value for level, value in losses.items()}
    metrics |= {
        f"{name}_{level}": value for level, values in seen.items() for name, value in values.items()
    }
    # the statistics too: XLA's ReLU on CPUs makes NaN 0, and the loss is as if nothing had been
    finite = (
        jnp.isfinite(total)
        & jnp.isfinite(metrics["gradient_norm"])
        & jnp.isfinite(optax.tree.norm(batch_stats))
    )
    new = state.apply_gradients(grads=grads, batch_stats=batch_stats, memory=stored)
    if state.ema is not None:
        decay = jnp.minimum(ema_decay, (1 + new.step) / (10 + new.step))
        # by the difference, which keeps what does not move (frozen stages) to the bit
        new = new.replace(
            ema=jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, new.params)
        )
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    in_a_row = jnp.where(finite, 0, state.skipped[0] + 1)
    skipped = jnp.stack(
        [in_a_row, jnp.maximum(state.skipped[1], in_a_row), state.skipped[2] + ~finite]
    )
    return kept.replace(step=new.step, skipped=skipped), metrics


def _remember(memory, levels, labels, axis_name):
    """The memory with the rows of all devices in it, the same on each, and the loss's gallery: this device's share of it."""
    rows = {level: (e, labels) for level, e in lax.stop_gradient(levels).items()}
    if axis_name is not None:
        at, devices, n = lax.axis_index(axis_name), lax.axis_size(axis_name), len(labels)
        if any(bank.valid.size % devices for bank in memory.values()):
            raise ValueError(
                f"the rows of a memory must be a multiple of the {devices} devices: found {[b.valid.size for b in memory.values()]}"
            )

        def of_all(
            x,
        ):  # a sum with zeros, exact: what all_gather gives counts as another on each device
            return lax.psum(
                lax.dynamic_update_slice_in_dim(
                    jnp.zeros((n * devices, *x.shape[1:]), x.dtype), x, at * n, 0
                ),
                axis_name,
            )

        rows = jax.tree.map(of_all, rows)
    memory = {level: memory_lib.push(memory[level], *rows[level]) for level in rows}
    galleries = {
        level: dict(gallery=bank.embeddings, gallery_labels=bank.labels, gallery_where=bank.valid)
        for level, bank in memory.items()
    }
    if axis_name is not None:
        galleries = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, at * (len(x) // devices), len(x) // devices),
            galleries,
        )
    return memory, galleries


def _gradient(embed, objective, params, images):
    """The objective and what comes with it, the batch statistics, and the gradient of the parameters."""

    def of_params(params):
        levels, batch_stats = embed(params, images)
        total, seen = objective(levels, params)
        return total, (seen, batch_stats)

    (total, (seen, batch_stats)), grads = jax.value_and_grad(of_params, has_aux=True)(params)
    return total, seen, batch_stats, grads


def _chunked_gradient(embed, objective, params, images, *, chunk):
    """As `_gradient`, with `chunk` images in the network at a time."""
    chunks = images.reshape(-1, chunk, *images.shape[1:])
    split = lambda e: e.reshape(-1, chunk, e.shape[-1])
    levels, batch_stats = lax.map(functools.partial(embed, params), chunks)
    levels = jax.tree.map(lambda e: e.reshape(-1, e.shape[-1]), levels)
    (total, seen), (of_levels, grads) = jax.value_and_grad(objective, (0, 1), has_aux=True)(
        levels, params
    )

    def back(grads, of_chunk):
        images, of_levels = of_chunk
        _, pull, _ = jax.vjp(lambda params: embed(params, images), params, has_aux=True)
        return jax.tree.map(jnp.add, grads, *pull(of_levels)), None

    grads, _ = lax.scan(back, grads, (chunks, jax.tree.map(split, of_levels)))
    return total, seen, jax.tree.map(lambda x: x.mean(axis=0), batch_stats), grads


def watch_distances(embeddings, labels, *, alpha, margin, axis_name=None, queries=64, bins=40):
    """What a ranked list is made of, seen from the first `queries` rows of this device.

    Returns {"nontrivial_positives": share of the pairs of a class farther than alpha - margin, "nontrivial_negatives": share of the
    other pairs nearer than alpha, "positive_distances", "negative_distances": (bins,) counts between 0 and 2}.
    """
    gallery, gallery_labels, first = embeddings, labels, 0
    if axis_name is not None:
        gallery, gallery_labels = (
            lax.all_gather(x, axis_name, tiled=True) for x in (embeddings, labels)
        )
        first = lax.axis_index(axis_name) * len(labels)
    q, of_q = embeddings[:queries], labels[:queries]
    distance = jnp.sqrt(
        jnp.maximum(2 - 2 * jnp.matmul(q, gallery.T, precision=lax.Precision.HIGHEST), 0)
    )
    same = of_q[:, None] == gallery_labels
    others = jnp.arange(len(gallery_labels)) != (first + jnp.arange(len(q)))[:, None]
    found = {}
    for name, pairs, nontrivial in (
        ("positive", same & others, distance > alpha - margin),
        ("negative", ~same, distance < alpha),
    ):
        found[f"nontrivial_{name}s"] = jnp.sum(pairs & nontrivial) / jnp.maximum(jnp.sum(pairs), 1)
        counts = jnp.bincount(
            jnp.minimum(distance * bins / 2, bins - 1).astype(jnp.int32).ravel(),
            pairs.ravel().astype(jnp.float32),
            length=bins,
        )
        found[f"{name}_distances"] = counts
    return found


def embed_step(state: TrainState, images):
    """{level: (n, D)} of (n, H, W, 3) images, with the running batch statistics and the moving average where there is one."""
    params = state.params if state.ema is None else state.ema
    return state.apply_fn({"params": params, "batch_stats": state.batch_stats}, images, train=False)
