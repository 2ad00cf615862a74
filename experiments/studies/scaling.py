"""The step of training on many chips, on paper: bytes moved, times, and where the loss or the gather becomes the bottleneck.

    python -m experiments.studies.scaling            # the tables of experiments/studies/SCALING.md, which says what is assumed

Plain arithmetic; nothing runs. Seconds, bytes and FLOPs (a multiply-add is two), per chip, nothing overlapped.
"""

from typing import NamedTuple

from absl import app, flags

_DIM = flags.DEFINE_integer("dim", 512, "Embedding dimension of each level.", lower_bound=1)
_LEVELS = flags.DEFINE_integer("levels", 3, "Levels, each with a gather and a loss.", lower_bound=1)
_GFLOP = flags.DEFINE_float(
    "gflop", 23.8, "Forward and backward of the network for an image, 1e9 FLOPs.", lower_bound=0.0
)
_PARAMS = flags.DEFINE_float(
    "params", 36_292_160, "Parameters: the README's ResNet-50 with three heads.", lower_bound=0.0
)
_EFFICIENCY = flags.DEFINE_float(
    "efficiency", 0.4, "Share of the peak that products reach: an assumption.", lower_bound=0.01
)


class Chip(NamedTuple):
    name: str
    bf16: float  # peak FLOP/s, dense
    highest: float  # peak FLOP/s of float32 products with Precision.HIGHEST
    hbm: float  # bytes
    hbm_rate: float  # bytes/s
    link: float  # bytes/s that a chip receives from its group: a slice or a node
    group: int  # chips that share these links
    outside: float  # bytes/s that a chip receives from beyond it


TPU_PASSES = 6  # bfloat16 passes of a HIGHEST product: docstring of jax.lax.Precision
CHIPS = (  # sources in experiments/studies/SCALING.md; links are half of the published bidirectional rates
    Chip("TPU v5e", 197e12, 197e12 / TPU_PASSES, 16e9, 819e9, 400e9 / 2, 256, 6.4e12 / 8 / 256),
    Chip("TPU v5p", 459e12, 459e12 / TPU_PASSES, 95e9, 2765e9, 1200e9 / 2, 6144, 50e9 / 8),
    Chip("H200", 989e12, 67e12, 141e9, 4.8e12, 900e9 / 2, 8, 400e9 / 8),
)
COUNTS, BATCHES = (8, 64, 512, 4096), (1024, 8192, 32_768, 131_072)
FLOAT = 4
BLOCK_PAIRS, LEAST_BLOCK = 1 << 20, 64  # rll_jax/loss/_problem.py
BLOCK_MATRICES, GALLERY_COPIES = (
    {False: 6, True: 7},
    {False: 2, True: 4},
)  # XLA's temporaries on a CPU; by gallery_gradient
PRODUCTS = {False: 2, True: 4}  # N/C x N x D each, rll_jax/loss/_blocks.py; by gallery_gradient
PAIR_TRANSITS, GALLERY_TRANSITS = (
    10,
    6,
)  # assumed: times a pair's float, or a gathered row, passes through HBM
ACTIVATION_BYTES = (
    45e6  # assumed: kept for the gradient of an image in bfloat16, ResNet-50, 224 pixels
)
CPU_MS = {
    512: (1.65, 2.42),
    2048: (25.8, 37.5),
    8192: (470, 643),
}  # README: bare two products, rll_jax; D = 512


def gather_bytes(n, chips, dim, gallery_gradient=False):
    """Received by a chip for one level; the reduce-scatter of the gallery's gradient moves as much again."""
    return (1 + gallery_gradient) * (chips - 1) * (n // chips) * dim * FLOAT


def collective_seconds(chip, chips, received):
    """All-gather or reduce-scatter of `received` bytes: once into each group, then on to each chip of it."""
    group = min(chips, chip.group)
    beyond = received * (chips - group) / max(chips - 1, 1)
    return received / chip.link + beyond / (group * chip.outside)


def reduce_seconds(chip, chips, params):
    """All-reduce: scattered, then gathered again."""
    return 2 * collective_seconds(chip, chips, params * FLOAT * (chips - 1) / chips)


def block_size(n, chips):
    return min(max(LEAST_BLOCK, BLOCK_PAIRS // n), n // chips)


def loss_bytes(n, chips, dim, gallery_gradient=False):
    """Temporary memory of one level's loss on a chip."""
    copies, matrices = GALLERY_COPIES[gallery_gradient], BLOCK_MATRICES[gallery_gradient]
    return FLOAT * n * (copies * dim + matrices * block_size(n, chips))


def loss_seconds(chip, n, chips, dim, efficiency, gallery_gradient=False):
    """One level: products (or reading the gallery for each block, if longer), pairs and gathered rows through HBM."""
    pairs, count = n // chips * n, PRODUCTS[gallery_gradient]
    product = max(
        2 * pairs * dim / (chip.highest * efficiency),
        pairs / block_size(n, chips) * dim * FLOAT / chip.hbm_rate,
    )
    return (
        count * product
        + FLOAT * (PAIR_TRANSITS * pairs + GALLERY_TRANSITS * n * dim) / chip.hbm_rate
    )


def step(chip, n, chips, *, dim, levels, flops, params, efficiency, gallery_gradient=False):
    """Seconds: network, loss, gather, reduce."""
    return {
        "network": n // chips * flops / (chip.bf16 * efficiency),
        "loss": levels * loss_seconds(chip, n, chips, dim, efficiency, gallery_gradient),
        "gather": levels
        * collective_seconds(chip, chips, gather_bytes(n, chips, dim, gallery_gradient)),
        "reduce": reduce_seconds(chip, chips, params),
    }


def share(part, *args, **options):
    seconds = step(*args, **options)
    return seconds[part] / sum(seconds.values())


def first_batch(part, limit, chip, chips, **options):
    """The least batch N = chips * 2^k, up to 2^24, in which `part` takes `limit` of the step or more; None without."""
    sizes = (chips << k for k in range(24) if chips << k <= 1 << 24)
    return next((n for n in sizes if share(part, chip, n, chips, **options) >= limit), None)


def _table(head, rows):
    return "\n".join(
        "| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)
    )


def tables(*, dim=512, levels=3, flops=23.8e9, params=36_292_160, efficiency=0.4):
    """All tables, as Markdown."""
    options = {
        "dim": dim,
        "levels": levels,
        "flops": flops,
        "params": params,
        "efficiency": efficiency,
    }
    cases = [(c, n) for c in COUNTS for n in BATCHES if n >= c]
    mark = lambda chip, n, c: "*" if n / c * ACTIVATION_BYTES > chip.hbm else ""
    parts = [
        f"D = {dim}, {levels} levels, {flops / 1e9:g} GFLOP an image, {params / 1e6:.1f} M parameters, {efficiency:.0%} of the peak."
    ]
    rows = [
        [n, *(f"{levels * gather_bytes(n, c, dim) / 2**20:,.1f}" if n >= c else "" for c in COUNTS)]
        for n in BATCHES
    ]
    parts += [
        "MiB that each chip receives in a step's gathers:",
        _table(["N", *(f"{c} chips" for c in COUNTS)], rows),
    ]
    for chip in CHIPS:
        rows = []
        for c, n in cases:
            s, both = (
                step(chip, n, c, **options),
                step(chip, n, c, gallery_gradient=True, **options),
            )
            total = sum(s.values())
            shares = [f"{100 * s[k] / total:.2g}" for k in ("loss", "gather")] + [
                f"{sum(both.values()) / total:.2f}"
            ]
            rows.append(
                [
                    c,
                    f"{n}{mark(chip, n, c)}",
                    n // c,
                    *(f"{1e3 * x:.3g}" for x in (*s.values(), total)),
                    *shares,
                ]
            )
        head = [
            "chips",
            "N",
            "images a chip",
            "network ms",
            "loss",
            "gather",
            "all-reduce",
            "step ms",
            "loss %",
            "gather %",
        ]
        parts += [f"{chip.name}:", _table([*head, "`gallery_gradient`: x"], rows)]
    rows = []
    for chip in CHIPS:
        for c in COUNTS:
            found = [
                first_batch(k, p, chip, c, **options)
                for k in ("loss", "gather")
                for p in (0.01, 0.1, 0.5)
            ]
            rows.append(
                [chip.name, c, *("-" if n is None else f"{n}{mark(chip, n, c)}" for n in found)]
            )
    head = ["", "chips", "loss 1 %", "10 %", "50 %", "gather 1 %", "10 %", "50 %"]
    parts += [
        "The least N (chips x a power of two, up to 2^24; - is none) from which a part takes so much of the step:",
        _table(head, rows),
    ]
    memory = lambda n, g: f"{loss_bytes(n, 8, dim, g) / 2**20:,.0f}"
    rows = [
        [
            n,
            block_size(n, 8),
            memory(n, False),
            memory(n, True),
            f"{n * n / 8 * FLOAT / 2**20:,.1f}",
        ]
        for n in BATCHES
    ]
    head = ["N", "block", "loss, MiB", "with `gallery_gradient`", "one N/8 x N matrix, MiB"]
    parts += ["Temporary memory of a level's loss on each of 8 chips:", _table(head, rows)]
    rate = lambda n, ms: f"{4 * n * n * 512 / ms / 1e6:.0f}"
    rows = [[n, a, b, rate(n, a), f"{b / a:.2f}"] for n, (a, b) in CPU_MS.items()]
    head = ["N", "two products, ms", "rll_jax, ms", "GFLOP/s of the products", "loss / products"]
    return "\n\n".join(
        [
            *parts,
            "Measured, one device, 2 CPU cores, D = 512 (the README's table):",
            _table(head, rows),
        ]
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    print(
        tables(
            dim=_DIM.value,
            levels=_LEVELS.value,
            flops=_GFLOP.value * 1e9,
            params=_PARAMS.value,
            efficiency=_EFFICIENCY.value,
        )
    )


if __name__ == "__main__":
    app.run(main)
