"""Time and memory of the retrieval scores, beside their peers.

    python -m experiments.benchmarks.evaluation                        # 3 minutes on 2 cores
    python -m experiments.benchmarks.evaluation --kinds=ours,products  # a minute
    python -m experiments.benchmarks.evaluation --levels               # with three levels too
    python -m experiments.benchmarks.evaluation --million              # with 200,000 items too

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
_LEVEL_NAMES = {
    "level products": "blocks of the full products of three levels",
    "levels": "rll_jax.metrics, all seven combinations of three levels",
}
_HALF_NAMES = {
    "half products": "blocks of the half product",
    "ours": "rll_jax.metrics, items that rank each other",
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
    "Also 200,000 items that rank each other (D = 128), and what a million would take.",
)
_LEVELS = flags.DEFINE_bool(
    "levels", False, "Also all seven combinations of three levels of --dim dimensions."
)
_TABLE = flags.DEFINE_string("table", "", "File to write the table to; empty: none.")

_MEASURED, _PROJECTED = 200_000, 1_000_000  # items of --million
_HALF_BLOCK = 1024
_KS = (1, 10, 100, 1000)
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


def _levels(x: np.ndarray, labels: np.ndarray) -> _Call:
    """All combinations of three levels, which have the embeddings in different orders."""
    from rll_jax import metrics

    levels = {level: x[:, order] for level, order in _orders(x.shape[1])}
    return lambda: metrics.mean_scores(
        metrics.level_scores_by_query(levels, labels, ks=_KS)["L,M,H"], len(x), ks=_KS
    )


def _orders(dim: int) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [(level, rng.permutation(dim)) for level in ("L", "M", "H")]


def _level_products(x: np.ndarray, labels: np.ndarray) -> _Call:
    calls = [_products(x[:, order], labels) for _, order in _orders(x.shape[1])]

    def call() -> None:
        for product in calls:
            product()

    return call


def _half_products(x: np.ndarray, labels: np.ndarray) -> _Call:
    """Each pair of blocks once, as exact scores of items that rank each other need them."""
    import jax
    from jax import lax
    import jax.numpy as jnp

    size = min(_HALF_BLOCK, len(x))
    blocks = len(x) // size
    gallery = jax.device_put(x)

    @jax.jit
    def product(rows: jax.Array, x: jax.Array, stop: jax.Array) -> jax.Array:
        def add(number: jax.Array, kept: jax.Array) -> jax.Array:
            columns = lax.dynamic_slice_in_dim(x, number * size, size)
            tile = jnp.matmul(rows, columns.T, precision=lax.Precision.HIGHEST)
            return kept + lax.optimization_barrier(tile)[0]

        return lax.fori_loop(0, stop, add, jnp.zeros(size))

    def call() -> None:
        for block in range(blocks):
            rows = gallery[block * size : (block + 1) * size]
            product(rows, gallery, np.int32(block + 1)).block_until_ready()

    return call


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
    "level products": _level_products,
    "levels": _levels,
    "half products": _half_products,
}


def measure(kind: str, n: int, classes: int, dim: int, spread: float) -> dict[str, Any]:
    """Measures one kind in this process, compilation included, as a command has it.

    Args:
      kind: a key of `_CALLS`.
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


def _measured(names: Mapping[str, str], size: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {kind: what `measure` returned in the fastest round}, of the kinds installed."""
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(_ROUNDS.value):
        for kind, name in names.items():
            row = measuring.in_own_process(_MODULE, kind=kind, **size)
            if row is None:
                measuring.tell(f"{name}: not installed, not measured")
                continue
            measuring.tell(f"{name}: {row['seconds']:.1f} s  {row['scores'] or ''}")
            rows[kind] = min(row, rows.get(kind, row), key=lambda r: r["seconds"])
    return rows


def _table(rows: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], bare: str) -> str:
    head = ["what", "seconds", "of the products", "of the peer", "extra MiB", "peak MiB"]
    lines = []
    for kind, row in rows.items():
        ratios = [
            f"{row['seconds'] / rows[other]['seconds']:.2f}"
            if other in rows and other != kind
            else ""
            for other in (bare, "peer")
        ]
        memory = ["" if row[name] is None else f"{row[name]:.0f}" for name in ("extra", "peak")]
        lines.append([names[kind], f"{row['seconds']:.1f}", *ratios, *memory])
    return measuring.markdown_table(head, lines)


def _million_text() -> str:
    """Measures --million and returns the table and the sentence about it."""
    size = {"n": _MEASURED, "classes": _MEASURED // 5, "dim": 128, "spread": _SPREAD.value}
    rows = _measured(_HALF_NAMES, size)
    table = _table(rows, _HALF_NAMES, "half products")
    hours = rows["ours"]["seconds"] * (_PROJECTED / _MEASURED) ** 2 / 3600
    return (
        f"\n{_MEASURED:,} x 128 that rank each other\n\n{table}\n\n{_PROJECTED:,} at that rate: "
        f"{hours:.2f} hours.\n"
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
    size = {"n": _N.value, "classes": _CLASSES.value, "dim": _DIM.value, "spread": _SPREAD.value}
    names = {kind: _NAMES[kind] for kind in kinds}
    table = _table(_measured(names, size), names, "products")
    text = (
        f"{_N.value} x {_DIM.value} in {_CLASSES.value} classes on {measuring.machine()}\n\n"
        f"{table}\n"
    )
    if _LEVELS.value:
        levels = _table(_measured(_LEVEL_NAMES, size), _LEVEL_NAMES, "level products")
        text += f"\nthree levels of these sizes\n\n{levels}\n"
    if _MILLION.value:
        text += _million_text()
    measuring.print_and_write(text, _TABLE.value)


if __name__ == "__main__":
    measuring.run_command(main)
