"""Time and memory of the loss, forward and backward, beside its peers.

    python -m experiments.benchmarks.loss                             # N = 64 to 65,536
    python -m experiments.benchmarks.loss --sizes=180,2048 --nolarge  # half a minute
    python -m experiments.benchmarks.loss --out=bench.png --table=bench.md

The peers are the same loss in plain JAX, pytorch-metric-learning, and the two bare matrix products
that an exact loss needs. `clustered` is our loss of a batch in eight tight clusters of all classes,
in which every pair of a cluster is computed from its difference.
`experiments/benchmarks/README.md` says what is measured and what the columns mean.
"""

from collections.abc import Callable, Iterator, Sequence
import os
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from experiments.engine import measuring

if TYPE_CHECKING:
    import jax
    import numpy as np

_SIZES = flags.DEFINE_list(
    "sizes", ["64", "180", "512", "2048", "8192"], "Batch sizes N, measured with D = --dim."
)
_DIM = flags.DEFINE_integer("dim", 512, "Embedding dimension D.", lower_bound=1)
_LARGE = flags.DEFINE_bool("large", True, "Measure N = 65,536 with D = 128 too, rll_jax alone.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Processes for each measurement.", lower_bound=1)
_SECONDS = flags.DEFINE_float(
    "seconds", 2.0, "Time to measure in each process; at least one call.", lower_bound=0.0
)
_OUT = flags.DEFINE_string("out", "", "PNG file to plot into; empty: none.")
_TABLE = flags.DEFINE_string("table", "", "File to write the table to; empty: none.")

_NAMES = {
    "products": "two products",
    "ours": "rll_jax",
    "clustered": "rll_jax, clustered batch",
    "dense": "plain JAX",
    "peer": "pytorch-metric-learning",
}
_MANY = 8192  # larger batches are measured in one round

_Call = Callable[[], object]


class _Row(NamedTuple):
    """One line of the table. Times are in seconds, memory is in MiB or None."""

    n: int
    dim: int
    kind: str
    best: float
    median: float
    compile: float
    extra: float | None
    peak: float | None


def _data(n: int, dim: int) -> "tuple[np.ndarray, np.ndarray]":
    """Returns (n, dim) float32 embeddings and labels with three rows in a class."""
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.standard_normal((n, dim), dtype=np.float32), np.arange(n) // 3


def _compiled(
    loss: "Callable[..., jax.Array]", data: "tuple[np.ndarray, np.ndarray]"
) -> tuple[_Call, float]:
    """Returns the call to measure and the seconds of its compilation, as do those below."""
    import jax

    args = jax.device_put(data)
    start = time.perf_counter()
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
    return (lambda: jax.block_until_ready(compiled(*args))), time.perf_counter() - start


def _ours(n: int, dim: int) -> tuple[_Call, float]:
    from rll_jax import loss

    return _compiled(loss.ranked_list_loss, _data(n, dim))


def _clustered(n: int, dim: int) -> tuple[_Call, float]:
    import numpy as np

    from rll_jax import loss

    noise, labels = _data(n, dim)
    centres, _ = _data(8, dim)
    return _compiled(loss.ranked_list_loss, (centres[np.arange(n) % 8] + 1e-3 * noise, labels))


def _dense(n: int, dim: int) -> tuple[_Call, float]:
    return _compiled(_plain_loss, _data(n, dim))


def _plain_loss(x: "jax.Array", labels: "jax.Array") -> "jax.Array":
    """Computes the CVPR 2019 loss as one writes it in JAX: all pairs at once, by autodiff.

    Near pairs lose their digits, and no exponent is kept from overflowing.
    """
    from jax import lax
    import jax.numpy as jnp

    x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    gallery = lax.stop_gradient(x)
    squared = jnp.sum(x * x, 1)[:, None] + jnp.sum(gallery * gallery, 1)[None, :]
    squared = squared - 2 * jnp.matmul(x, gallery.T, precision=lax.Precision.HIGHEST)
    apart = squared > 1e-12
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)
    same = labels[:, None] == labels[None, :]
    positive = same & ~jnp.eye(x.shape[0], dtype=bool) & (distance > 0.8)
    negative = ~same & (distance < 1.2)
    weight = jnp.where(negative, jnp.exp(10 * (1.2 - lax.stop_gradient(distance))), 0)
    pulled = jnp.sum(jnp.where(positive, distance - 0.8, 0), 1)
    pushed = jnp.sum(weight * jnp.where(negative, 1.2 - distance, 0), 1)
    pulled = pulled / jnp.maximum(jnp.sum(positive, 1), 1)
    pushed = pushed / jnp.where(jnp.any(negative, 1), jnp.sum(weight, 1), 1)
    return jnp.mean(pulled / 2 + pushed / 2)


def _products(n: int, dim: int) -> tuple[_Call, float]:
    import jax
    from jax import lax
    import jax.numpy as jnp

    x = jax.device_put(_data(n, dim)[0])
    coefficients = jnp.ones((n, n), jnp.float32)

    def both(x: jax.Array, coefficients: jax.Array) -> tuple[jax.Array, jax.Array]:
        highest = lax.Precision.HIGHEST
        forward = jnp.matmul(x, x.T, precision=highest)
        return forward, jnp.matmul(coefficients, x, precision=highest)

    start = time.perf_counter()
    compiled = jax.jit(both).lower(x, coefficients).compile()
    seconds = time.perf_counter() - start
    return (lambda: jax.block_until_ready(compiled(x, coefficients))), seconds


def _peer(n: int, dim: int) -> tuple[_Call, float]:
    import warnings

    from pytorch_metric_learning.losses import RankedListLoss  # pyright: ignore[reportMissingImports] (optional)
    import torch  # pyright: ignore[reportMissingImports] (optional)

    warnings.simplefilter("ignore")  # it warns of the paper's T_n
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peer_loss = RankedListLoss(margin=0.4, Tn=10, imbalance=0.5, alpha=1.2, Tp=0)

    def step(x: torch.Tensor, labels: torch.Tensor) -> None:
        x.grad = None
        peer_loss(x, labels).backward()

    def tensors(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, labels = _data(n, dim)
        return torch.tensor(x, requires_grad=True), torch.as_tensor(labels)

    start = time.perf_counter()
    step(*tensors(8))  # loads what torch loads late
    args = tensors(n)
    return (lambda: step(*args)), time.perf_counter() - start


_CALLS = {
    "ours": _ours,
    "clustered": _clustered,
    "dense": _dense,
    "products": _products,
    "peer": _peer,
}


def measure(kind: str, n: int, dim: int, seconds: float) -> dict[str, float | None]:
    """Measures one kind and one size in this process.

    Args:
      kind: a key of `_CALLS`.
      n: batch size.
      dim: embedding dimension.
      seconds: how long to go on; at least one call.

    Returns:
      Seconds "median", "best" and "compile"; MiB "extra" and "peak", None without /proc.
    """
    call, compile_seconds = _CALLS[kind](n, dim)
    before = measuring.memory_mib()
    measuring.restart_peak_memory()
    times = _call_times(call, seconds)
    peak = measuring.memory_mib("VmHWM")
    return {
        "median": statistics.median(times),
        "best": min(times),
        "compile": compile_seconds,
        "extra": None if before is None or peak is None else peak - before,
        "peak": peak,
    }


def _call_times(call: _Call, seconds: float) -> list[float]:
    """Returns the seconds of each call. The first counts only if it takes all of the time."""
    first = measuring.seconds_of(call)
    if first >= seconds:
        return [first]
    for _ in range(2):
        call()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(measuring.seconds_of(call))
    return times


def _rows(sizes: Sequence[int]) -> Iterator[_Row]:
    """Yields the rows of each size: one process for each kind in turn, in rounds."""
    work = [(n, _DIM.value, tuple(_NAMES)) for n in sizes]
    if _LARGE.value:
        work += [(65_536, 128, ("ours",))]
    for n, dim, kinds in work:
        measured = {kind: [] for kind in kinds}
        for _ in range(_ROUNDS.value if n <= _MANY else 1):
            for kind in kinds:
                result = measuring.in_own_process(
                    "experiments.benchmarks.loss", kind=kind, n=n, dim=dim, seconds=_SECONDS.value
                )
                if result is not None:
                    measured[kind].append(result)
        for kind, results in measured.items():
            if results:
                yield _summary(n, dim, kind, results)


def _summary(n: int, dim: int, kind: str, results: Sequence[dict[str, Any]]) -> _Row:
    """Returns the row of one kind's rounds."""
    extra, peak = (
        None if results[0][name] is None else statistics.median(r[name] for r in results)
        for name in ("extra", "peak")
    )
    return _Row(
        n,
        dim,
        kind,
        best=min(r["best"] for r in results),
        median=statistics.median(r["median"] for r in results),
        compile=results[0]["compile"],
        extra=extra,
        peak=peak,
    )


def _table(rows: Sequence[_Row]) -> str:
    head = ["N", "D", "what", "best ms", "median ms", "of the products", "of plain JAX"]
    head += ["of the peer", "extra MiB", "peak MiB", "compile s"]
    best = {(row.n, row.kind): row.best for row in rows}
    lines = []
    for row in rows:
        ratios = [
            f"{row.best / best[row.n, kind]:.2f}"
            if kind != row.kind and (row.n, kind) in best
            else ""
            for kind in ("products", "dense", "peer")
        ]
        memory = ["" if mib is None else f"{mib:.0f}" for mib in (row.extra, row.peak)]
        times = [f"{row.best * 1e3:.2f}", f"{row.median * 1e3:.2f}"]
        name = _NAMES[row.kind]
        lines.append([row.n, row.dim, name, *times, *ratios, *memory, f"{row.compile:.1f}"])
    return measuring.markdown_table(head, lines)


def _plot(rows: Sequence[_Row], path: str) -> None:
    """Plots times and extra memory against the batch size, both on logarithmic scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    colors = {"peer": "tab:red", "dense": "tab:orange", "ours": "tab:blue", "products": "tab:gray"}
    for kind, color in colors.items():
        points = [row for row in rows if row.kind == kind and row.dim == _DIM.value]
        sizes = [row.n for row in points]
        times = [row.best * 1e3 for row in points]
        left.loglog(sizes, times, "o-", color=color, label=_NAMES[kind])
        if kind != "products":
            memory = [max(row.extra or 0, 0.1) for row in points]
            right.loglog(sizes, memory, "o-", color=color, label=_NAMES[kind])
    left.set_ylabel("forward and backward, best, ms")
    right.set_ylabel("extra memory, MiB")
    for axes in (left, right):
        axes.set_xlabel(f"batch size N (D = {_DIM.value})")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures what the flags ask for and prints the table."""
    sizes = measuring.integers(_SIZES)
    measuring.check_outputs(_TABLE, _OUT)
    rows = []
    for row in _rows(sizes):
        rows.append(row)
        measuring.tell(f"N={row.n} {_NAMES[row.kind]}: {row.best * 1e3:.2f} ms")
    measuring.print_and_write(f"{measuring.machine()}\n\n{_table(rows)}\n", _TABLE.value)
    if not any(row.kind == "peer" for row in rows):
        print("\npytorch-metric-learning is not installed: not measured.")
    if _OUT.value:
        _plot(rows, _OUT.value)


if __name__ == "__main__":
    measuring.run_command(main)
