"""Images a second of the networks, embedding and training, next to the same networks in PyTorch on the same machine.

    python -m experiments.benchmarks.model                                       # ResNet-18 and 50, 96 and 128 pixels: 8 minutes on 2 busy cores
    python -m experiments.benchmarks.model --models=resnet18 --sizes=96          # a minute
    python -m experiments.benchmarks.model --models=resnet50 --sizes=224 --batch=256 --dtype=bfloat16     # on a GPU

forward: `embed_step`. train step: forward, backward and SGD with momentum, as a run does it on one device, with level H and
`ranked_list_loss`. Ours takes uint8 pixels and normalises them inside, and also returns the gradient's norm; PyTorch gets float32
pixels already normalised, in the faster of its two layouts, and a fused optimiser; eager unless --torch_compile. Both compute the
same loss (CVPR 2019, PyTorch's written plainly) so that it is the networks that differ; its share of the step ("loss, %") is that of
the loss alone, forward and backward, on random embeddings in the same process. Data stay on the device: no decoding, no transfer.

Every measurement runs in a process of its own, in turn and in `--rounds` rounds, so that a busy moment hits all alike; the best call
of all is shown. Our first round compiles into an empty persistent cache, the others find it full: their best is "cached". The first
step is timed from the start of the process, JAX's import and initial weights included. Memory is the most that the process held while
training, libraries included and compilation not (on a GPU: the device's). FLOPs: XLA's count before optimisation, once a loop.

Two things to know on CPUs. Other programs slow PyTorch, whose threads wait for each other, far more than XLA: a ratio from a busy
machine says nothing, and the load before the start is printed. And XLA takes some hundred times too long for a 3x3 convolution of 2x2
maps (jax 0.10.2), which the last stage of a ResNet-18 has at 64 pixels.
"""

import functools
import json
import os
import sys
import tempfile
import time

from absl import app, flags

from experiments.engine import measuring

_START = time.perf_counter()  # JAX and all that is slow to import come later
_MODELS = flags.DEFINE_list(
    "models", ["resnet18", "resnet50"], "Networks, of rll_jax.networks.backbones.BACKBONES."
)
_SIZES = flags.DEFINE_list("sizes", ["96", "128"], "Sides of the images, pixels, multiples of 4.")
_BATCH = flags.DEFINE_integer("batch", 16, "Images a batch, 4 of each class.", lower_bound=8)
_DIM = flags.DEFINE_integer("dim", 512, "Embedding dimension.", lower_bound=1)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of the convolutions; PyTorch's by autocast."
)
_COMPILE = flags.DEFINE_bool("torch_compile", False, "Let PyTorch compile its network.")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 2, "Processes for each measurement; the first of ours fills the cache.", lower_bound=2
)
_SECONDS = flags.DEFINE_float(
    "seconds",
    1.0,
    "Time to measure each thing in each process; at least one call.",
    lower_bound=0.0,
)
_TABLE = flags.DEFINE_string("table", "", "File to write the tables to, too.")
_KINDS = ("ours", "torch", "torch_channels_last")
_WORKER = flags.DEFINE_enum("worker", None, _KINDS, "Internal: measure this, print JSON.")
_PLATFORM = flags.DEFINE_string("platform", "cpu", "Internal: JAX's, for PyTorch to use the same.")
_CACHE = flags.DEFINE_string("cache", "", "Internal: JAX's persistent compilation cache.")


def _data(size):
    """Blocks of colour: random networks tell such images apart, unlike noise, whose embeddings would all be one."""
    import numpy as np

    blocks = np.random.default_rng(0).integers(0, 256, (_BATCH.value, 4, 4, 3), np.uint8)
    return blocks.repeat(size // 4, axis=1).repeat(size // 4, axis=2), np.arange(_BATCH.value) // 4


def _ours(model, images, labels):
    import jax

    from experiments.engine import build
    from experiments.engine import config as config_lib
    from rll_jax import loss
    from rll_jax.training import devices
    from rll_jax.training import steps as steps_lib

    jax.config.update("jax_compilation_cache_dir", _CACHE.value)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # small networks too
    config = config_lib.Config(
        backbone=model,
        embedding_dim=_DIM.value,
        image_size=images.shape[1],
        dtype=_DTYPE.value,
        optimizer="sgd",
        learning_rate=1e-3,
        schedule="step",
        weight_decay=1e-4,
    )
    device = jax.local_devices()[0]
    runner = devices.make_runner(config.parallel, [device])
    state = build.make_state(config, runner)
    batch, images = runner.shard({"image": images, "label": labels}), runner.shard_local(images)
    start = time.perf_counter()
    lowered = runner.train(
        functools.partial(steps_lib.train_step, loss=loss.ranked_list_loss)
    ).lower(state, batch)
    compiled = lowered.compile()
    facts = {"compile": time.perf_counter() - start}
    state, _ = jax.block_until_ready(compiled(state, batch))
    facts |= {
        "first": time.perf_counter() - _START,
        "platform": device.platform,
        "flops": lowered.cost_analysis()["flops"],
    }
    embed = runner.embed(steps_lib.embed_step)
    loss_alone = jax.jit(jax.value_and_grad(loss.ranked_list_loss))
    embedding = jax.random.normal(jax.random.key(0), (_BATCH.value, _DIM.value))
    labels = jax.device_put(labels)

    def step():
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, batch))

    memory = (
        (lambda: device.memory_stats()["peak_bytes_in_use"] / 2**20)
        if device.memory_stats()
        else None
    )
    calls = {
        "train": step,
        "forward": lambda: jax.block_until_ready(embed(state, images)),
        "loss": lambda: jax.block_until_ready(loss_alone(embedding, labels)),
    }
    return calls, memory, facts


def _torch(model, images, labels, channels_last):
    from experiments.benchmarks import model_torch
    from rll_jax.networks import backbones

    settings = (_DIM.value, _DTYPE.value, _PLATFORM.value, channels_last, _COMPILE.value)
    return *model_torch.calls(backbones.BACKBONES[model], images, labels, *settings), {}


def _measure(kind, model, size):
    layout = {} if kind == "ours" else {"channels_last": kind == "torch_channels_last"}
    calls, device_memory, facts = (_torch if layout else _ours)(model, *_data(size), **layout)
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        if time.perf_counter() - start < _SECONDS.value:
            call()  # where calls are short, the second still warms up
        if name == "train" and measuring.memory_mib() is not None:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
                clear.write("5")  # VmHWM starts again from here
        facts[name], end = float("inf"), time.perf_counter() + _SECONDS.value
        while facts[name] == float("inf") or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            facts[name] = min(facts[name], time.perf_counter() - start)
        if name == "train":
            facts["memory"] = device_memory() if device_memory else measuring.memory_mib("VmHWM")
    return facts


def _measured(model, size):
    """{"ours": the least of each thing, "torch": likewise of both layouts or None, "cold": our first process}."""
    same = [f"--{flag.name}={flag.value}" for flag in (_BATCH, _DIM, _DTYPE, _COMPILE, _SECONDS)]
    found = {kind: [] for kind in _KINDS}
    twin = "resnet" in model  # PyTorch's side has ResNets alone
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(_ROUNDS.value):
            for kind in _KINDS if twin else _KINDS[:1]:
                platform = found["ours"][0]["platform"] if found["ours"] else ""
                command = (
                    f"--worker={kind}",
                    f"--models={model}",
                    f"--sizes={size}",
                    f"--cache={cache}",
                    f"--platform={platform}",
                )
                row = measuring.in_own_process("experiments.benchmarks.model", *command, *same)
                found[kind] += [row] if row else []
    (cold, *_), theirs = found["ours"], found["torch"] + found["torch_channels_last"]
    best = lambda rows: {
        k: min(row[k] for row in rows if row[k] is not None)
        for k in rows[0]
        if rows[0][k] is not None
    }
    return {
        "ours": best(found["ours"]),
        "cold": cold,
        "torch": best(theirs) if theirs else None,
        "none": "not installed" if twin else "-",
    }


def _tables(found):
    speed = [
        "| model | pixels | images/s | rll_jax | PyTorch | rll_jax / PyTorch |",
        "|---|---|---|---|---|---|",
    ]
    head = [
        "training",
        "pixels",
        "compile s",
        "cached",
        "first step s",
        "cached",
        "loss, %",
        "PyTorch's",
        "peak MiB",
        "PyTorch's",
    ]
    head += ["GFLOP", "GFLOP/s"]
    steps = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (model, size), row in found.items():
        ours, theirs, cold, none = row["ours"], row["torch"], row["cold"], row["none"]
        for name, what in (("forward", "forward"), ("train", "train step")):
            peer = (
                [f"{_BATCH.value / theirs[name]:.1f}", f"{theirs[name] / ours[name]:.2f}"]
                if theirs
                else [none, ""]
            )
            speed.append(
                f"| {model} | {size} | {what} | {_BATCH.value / ours[name]:.1f} | {' | '.join(peer)} |"
            )
        cells = [
            f"{x:.1f}" for x in (cold["compile"], ours["compile"], cold["first"], ours["first"])
        ]
        cells += [
            f"{100 * side['loss'] / side['train']:.2g}" if side else none for side in (ours, theirs)
        ]
        cells += [
            f"{side.get('memory', float('nan')):.0f}" if side else none for side in (ours, theirs)
        ]
        cells += [f"{ours['flops'] / 1e9:.3g}", f"{ours['flops'] / ours['train'] / 1e9:.3g}"]
        steps.append(f"| {model} | {size} | {' | '.join(cells)} |")
    return "\n".join(speed) + "\n\n" + "\n".join(steps)


def main(argv):
    from rll_jax.networks import backbones

    if len(argv) > 1 or not set(_MODELS.value) <= backbones.BACKBONES.keys():
        raise app.UsageError(
            f"--models takes {', '.join(backbones.BACKBONES)}; there are no other arguments"
        )
    if not all(size.isdigit() and int(size) % 4 == 0 and int(size) for size in _SIZES.value):
        raise app.UsageError(f"--sizes takes multiples of 4, got {','.join(_SIZES.value)}")
    if _WORKER.value:
        print(json.dumps(_measure(_WORKER.value, _MODELS.value[0], int(_SIZES.value[0]))))
        return
    found, load = {}, os.getloadavg()[0]
    for model in _MODELS.value:
        for size in _SIZES.value:
            found[model, size] = row = _measured(model, size)
            rates = [
                f"{_BATCH.value / row[side]['train']:.1f}" if row[side] else row["none"]
                for side in ("ours", "torch")
            ]
            print(
                f"{model} {size}: {rates[0]} images/s in training, PyTorch {rates[1]}",
                file=sys.stderr,
                flush=True,
            )
    text = f"batch {_BATCH.value}, {_DTYPE.value}, {measuring.machine()}, load before {load:.1f}\n\n{_tables(found)}\n"
    print(text, end="")
    if _TABLE.value:
        with open(_TABLE.value, "w", encoding="utf-8") as out:
            out.write(text)


if __name__ == "__main__":
    app.run(main)
