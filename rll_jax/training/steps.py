"""The train state and one training step: pure functions, for one device or for an axis of many."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

from flax import linen as nn
from flax.training import train_state
import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from rll_jax.loss import memory as memory_lib
from rll_jax.loss import rows as rows_lib
from rll_jax.networks import drop_path
from rll_jax.typing import Loss

PROXIES = "proxies"  # where the parameters hold those of a loss that learns proxies

Levels = dict[str, jax.Array]  # {level: (n, D) embeddings}
Memories = dict[str, memory_lib.CrossBatchMemory]  # {level: memory}


class TrainState(train_state.TrainState):
    """All that the next step depends on.

    Attributes:
      step: () int32 number of steps taken, skipped ones included.
      apply_fn: the network's `apply`. It is no array: checkpoints do not hold it.
      params: {module: ...} float32 parameters. `PROXIES` is one of the modules where the loss
        learns proxies: {level: (proxies, D)}.
      tx: the optimiser. It is no array: checkpoints do not hold it.
      opt_state: the optimiser's arrays.
      batch_stats: {module: ...} float32 running means and variances of batch norm.
      skipped: (3,) int32 counters of steps skipped because something was not finite:
        [current streak, longest streak, total].
      ema: moving average of the parameters, a tree like `params`; or None.
      memory: {level: `rll_jax.loss.memory.CrossBatchMemory`}, which the loss ranks; or None.
    """

    batch_stats: Any
    skipped: Any
    ema: Any = None
    memory: Any = None


class _StepResult(NamedTuple):
    """What a step computes before its update; a tree of arrays.

    Attributes:
      loss: () the sum of `losses`, which is differentiated.
      losses: {level: () loss}.
      watched: {level: what `watch` returned}.
      grads: the gradient of `loss`, a tree like the parameters.
      batch_stats: the new running statistics.
    """

    loss: jax.Array
    losses: dict[str, jax.Array]
    watched: dict[str, dict[str, jax.Array]]
    grads: Any
    batch_stats: Any


class _Measured(NamedTuple):
    """What comes with the value of the objective: see `_StepResult`, and the new memories."""

    losses: dict[str, jax.Array]
    watched: dict[str, dict[str, jax.Array]]
    memory: Memories | None


# (params, images, random key or None) -> levels, statistics
_Embed = Callable[[Any, jax.Array, jax.Array | None], tuple[Levels, Any]]
_Objective = Callable[[Levels, Any], tuple[jax.Array, _Measured]]  # (levels, params) -> loss, ...


def create_train_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_size: int,
    seed: int,
    *,
    with_ema: bool = False,
    proxies: int = 0,
    memory_size: int = 0,
    compiler_options: dict[str, Any] | None = None,
) -> TrainState:
    """Returns a fresh state of a network. It is the same for the same seed.

    Args:
      model: maps (B, image_size, image_size, 3) images to {level: (B, D)}, such as
        `rll_jax.networks.embedding_net.EmbeddingNet`.
      optimizer: the optimiser.
      image_size: side of the images in pixels.
      seed: of the parameters and the proxies.
      with_ema: keep a moving average of the parameters, which starts as a copy of them.
      proxies: number of proxies that the loss learns for each level; 0: none. The model must have
        `levels` and `embedding_dim`, as an `EmbeddingNet` has.
      memory_size: number of rows of each level's cross-batch memory, empty at first; 0: none.
      compiler_options: as of `jax.jit`, for the program that draws the parameters. JAX refuses them
        where this function is traced.
    """
    images = jnp.zeros((1, image_size, image_size, 3), jnp.float32)
    draw = jax.jit(
        lambda: model.init(jax.random.key(seed), images, train=False),
        compiler_options=compiler_options,
    )
    variables = draw()
    params = variables["params"]
    memory = None
    if memory_size:
        levels = jax.eval_shape(lambda: model.apply(variables, images, train=False))
        memory = {level: memory_lib.init(memory_size, e.shape[-1]) for level, e in levels.items()}
    if proxies:
        params = {**params, PROXIES: _initial_proxies(model, proxies, seed)}
    return TrainState.create(
        apply_fn=model.apply,
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        skipped=jnp.zeros(3, jnp.int32),
        tx=optimizer,
        ema=jax.tree.map(jnp.copy, params) if with_ema else None,  # a copy: steps donate both
        memory=memory,
    )


def _initial_proxies(model: Any, proxies: int, seed: int) -> dict[str, jax.Array]:
    """Returns {level: (proxies, D) float32}, drawn as the authors of Proxy Anchor draw them."""
    rng, scale = np.random.default_rng(seed), (2 / proxies) ** 0.5
    return {
        level: jnp.asarray(scale * rng.normal(size=(proxies, model.embedding_dim)), jnp.float32)
        for level in model.levels
    }


def train_step(
    state: TrainState,
    batch: Mapping[str, Any],
    *,
    loss: Loss | Callable[..., jax.Array],
    axis_name: str | None = None,
    ema_decay: ArrayLike = 0.0,
    embed_chunk: int = 0,
    watch: Callable[..., dict[str, jax.Array]] | None = None,
    drop_path_seed: int | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Makes one update from this device's share of the batch.

    Where the loss, the gradient or the batch statistics are not finite, only `step` and `skipped`
    of the state change.

    Args:
      state: replicated over the axis. Where the state has a memory, the rows of all devices are
        stored in it, and the loss ranks the memory instead of the batch alone. Rows of earlier
        batches are constants. Those of this batch move as the gallery too, where the loss has a
        gradient for it.
      batch: {"image": (n, H, W, 3) uint8, "label": (n,) integer}, this device's rows.
      loss: (embeddings, labels, *, axis_name) -> scalar, an `rll_jax.typing.Loss`. The mean of the
        devices' values is the loss of the whole batch, and each query ranks the rows of all
        devices. If the state has a memory, the loss also gets `gallery`, `gallery_labels` and
        `gallery_where`. If the state has proxies, the loss also gets those of its level as
        `proxies`.
      axis_name: the axis of pmap or shard_map; None on one device.
      ema_decay: decay of the state's moving average, if it has one. The decay is smaller in the
        first steps: at most (1 + step) / (10 + step).
      embed_chunk: number of this device's images in the network at a time, a divisor of n; 0: all.
        All images are embedded without a gradient, the loss of the whole batch gives the gradient
        of the embeddings, and each chunk is then embedded again to carry its part of that gradient
        back to the parameters (Gao et al. 2021). This takes two forward passes and the memory of
        one chunk. With frozen batch norm the update is the same to rounding. Otherwise batch norm
        uses the statistics of each chunk (over all devices), and the running statistics move by
        the mean of the chunks'.
      watch: (embeddings, labels, *, axis_name) -> {name: array}, added to the metrics for each
        level, such as `watch_distances`; or None.
      drop_path_seed: the seed of the blocks that images skip, which differ from step to step and
        from device to device; None: they skip none, whatever the network's `drop_path`.

    Returns:
      The new state and the metrics, the same on all devices of the axis: "loss", the sum over the
      levels; "gradient_norm"; "loss_LEVEL" if there are several levels; "NAME_LEVEL" from `watch`.

    Raises:
      ValueError: the rows of a memory are no multiple of the number of devices.
    """
    embed = functools.partial(_embed_in_training, state)
    objective = functools.partial(
        _objective,
        labels=batch["label"],
        memory=state.memory,
        loss=loss,
        watch=watch,
        axis_name=axis_name,
    )
    params = _varying(state.params, axis_name)
    key = _drop_path_key(state, drop_path_seed, axis_name)
    if embed_chunk:
        result, memory = _chunked_gradient(
            embed, objective, params, batch["image"], key, embed_chunk
        )
    else:
        result, memory = _gradient(embed, objective, params, batch["image"], key)
    if axis_name is not None:
        result = lax.pmean(result, axis_name)
    metrics = _metrics(result)
    finite = _is_finite(result, metrics["gradient_norm"])
    updated = _update(state, result, memory, ema_decay)
    return _skip_unless(finite, updated, state), metrics


def _varying(params: Any, axis_name: str | None) -> Any:
    """Marks parameters as different on each device, so that their gradient is this device's own.

    Under shard_map the gradient of replicated parameters would be summed over the devices; see
    `rll_jax.loss.ranked_list_loss`, "Several devices". Under pmap this changes nothing.
    """
    if axis_name is None:
        return params
    return jax.tree.map(lambda p: lax.pcast(p, axis_name, to="varying"), params)


def _drop_path_key(state: TrainState, seed: int | None, axis_name: str | None) -> jax.Array | None:
    """Returns the key of this step on this device, the same in a resumed run."""
    if seed is None:
        return None
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    return key if axis_name is None else jax.random.fold_in(key, lax.axis_index(axis_name))


def _embed_in_training(
    state: TrainState, params: Any, images: jax.Array, key: jax.Array | None
) -> tuple[Levels, Any]:
    """Returns {level: (n, D)} and the new running statistics of batch norm."""
    variables = {"params": params, "batch_stats": state.batch_stats}
    options = {} if key is None else {"rngs": {drop_path.NAME: key}}
    levels, updates = state.apply_fn(
        variables, images, train=True, mutable=["batch_stats"], **options
    )
    return levels, updates.get("batch_stats", {})


def _objective(
    levels: Levels,
    params: Any,
    *,
    labels: jax.Array,
    memory: Memories | None,
    loss: Callable[..., jax.Array],
    watch: Callable[..., dict[str, jax.Array]] | None,
    axis_name: str | None,
) -> tuple[jax.Array, _Measured]:
    """Returns the loss of this device's rows, summed over the levels, and what comes with it."""
    options: dict[str, dict[str, jax.Array]] = {level: {} for level in levels}
    if memory is not None:
        memory = _store_batch(memory, levels, labels, axis_name)
        options = {level: _gallery_share(memory[level], axis_name) for level in memory}
        memory = lax.stop_gradient(memory)
    for level, proxies in params.get(PROXIES, {}).items():
        options[level] = options[level] | {PROXIES: proxies}
    losses = {
        level: loss(e, labels, axis_name=axis_name, **options[level]) for level, e in levels.items()
    }
    # A pair with NaN is neither near nor far, so the loss alone would not show NaN embeddings.
    losses = {
        level: jnp.where(jnp.isfinite(levels[level]).all(), value, jnp.nan)
        for level, value in losses.items()
    }
    watched = {}
    if watch is not None:
        watched = {
            level: watch(lax.stop_gradient(e), labels, axis_name=axis_name)
            for level, e in levels.items()
        }
    total: Any = sum(losses.values())  # an array: there is at least one level
    return total, _Measured(losses, watched, memory)


def _store_batch(
    memory: Memories, levels: Levels, labels: jax.Array, axis_name: str | None
) -> Memories:
    """Returns the memories with the rows of all devices stored, the same on each device.

    The stored rows carry the batch's gradient.

    Raises:
      ValueError: the rows of a memory are no multiple of the number of devices.
    """
    rows = {level: (e, labels) for level, e in levels.items()}
    if axis_name is not None:
        devices = lax.axis_size(axis_name)
        sizes = [level_memory.valid.size for level_memory in memory.values()]
        if any(size % devices for size in sizes):
            raise ValueError(
                f"the rows of a memory must be a multiple of the {devices} devices: found {sizes}"
            )
        rows = jax.tree.map(lambda x: rows_lib.gather_by_sum(x, axis_name), rows)
    return {level: memory_lib.push(memory[level], *rows[level], constant=False) for level in rows}


def _gallery_share(
    memory: memory_lib.CrossBatchMemory, axis_name: str | None
) -> dict[str, jax.Array]:
    """Returns this device's equal share of a memory's rows, as the loss takes its gallery."""
    gallery = {
        "gallery": memory.embeddings,
        "gallery_labels": memory.labels,
        "gallery_where": memory.valid,
    }
    if axis_name is None:
        return gallery
    device, n = lax.axis_index(axis_name), memory.valid.size // lax.axis_size(axis_name)
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, device * n, n), gallery)


def _gradient(
    embed: _Embed,
    objective: _Objective,
    params: Any,
    images: jax.Array,
    key: jax.Array | None,
) -> tuple[_StepResult, Memories | None]:
    """Returns this device's part of the step, and the new memories."""

    def loss_of_params(params: Any) -> tuple[jax.Array, tuple[_Measured, Any]]:
        levels, batch_stats = embed(params, images, key)
        loss, measured = objective(levels, params)
        return loss, (measured, batch_stats)

    (loss, (measured, batch_stats)), grads = jax.value_and_grad(loss_of_params, has_aux=True)(
        params
    )
    result = _StepResult(loss, measured.losses, measured.watched, grads, batch_stats)
    return result, measured.memory


def _chunked_gradient(
    embed: _Embed,
    objective: _Objective,
    params: Any,
    images: jax.Array,
    key: jax.Array | None,
    chunk: int,
) -> tuple[_StepResult, Memories | None]:
    """Returns what `_gradient` returns, with `chunk` images in the network at a time."""
    images = images.reshape(-1, chunk, *images.shape[1:])
    # Both passes of a chunk drop the same blocks.
    chunks = (images, None if key is None else jax.random.split(key, len(images)))
    levels, batch_stats = lax.map(lambda chunk: embed(params, *chunk), chunks)
    levels = jax.tree.map(lambda e: e.reshape(-1, e.shape[-1]), levels)
    (loss, measured), (level_grads, grads) = jax.value_and_grad(objective, (0, 1), has_aux=True)(
        levels, params
    )
    chunked_level_grads = jax.tree.map(lambda g: g.reshape(-1, chunk, g.shape[-1]), level_grads)

    def add_chunk(grads: Any, inputs: tuple[Any, Levels]) -> tuple[Any, None]:
        chunk, level_grads = inputs
        _, pull_back, _ = jax.vjp(lambda params: embed(params, *chunk), params, has_aux=True)
        return jax.tree.map(jnp.add, grads, *pull_back(level_grads)), None

    grads, _ = lax.scan(add_chunk, grads, (chunks, chunked_level_grads))
    batch_stats = jax.tree.map(lambda x: x.mean(axis=0), batch_stats)
    result = _StepResult(loss, measured.losses, measured.watched, grads, batch_stats)
    return result, measured.memory


def _metrics(result: _StepResult) -> dict[str, jax.Array]:
    metrics = {"loss": result.loss, "gradient_norm": optax.tree.norm(result.grads)}
    if len(result.losses) > 1:
        metrics |= {f"loss_{level}": value for level, value in result.losses.items()}
    for level, values in result.watched.items():
        metrics |= {f"{name}_{level}": value for name, value in values.items()}
    return metrics


def _is_finite(result: _StepResult, gradient_norm: jax.Array) -> jax.Array:
    """Returns a () bool: the loss, the gradient and the batch statistics are finite.

    The statistics are looked at because XLA's ReLU on CPUs turns NaN into 0, so that neither the
    loss nor the gradient shows it.
    """
    return (
        jnp.isfinite(result.loss)
        & jnp.isfinite(gradient_norm)
        & jnp.isfinite(optax.tree.norm(result.batch_stats))
    )


def _update(
    state: TrainState, result: _StepResult, memory: Memories | None, ema_decay: ArrayLike
) -> TrainState:
    """Returns the state after the optimiser's update, with its moving average moved."""
    new = state.apply_gradients(grads=result.grads, batch_stats=result.batch_stats, memory=memory)
    if state.ema is None:
        return new
    decay = jnp.minimum(ema_decay, (1 + new.step) / (10 + new.step))
    # By the difference: parameters that do not move (frozen stages) stay the same to the bit.
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, new.params)
    return new.replace(ema=ema)


def _skip_unless(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """Returns the new state if `finite`, else the old one; counts the step either way."""
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
    streak = jnp.where(finite, 0, old.skipped[0] + 1)
    longest = jnp.maximum(old.skipped[1], streak)
    skipped = jnp.stack([streak, longest, old.skipped[2] + ~finite])
    return kept.replace(step=new.step, skipped=skipped)


def watch_distances(
    embeddings: jax.Array,
    labels: jax.Array,
    *,
    alpha: float | jax.Array,
    margin: float | jax.Array,
    axis_name: str | None = None,
    queries: int = 64,
    bins: int = 40,
) -> dict[str, jax.Array]:
    """Measures the distances that a ranked list is made of.

    Args:
      embeddings: (n, D) unit-length rows of this device.
      labels: (n,) integer classes.
      alpha: the negatives' boundary.
      margin: `alpha - margin` is the positives' boundary.
      axis_name: the axis over whose devices the gallery is gathered; None on one device.
      queries: only the first so many rows of this device are queries.
      bins: number of bins of the histograms.

    Returns:
      Of this device's queries:
      "nontrivial_positives": () share of the pairs of one class that are farther apart than
        `alpha - margin`; 0 if there are no such pairs.
      "nontrivial_negatives": () share of the other pairs that are nearer than `alpha`; likewise.
      "positive_distances", "negative_distances": (bins,) counts of distances between 0 and 2.
    """
    gallery, gallery_labels = (rows_lib.gather(x, axis_name) for x in (embeddings, labels))
    first = 0 if axis_name is None else lax.axis_index(axis_name) * len(labels)
    query, query_labels = embeddings[:queries], labels[:queries]
    cosine = jnp.matmul(query, gallery.T, precision=lax.Precision.HIGHEST)
    distance = jnp.sqrt(jnp.maximum(2 - 2 * cosine, 0))
    same = query_labels[:, None] == gallery_labels[None]
    others = jnp.arange(len(gallery_labels))[None] != (first + jnp.arange(len(query)))[:, None]
    watched = {}
    for name, pairs, nontrivial in (
        ("positive", same & others, distance > alpha - margin),
        ("negative", ~same, distance < alpha),
    ):
        share = jnp.sum(pairs & nontrivial) / jnp.maximum(jnp.sum(pairs), 1)
        watched[f"nontrivial_{name}s"] = share
        watched[f"{name}_distances"] = _histogram(distance, pairs, bins)
    return watched


def _histogram(distance: jax.Array, pairs: jax.Array, bins: int) -> jax.Array:
    """Returns (bins,) float32 counts of the distances, in [0, 2], of the pairs that count."""
    place = jnp.minimum(distance * bins / 2, bins - 1).astype(jnp.int32)
    return jnp.bincount(place.ravel(), pairs.ravel().astype(jnp.float32), length=bins)


def embed_step(
    state: TrainState, images: jax.Array | np.ndarray, *, pooled: bool = False
) -> Levels:
    """Embeds images with the running batch statistics, and the moving average if there is one.

    Args:
      state: a state; its optimiser and memory are not used.
      images: (n, H, W, 3) uint8.
      pooled: whether the backbone's own features come with the embeddings, see
        `embedding_net.EmbeddingNet.__call__`.

    Returns:
      {level: (n, D) float32}, with `pooled` {`embedding_net.POOLED`: (n, channels) float32} too.
    """
    variables = {
        "params": state.params if state.ema is None else state.ema,
        "batch_stats": state.batch_stats,
    }
    options = {"pooled": True} if pooled else {}  # not every network has the argument
    return state.apply_fn(variables, images, train=False, **options)
