"""Time and memory of the loss, forward and backward, next to pytorch-metric-learning and to the bare two matrix products.

    python -m experiments.benchmarks.loss                                  # N = 64 to 8192 with D = 512, 65,536 with D = 128
    python -m experiments.benchmarks.loss --sizes=180,2048 --nolarge       # half a minute
    python -m experiments.benchmarks.loss --out=bench.png --table=bench.md

Every measurement runs in a process of its own, those of one size in turn and in `--rounds` rounds, so that a busy moment hits all
alike. Time: after compilation and warm-up; `best` is the least, `median` the median of the rounds' medians. Memory: the most that the
process held while computing, over what it held with data and compiled program in place (Linux: VmHWM, reset before the first call).
"""

import json
import os
import statistics
import sys
import time

from absl import app, flags

from experiments.engine import measuring

_SIZES = flags.DEFINE_list(
    "sizes", ["64", "180", "512", "2048", "8192"], "Batch sizes N, for D = --dim."
)
_DIM = flags.DEFINE_integer("dim", 512, "Embedding dimension.", lower_bound=1)
_LARGE = flags.DEFINE_bool("large", True, "Also N = 65,536 with D = 128, ours alone.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Processes for each measurement.", lower_bound=1)
_SECONDS = flags.DEFINE_float(
    "seconds", 2.0, "Time to measure in each process; at least one call.", lower_bound=0.0
)
_OUT = flags.DEFINE_string("out", "", "PNG to write; none when empty.")
_TABLE = flags.DEFINE_string("table", "", "File to write the table to, too.")
_WORKER = flags.DEFINE_enum(
    "worker", None, ["ours", "peer", "products"], "Internal: measure this, print JSON."
)
_N = flags.DEFINE_integer("n", 180, "Internal: the worker's batch size.", lower_bound=1)

_NAMES = {"products": "two products", "ours": "rll_jax", "peer": "pytorch-metric-learning"}


def _data(n, dim):
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.standard_normal((n, dim), dtype=np.float32), np.arange(n) // 3


def _ours(n, dim):
    import jax

    from rll_jax import loss

    args = jax.device_put(_data(n, dim))
    start = time.perf_counter()
    compiled = jax.jit(jax.value_and_grad(loss.ranked_list_loss)).lower(*args).compile()
    return (lambda: jax.block_until_ready(compiled(*args))), time.perf_counter() - start


def _products(n, dim):
    import jax
    from jax import lax
    import jax.numpy as jnp

    x = jax.device_put(_data(n, dim)[0])
    c = jnp.ones((n, n), jnp.float32)

    def both(x, c):
        highest = {"precision": lax.Precision.HIGHEST}
        return jnp.matmul(x, x.T, **highest), jnp.matmul(c, x, **highest)

    start = time.perf_counter()
    compiled = jax.jit(both).lower(x, c).compile()
    return (lambda: jax.block_until_ready(compiled(x, c))), time.perf_counter() - start


def _peer(n, dim):
    import warnings

    from pytorch_metric_learning.losses import RankedListLoss
    import torch

    warnings.simplefilter("ignore")  # it warns of the paper's T_n
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    of = RankedListLoss(margin=0.4, Tn=10.0, imbalance=0.5, alpha=1.2, Tp=0.0)

    def step(x, labels):
        x.grad = None
        of(x, labels).backward()

    def tensors(n):
        x, labels = _data(n, dim)
        return torch.tensor(x, requires_grad=True), torch.as_tensor(labels)

    start = time.perf_counter()
    step(*tensors(8))  # loads what torch loads late
    args = tensors(n)
    return (lambda: step(*args)), time.perf_counter() - start


def _measure(kind, n, dim, seconds):
    call, compile_seconds = {"ours": _ours, "products": _products, "peer": _peer}[kind](n, dim)
    before = measuring.memory_mib()
    if before is not None:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
            clear.write("5")  # VmHWM starts again from here
    times, end = [], None
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    if first < seconds:
        for _ in range(2):
            call()
    else:
        times.append(first)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and not (times and first >= seconds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    extra = None if before is None else measuring.memory_mib("VmHWM") - before
    return {
        "median": statistics.median(times),
        "best": min(times),
        "compile": compile_seconds,
        "extra": extra,
        "peak": measuring.memory_mib("VmHWM"),
    }


def _run(kind, n, dim):
    flags_of_worker = (
        f"--worker={kind}",
        f"--n={n}",
        f"--dim={dim}",
        f"--seconds={_SECONDS.value}",
    )
    return measuring.in_own_process("experiments.benchmarks.loss", *flags_of_worker)


def _rows():
    """One dict for each size and kind."""
    work = [(int(n), _DIM.value, ("products", "ours", "peer")) for n in _SIZES.value]
    if _LARGE.value:
        work.append((65_536, 128, ("ours",)))
    for n, dim, kinds in work:
        rounds = {kind: [] for kind in kinds}
        for _ in range(_ROUNDS.value if n <= 8192 else 1):
            for kind in kinds:
                rounds[kind].append(_run(kind, n, dim))
        for kind in kinds:
            found = [r for r in rounds[kind] if r is not None]
            if not found:
                continue
            row = {
                "n": n,
                "dim": dim,
                "kind": kind,
                "best": min(r["best"] for r in found),
                "compile": found[0]["compile"],
            }
            row["median"] = statistics.median(r["median"] for r in found)
            for name in ("extra", "peak"):
                row[name] = (
                    None if found[0][name] is None else statistics.median(r[name] for r in found)
                )
            yield row


def _table(rows):
    by = {(r["n"], r["kind"]): r for r in rows}
    lines = [
        "| N | D | what | best ms | median ms | of the products | of the peer | extra MiB | peak MiB | compile s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:

        def ratio(kind):
            other = by.get((r["n"], kind))
            return "" if other is None or kind == r["kind"] else f"{r['best'] / other['best']:.2f}"

        memory = ["" if r[name] is None else f"{r[name]:.0f}" for name in ("extra", "peak")]
        cells = [
            r["n"],
            r["dim"],
            _NAMES[r["kind"]],
            f"{r['best'] * 1e3:.2f}",
            f"{r['median'] * 1e3:.2f}",
        ]
        cells += [ratio("products"), ratio("peer"), *memory, f"{r['compile']:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _picture(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for kind, color in (("peer", "tab:red"), ("ours", "tab:blue"), ("products", "tab:gray")):
        mine = [r for r in rows if r["kind"] == kind and r["dim"] == _DIM.value]
        sizes = [r["n"] for r in mine]
        left.loglog(sizes, [r["best"] * 1e3 for r in mine], "o-", color=color, label=_NAMES[kind])
        if kind != "products":
            right.loglog(
                sizes,
                [max(r["extra"] or 0, 0.1) for r in mine],
                "o-",
                color=color,
                label=_NAMES[kind],
            )
    left.set_ylabel("forward and backward, best, ms")
    right.set_ylabel("extra memory, MiB")
    for axes in (left, right):
        axes.set_xlabel(f"batch size N (D = {_DIM.value})")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    if _WORKER.value:
        print(json.dumps(_measure(_WORKER.value, _N.value, _DIM.value, _SECONDS.value)))
        return
    rows = []
    for row in _rows():
        rows.append(row)
        print(
            f"N={row['n']} {_NAMES[row['kind']]}: {row['best'] * 1e3:.2f} ms",
            file=sys.stderr,
            flush=True,
        )
    table, head = _table(rows), measuring.machine()
    print(f"{head}\n\n{table}")
    if not any(r["kind"] == "peer" for r in rows):
        print("\npytorch-metric-learning is not installed: not measured.")
    if _TABLE.value:
        with open(_TABLE.value, "w", encoding="utf-8") as out:
            out.write(f"{head}\n\n{table}\n")
    if _OUT.value:
        _picture(rows, _OUT.value)


if __name__ == "__main__":
    app.run(main)
