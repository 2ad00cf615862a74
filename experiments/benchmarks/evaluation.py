"""Time and memory of the retrieval scores, beside their peers.

    python -m experiments.benchmarks.evaluation                        # 3 minutes on 2 cores
    python -m experiments.benchmarks.evaluation --kinds=ours,products  # a minute
    python -m experiments.benchmarks.evaluation --million              # with a million images too

The default size is that of SOP's test set. The peers are pytorch-metric-learning, faiss, and the
bare blocks of the matrix product that exact scores need. `experiments/benchmarks/README.md` says
what is measured and what the columns mean.
"""

from collections.abc import Callable, Mapping
import importlib
import os
from typing import Any

from absl import flags
import numpy as np

from experiments.engine import measuring

_MODULE = "experiments.benchmarks.evaluation"
_NAMES = {
    "products": "blocks of the full product",
    "ours": "rll_jax.metrics",
    "faiss": "faiss IndexFlatIP, k = 1000",
    "peer": "pytorch-metric-learning AccuracyCalculator",
}
_N = flags.DEFINE_integer("n", 60_502, "Number of embeddings.", lower_bound=2)
_CLASSES = flags.DEFINE_integer(
    "classes", 11_316, "Number of classes, all of about one size.", lower_bound=1
)
_DIM = flags.DEFINE_integer("dim", 512, "Embedding dimension D.", lower_bound=1)
_SPREAD = flags.DEFINE_float(
    "spread",
    2.2,
    "Length of the noise against the class's centre; 2.2: Recall@1 of 76 % at D = 512.",
)
_KINDS = flags.DEFINE_list("kinds", list(_NAMES), f"What to measure: {', '.join(_NAMES)}.")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 1, "Processes for each measurement; the best is shown.", lower_bound=1
)
_MILLION = flags.DEFINE_bool(
    "million",
    False,
    "Also 4,096 queries against a million items (D = 128), and what a million queries would take.",
)
_TABLE = flags.DEFINE_string("table", "", "File to write the table to; empty: none.")

_QUERIES = 4096  # of --million
_SCORES = ("recall@1", "recall@1000", "map@r", "precision_at_1", "mean_average_precision_at_r")

_Call = Callable[[], Mapping[str, Any] | None]  # returns scores, where it computes any


def _data(n: int, classes: int, dim: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (n, dim) float32 embeddings of unit length and their labels, in random order."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(n) % classes
    x = rng.standard_normal((classes, dim), dtype=np.float32)[labels]
    x += spread * rng.standard_normal((n, dim), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True), labels


def _ours(x: np.ndarray, labels: np.ndarray) -> _Call:
    """Returns the call to measure, as do those below."""
    from rll_jax import metrics

    return lambda: metrics.retrieval_metrics(x, labels)


def _million(x: np.ndarray, labels: np.ndarray) -> _Call:
    from rll_jax import metrics

    queries, gallery = slice(None, _QUERIES), slice(_QUERIES, None)
    return lambda: metrics.retrieval_metrics(
        x[queries], labels[queries], x[gallery], labels[gallery]
    )


def _products(x: np.ndarray, labels: np.ndarray) -> _Call:
    import jax
    from jax import lax
    import jax.numpy as jnp

    product = jax.jit(lambda rows, x: jnp.matmul(rows, x.T, precision=lax.Precision.HIGHEST))
    gallery = jax.device_put(x)

    def call() -> None:
        for first in range(0, len(x), 1024):
            product(gallery[first : first + 1024], gallery).block_until_ready()

    return call


def _faiss(x: np.ndarray, labels: np.ndarray) -> _Call:
    import faiss  # pyright: ignore[reportMissingImports] a peer that need not be installed

    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))

    def call() -> None:
        index = faiss.IndexFlatIP(x.shape[1])
        index.add(x)
        index.search(x, 1000)

    return call


def _peer(x: np.ndarray, labels: np.ndarray) -> _Call:
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator  # pyright: ignore[reportMissingImports] (optional)
    import torch  # pyright: ignore[reportMissingImports] (optional)

    importlib.import_module("faiss")  # without it the calculator fails with a NameError
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    include = ("precision_at_1", "mean_average_precision_at_r", "r_precision")
    # k: as many neighbours as the largest class has images; its default, all of them, would need
    # 27 GiB
    calculator = AccuracyCalculator(include=include, k="max_bin_count", device=torch.device("cpu"))
    rows, classes = torch.from_numpy(x), torch.from_numpy(labels)
    return lambda: calculator.get_accuracy(rows, classes)


_CALLS = {
    "ours": _ours,
    "products": _products,
    "faiss": _faiss,
    "peer": _peer,
    "million": _million,
}


def measure(kind: str, n: int, classes: int, dim: int, spread: float) -> dict[str, Any]:
    """Measures one kind in this process, compilation included, as a command has it.

    Args:
      kind: "ours", "products", "faiss", "peer" or "million".
      n: number of embeddings.
      classes: number of classes.
      dim: embedding dimension.
      spread: length of the noise against the class's centre.

    Returns:
      "seconds"; MiB "extra" and "peak", None without /proc; "scores": {name: score}.
    """
    call = _CALLS[kind](*_data(n, classes, dim, spread))
    before = measuring.memory_mib()
    results = []
    seconds = measuring.seconds_of(lambda: results.append(call()))
    peak = measuring.memory_mib("VmHWM")
    scores = results[0] or {}
    return {
        "seconds": seconds,
        "extra": None if before is None or peak is None else peak - before,
        "peak": peak,
        "scores": {name: round(float(scores[name]), 6) for name in _SCORES if name in scores},
    }


def _measured(kinds: list[str]) -> dict[str, dict[str, Any]]:
    """Returns {kind: what `measure` returned in the fastest round}, of the kinds installed."""
    size = {"n": _N.value, "classes": _CLASSES.value, "dim": _DIM.value, "spread": _SPREAD.value}
    rows = {}
    for _ in range(_ROUNDS.value):
        for kind in kinds:
            row = measuring.in_own_process(_MODULE, kind=kind, **size)
            if row is None:
                measuring.tell(f"{_NAMES[kind]}: not installed, not measured")
                continue
            measuring.tell(f"{_NAMES[kind]}: {row['seconds']:.1f} s  {row['scores'] or ''}")
            rows[kind] = min(row, rows.get(kind, row), key=lambda r: r["seconds"])
    return rows


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["what", "seconds", "of the products", "of the peer", "extra MiB", "peak MiB"]
    lines = []
    for kind, row in rows.items():
        ratios = [
            f"{row['seconds'] / rows[other]['seconds']:.2f}"
            if other in rows and other != kind
            else ""
            for other in ("products", "peer")
        ]
        memory = ["" if row[name] is None else f"{row[name]:.0f}" for name in ("extra", "peak")]
        lines.append([_NAMES[kind], f"{row['seconds']:.1f}", *ratios, *memory])
    return measuring.markdown_table(head, lines)


def _million_text() -> str:
    """Measures --million and returns the sentence about it."""
    row = measuring.in_own_process(
        _MODULE,
        kind="million",
        n=1_000_000 + _QUERIES,
        classes=200_000,
        dim=128,
        spread=_SPREAD.value,
    )
    if row is None:
        return "\n4,096 queries against a million items: a package is missing, not measured.\n"
    peak = "" if row["peak"] is None else f", {row['peak']:.0f} MiB at most"
    hours = row["seconds"] * 1_000_000 / _QUERIES / 3600
    return (
        f"\n4,096 queries against a million items, D = 128: {row['seconds']:.1f} s{peak}; a "
        f"million queries at that rate: {hours:.1f} hours, and less where they rank each other, "
        "each product serving both.\n"
    )


def main() -> None:
    """Measures what the flags ask for and prints the table."""
    kinds = measuring.choices(_KINDS, _NAMES)
    if _CLASSES.value >= _N.value and {"ours", "peer"} & set(kinds):
        raise ValueError(
            f"--classes={_CLASSES.value}: no class has two of the {_N.value} embeddings of --n, "
            "expected fewer classes"
        )
    measuring.check_outputs(_TABLE)
    table = _table(_measured(kinds))
    text = (
        f"{_N.value} x {_DIM.value} in {_CLASSES.value} classes on {measuring.machine()}\n\n"
        f"{table}\n"
    )
    if _MILLION.value:
        text += _million_text()
    measuring.print_and_write(text, _TABLE.value)


if __name__ == "__main__":
    measuring.run_command(main)
