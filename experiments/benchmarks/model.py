"""Images a second of the networks, embedding and training, beside the same networks in PyTorch.

    python -m experiments.benchmarks.model                               # 10 minutes on 2 cores
    python -m experiments.benchmarks.model --models=resnet18 --sizes=96  # 3 minutes
    python -m experiments.benchmarks.model --models=googlenet_v2 --sizes=224 --batch=32
    python -m experiments.benchmarks.model --models=vit_small_16 --sizes=224 --batch=16
    python -m experiments.benchmarks.model --models=resnet_small --sizes=32 --batch=160
    python -m experiments.benchmarks.model --models=resnet50 --sizes=224 --batch=256 \
        --dtype=bfloat16                                                 # on a GPU

`experiments/benchmarks/README.md` says what is measured and what the columns mean.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import os
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from experiments.engine import measuring

if TYPE_CHECKING:
    import numpy as np

_START = time.perf_counter()  # JAX and all that is slow to import come later
_MODULE = "experiments.benchmarks.model"
_MODELS = flags.DEFINE_list(
    "models", ["resnet18", "resnet50"], "Networks, of rll_jax.networks.backbones.BACKBONES."
)
_SIZES = flags.DEFINE_list("sizes", ["96", "128"], "Sides of the images, pixels, multiples of 4.")
_BATCH = flags.DEFINE_integer(
    "batch", 16, "Number of images in a batch, 4 of each class.", lower_bound=8
)
_DIM = flags.DEFINE_integer("dim", 512, "Embedding dimension D.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "Dtype of the convolutions; PyTorch's by autocast.",
)
_COMPILE = flags.DEFINE_bool("torch_compile", False, "Let PyTorch compile its network.")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "Processes for each measurement; the first of ours fills the cache.", lower_bound=2
)
_SECONDS = flags.DEFINE_float(
    "seconds",
    2.0,
    "Time to measure each thing in each process; at least one call.",
    lower_bound=0.0,
)
_TABLE = flags.DEFINE_string("table", "", "File to write the tables to; empty: none.")

_MISSING = "not installed"
_PEERS = ("torch", "torch_channels_last")  # the two layouts of PyTorch's images


class _Task(NamedTuple):
    """One measurement.

    Attributes:
      kind: "ours", "torch" or "torch_channels_last".
      model: name of the backbone.
      size: side of the images in pixels.
      batch: number of images.
      dim: embedding dimension.
      dtype: dtype of the convolutions.
      seconds: how long to measure each thing.
      torch_compile: let PyTorch compile its network.
      platform: JAX's platform, for PyTorch to use the same.
      cache: folder of JAX's persistent compilation cache.
    """

    kind: str
    model: str
    size: int
    batch: int
    dim: int
    dtype: str
    seconds: float
    torch_compile: bool
    platform: str
    cache: str


class _Measurable(NamedTuple):
    """What to measure.

    Attributes:
      calls: "train", "forward" and "loss".
      device_memory: returns the most memory that the device held, in MiB; None: the process's.
      facts: what is known before the calls.
    """

    calls: Mapping[str, Callable[[], object]]
    device_memory: Callable[[], float] | None
    facts: dict[str, Any]


class _Compared(NamedTuple):
    """The results of one network and size; each {name: value} as `measure` returns them.

    Attributes:
      ours: the best of each value over our processes.
      cold: our first process, which compiles into an empty cache.
      torch: the best of each value over PyTorch's processes and layouts; None: not installed.
      ratios: {"train", "forward": PyTorch's seconds divided by ours in each round}, empty lists if
        PyTorch is not installed. PyTorch's are those of its faster layout in the round.
    """

    ours: dict[str, Any]
    cold: dict[str, Any]
    torch: dict[str, Any] | None
    ratios: dict[str, list[float]]


def _data(size: int, batch: int) -> "tuple[np.ndarray, np.ndarray]":
    """Returns (batch, size, size, 3) uint8 images and their labels.

    The images are blocks of colour: random networks tell such images apart, unlike noise, whose
    embeddings would all be one.
    """
    import numpy as np

    blocks = np.random.default_rng(0).integers(0, 256, (batch, 4, 4, 3), np.uint8)
    return blocks.repeat(size // 4, axis=1).repeat(size // 4, axis=2), np.arange(batch) // 4


class _TrainStep:
    """A compiled step with its state, which is donated at each call."""

    def __init__(self, compiled: Callable, state: Any, batch: Any):
        self._compiled, self._batch = compiled, batch
        self.state = state

    def __call__(self) -> None:
        import jax

        self.state, _ = jax.block_until_ready(self._compiled(self.state, self._batch))


def _ours(task: _Task, images: "np.ndarray", labels: "np.ndarray") -> _Measurable:
    import jax

    from experiments.engine import build, startup
    from experiments.engine import config as config_lib
    from rll_jax import loss
    from rll_jax.training import devices, steps

    startup.take_bfloat16_products(task.dtype)
    jax.config.update("jax_compilation_cache_dir", task.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # small networks too
    config = config_lib.from_flat(
        backbone=task.model,
        embedding_dim=task.dim,
        image_size=task.size,
        dtype=task.dtype,
        optimizer="sgd",
        learning_rate=1e-3,
        schedule="step",
        weight_decay=1e-4,
    )
    device = jax.local_devices()[0]
    runner = devices.make_runner(config.devices.parallel, [device])
    state = build.make_state(config, runner)
    batch = runner.shard({"image": images, "label": labels})
    device_images, device_labels = runner.shard_local(images), jax.device_put(labels)
    start = time.perf_counter()
    step = runner.train(functools.partial(steps.train_step, loss=loss.ranked_list_loss))
    lowered = step.lower(state, batch)
    compiled = lowered.compile()
    facts = {"compile": time.perf_counter() - start}
    train = _TrainStep(compiled, state, batch)
    train()
    facts |= {
        "first": time.perf_counter() - _START,
        "platform": device.platform,
        "flops": (lowered.cost_analysis() or {})["flops"],
    }
    embed = runner.embed(steps.embed_step)
    loss_alone = jax.jit(jax.value_and_grad(loss.ranked_list_loss))
    embeddings = jax.random.normal(jax.random.key(0), (task.batch, task.dim))
    calls = {
        "train": train,
        "forward": lambda: jax.block_until_ready(embed(train.state, device_images)),
        "loss": lambda: jax.block_until_ready(loss_alone(embeddings, device_labels)),
    }
    if device.memory_stats():
        return _Measurable(calls, lambda: device.memory_stats()["peak_bytes_in_use"] / 2**20, facts)
    return _Measurable(calls, None, facts)


def _torch(task: _Task, images: "np.ndarray", labels: "np.ndarray") -> _Measurable:
    from experiments.benchmarks import model_torch
    from rll_jax.networks import backbones

    calls, memory = model_torch.calls(
        backbones.BACKBONES[task.model],
        images,
        labels,
        task.dim,
        task.dtype,
        task.platform,
        channels_last=task.kind == "torch_channels_last",
        compiled=task.torch_compile,
    )
    return _Measurable(calls, memory, {})


def measure(**task: Any) -> dict[str, Any]:
    """Measures one task in this process.

    Args:
      **task: the fields of `_Task`.

    Returns:
      Seconds "train", "forward" and "loss", the best call of each; "memory" in MiB or None. Ours
      has "compile" and "first" in seconds, "platform" and "flops" too.
    """
    setting = _Task(**task)
    make = _ours if setting.kind == "ours" else _torch
    calls, device_memory, results = make(setting, *_data(setting.size, setting.batch))
    for name, call in calls.items():
        if measuring.seconds_of(call) < setting.seconds:
            call()  # where calls are short, the second still warms up
        if name == "train":
            measuring.restart_peak_memory()
        results[name] = _best_seconds(call, setting.seconds)
        if name == "train":
            results["memory"] = device_memory() if device_memory else measuring.memory_mib("VmHWM")
    return results


def _best_seconds(call: Callable[[], object], seconds: float) -> float:
    """Calls for so many seconds, at least once, and returns the least that one call took."""
    end = time.perf_counter() + seconds
    best = measuring.seconds_of(call)
    while time.perf_counter() < end:
        best = min(best, measuring.seconds_of(call))
    return best


def _compared(model: str, size: int) -> _Compared:
    """Measures one network and size: one process for each kind in turn, in rounds."""
    kinds = ("ours", *_PEERS)
    measured: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(_ROUNDS.value):
            for kind in kinds:
                task = _Task(
                    kind=kind,
                    model=model,
                    size=size,
                    batch=_BATCH.value,
                    dim=_DIM.value,
                    dtype=_DTYPE.value,
                    seconds=_SECONDS.value,
                    torch_compile=_COMPILE.value,
                    platform=measured["ours"][0]["platform"] if measured["ours"] else "",
                    cache=cache,
                )
                result = measuring.in_own_process(_MODULE, **task._asdict())
                if result is not None:
                    measured[kind].append(result)
    if not measured["ours"]:
        raise ValueError("a package that rll_jax needs is missing: see requirements.txt")
    peers = [result for kind in _PEERS for result in measured[kind]]
    return _Compared(
        ours=_best(measured["ours"]),
        cold=measured["ours"][0],
        torch=_best(peers) if peers else None,
        ratios={name: _ratios(measured, name) for name in ("train", "forward")},
    )


def _ratios(measured: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> list[float]:
    """Returns how many times as fast as PyTorch ours was in each round."""
    if not all(measured.values()):  # PyTorch is missing
        return []
    rounds = zip(*measured.values(), strict=True)
    return [min(a[name], b[name]) / ours[name] for ours, a, b in rounds]


def _best(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the least of each value over the results; not those that are None in the first."""
    return {
        name: min(result[name] for result in results if result[name] is not None)
        for name, value in results[0].items()
        if value is not None
    }


def _speed_table(compared: Mapping[tuple[str, int], _Compared]) -> str:
    """Returns the table of images per second."""
    head = ["model", "pixels", "images/s", "rll_jax", "PyTorch", "rll_jax / PyTorch", "least, most"]
    lines = []
    for (model, size), row in compared.items():
        for name, text in (("forward", "forward"), ("train", "train step")):
            peer = [_MISSING, "", ""]
            if row.torch:
                rate, ratios = _BATCH.value / row.torch[name], row.ratios[name]
                spread = f"{min(ratios):.2f}, {max(ratios):.2f}"
                peer = [f"{rate:.1f}", f"{statistics.median(ratios):.2f}", spread]
            lines.append([model, size, text, f"{_BATCH.value / row.ours[name]:.1f}", *peer])
    return measuring.markdown_table(head, lines)


def _step_table(compared: Mapping[tuple[str, int], _Compared]) -> str:
    """Returns the table of compilation, memory and operations of the train step."""
    head = ["training", "pixels", "compile s", "cached", "first step s", "cached", "loss, %"]
    head += ["PyTorch's", "peak MiB", "PyTorch's", "GFLOP", "GFLOP/s"]
    lines = []
    for (model, size), row in compared.items():
        ours, cold = row.ours, row.cold
        seconds = [cold["compile"], ours["compile"], cold["first"], ours["first"]]
        cells = [f"{x:.1f}" for x in seconds]
        for side in (ours, row.torch):
            cells.append(f"{100 * side['loss'] / side['train']:.2g}" if side else _MISSING)
        for side in (ours, row.torch):
            cells.append(f"{side.get('memory', float('nan')):.0f}" if side else _MISSING)
        flops = [ours["flops"] / 1e9, ours["flops"] / ours["train"] / 1e9]
        lines.append([model, size, *cells, *(f"{x:.3g}" for x in flops)])
    return measuring.markdown_table(head, lines)


def main() -> None:
    """Measures what the flags ask for and prints both tables."""
    from rll_jax.networks import backbones  # not at the top: see `measuring.run_command`

    models = measuring.choices(_MODELS, backbones.BACKBONES)
    sizes = measuring.integers(_SIZES, multiple_of=4)
    measuring.check_outputs(_TABLE)
    compared, load = {}, os.getloadavg()[0]
    for model in models:
        for size in sizes:
            compared[model, size] = row = _compared(model, size)
            ours, peer = (
                f"{_BATCH.value / side['train']:.1f}" if side else _MISSING
                for side in (row.ours, row.torch)
            )
            measuring.tell(f"{model} {size}: {ours} images/s in training, PyTorch {peer}")
    text = (
        f"batch {_BATCH.value}, {_DTYPE.value}, {measuring.machine()}, load before {load:.1f}\n\n"
        f"{_speed_table(compared)}\n\n{_step_table(compared)}\n"
    )
    measuring.print_and_write(text, _TABLE.value)


if __name__ == "__main__":
    measuring.run_command(main)
