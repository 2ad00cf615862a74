"""Time and memory of the retrieval scores, next to pytorch-metric-learning, faiss and the bare blocks of products.

    python -m experiments.benchmarks.evaluation                                  # the size of SOP's test set: about 3 minutes on 2 cores
    python -m experiments.benchmarks.evaluation --kinds=ours,products            # a minute
    python -m experiments.benchmarks.evaluation --million                        # also a projection for a million images

Every measurement runs in a process of its own, in `--rounds` rounds, compilation included, as an evaluation has it. Memory is the
most that the process held, over what it held with the embeddings and the libraries in place.
"""

import json
import os
import sys
import time

from absl import app, flags
import numpy as np

from experiments.engine import measuring

_NAMES = {
    "products": "blocks of the full product", "ours": "rll_jax.metrics", "faiss": "faiss IndexFlatIP, k = 1000",
    "peer": "pytorch-metric-learning AccuracyCalculator",
}  # fmt: skip
_N = flags.DEFINE_integer("n", 60_502, "Embeddings.", lower_bound=2)
_CLASSES = flags.DEFINE_integer("classes", 11_316, "Classes, all of about one size.", lower_bound=1)
_DIM = flags.DEFINE_integer("dim", 512, "Embedding dimension.", lower_bound=1)
_SPREAD = flags.DEFINE_float(
    "spread",
    2.2,
    "Length of the noise against the class's centre; 2.2: Recall@1 of 76 % at D = 512.",
)
_KINDS = flags.DEFINE_list("kinds", list(_NAMES), "What to measure.")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 1, "Processes for each measurement; the best is shown.", lower_bound=1
)
_MILLION = flags.DEFINE_bool(
    "million",
    False,
    "Also 4,096 queries against a million items (D = 128), and what all would take.",
)
_TABLE = flags.DEFINE_string("table", "", "File to write the table to, too.")
_WORKER = flags.DEFINE_enum(
    "worker", None, [*_NAMES, "million"], "Internal: measure this, print JSON."
)


def _data(n, classes, dim):
    rng = np.random.default_rng(0)
    labels = rng.permutation(n) % classes
    x = rng.standard_normal((classes, dim), dtype=np.float32)[labels]
    x += _SPREAD.value * rng.standard_normal((n, dim), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True), labels


def _ours(x, labels):
    from rll_jax import metrics

    return lambda: metrics.retrieval_metrics(x, labels)


def _million(x, labels):
    from rll_jax import metrics

    return lambda: metrics.retrieval_metrics(x[:4096], labels[:4096], x[4096:], labels[4096:])


def _products(x, labels):
    import jax
    from jax import lax
    import jax.numpy as jnp

    product = jax.jit(lambda rows, x: jnp.matmul(rows, x.T, precision=lax.Precision.HIGHEST))
    whole = jax.device_put(x)

    def call():
        for first in range(0, len(x), 1024):
            product(whole[first : first + 1024], whole).block_until_ready()

    return call


def _faiss(x, labels):
    import faiss

    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))

    def call():
        index = faiss.IndexFlatIP(x.shape[1])
        index.add(x)
        index.search(x, 1000)

    return call


def _peer(x, labels):
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    include = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
    # k: as many neighbours as the largest class has images; its default, all of them, would need 27 GiB
    calculator = AccuracyCalculator(include=include, k="max_bin_count", device=torch.device("cpu"))
    x, labels = torch.from_numpy(x), torch.from_numpy(labels)
    return lambda: calculator.get_accuracy(x, labels)


def _measure(kind):
    size = (
        (1_004_096, 200_000, 128) if kind == "million" else (_N.value, _CLASSES.value, _DIM.value)
    )
    make = {
        "ours": _ours,
        "products": _products,
        "faiss": _faiss,
        "peer": _peer,
        "million": _million,
    }[kind]
    call = make(*_data(*size))
    before = measuring.memory_mib()
    start = time.perf_counter()
    scores = call()
    seconds = time.perf_counter() - start
    peak = measuring.memory_mib("VmHWM")
    keep = ("recall@1", "recall@1000", "map@r", "precision_at_1", "mean_average_precision_at_r")
    scores = {name: round(float(scores[name]), 6) for name in keep if scores and name in scores}
    return {"seconds": seconds, "extra": before and peak - before, "peak": peak, "scores": scores}


def _table(rows):
    lines = [
        "| what | seconds | of the products | of the peer | extra MiB | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for kind, row in rows.items():
        ratios = [
            f"{row['seconds'] / rows[k]['seconds']:.2f}" if k in rows and k != kind else ""
            for k in ("products", "peer")
        ]
        memory = ["" if row[name] is None else f"{row[name]:.0f}" for name in ("extra", "peak")]
        lines.append(
            "| " + " | ".join([_NAMES[kind], f"{row['seconds']:.1f}", *ratios, *memory]) + " |"
        )
    return "\n".join(lines)


def main(argv):
    if len(argv) > 1 or not set(_KINDS.value) <= _NAMES.keys():
        raise app.UsageError(f"--kinds takes {', '.join(_NAMES)}; there are no other arguments")
    if _WORKER.value:
        print(json.dumps(_measure(_WORKER.value)))
        return
    own = [f"--{flag.name}={flag.value}" for flag in (_N, _CLASSES, _DIM, _SPREAD)]
    rows = {}
    for _ in range(_ROUNDS.value):
        for kind in _KINDS.value:
            row = measuring.in_own_process(
                "experiments.benchmarks.evaluation", f"--worker={kind}", *own
            )
            if row is None:
                print(f"{_NAMES[kind]}: not installed, not measured", file=sys.stderr, flush=True)
                continue
            print(
                f"{_NAMES[kind]}: {row['seconds']:.1f} s  {row['scores'] or ''}",
                file=sys.stderr,
                flush=True,
            )
            rows[kind] = min(row, rows.get(kind, row), key=lambda r: r["seconds"])
    text = f"{_N.value} x {_DIM.value} in {_CLASSES.value} classes on {measuring.machine()}\n\n{_table(rows)}\n"
    if _MILLION.value:
        row = measuring.in_own_process("experiments.benchmarks.evaluation", "--worker=million")
        hours = row["seconds"] * 1_000_000 / 4096 / 3600
        text += (
            f"\n4,096 queries against a million items, D = 128: {row['seconds']:.1f} s, {row['peak']:.0f} MiB at most; a million "
            f"queries at that rate: {hours:.1f} hours, and less where they rank each other, each product serving both.\n"
        )
    print(text, end="")
    if _TABLE.value:
        with open(_TABLE.value, "w", encoding="utf-8") as out:
            out.write(text)


if __name__ == "__main__":
    app.run(main)
