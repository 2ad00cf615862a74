"""Estimates one training step on many chips: bytes moved, times, and which part is the bottleneck.

    python -m experiments.studies.scaling

prints the tables of experiments/studies/SCALING.md, which states the assumptions. This is
arithmetic on published rates; nothing is run. Times are in seconds, sizes in bytes, rates per
second and per chip, and a multiply-add counts as two FLOPs. The times of a step's parts are added
up: nothing overlaps.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict, Unpack

from absl import app, flags

from experiments.engine import command, measuring


class Chip(NamedTuple):
    """A chip, its memory and its links.

    Attributes:
      name: the chip's name in the tables.
      bf16: peak FLOP/s of dense bfloat16 products.
      highest: peak FLOP/s of float32 products with `Precision.HIGHEST`.
      hbm: bytes of memory.
      hbm_rate: bytes/s between the chip and its memory.
      link: bytes/s that a chip receives from its group, which is a slice or a node.
      group: chips that share these links.
      outside: bytes/s that a chip receives from beyond its group.
    """

    name: str
    bf16: float
    highest: float
    hbm: float
    hbm_rate: float
    link: float
    group: int
    outside: float


class Options(TypedDict):
    """The network and its training.

    Attributes:
      dim: embedding dimension of each level.
      levels: levels, each with a gather and a loss.
      flops: FLOPs of the network for one image, forward and backward.
      params: parameters of the network.
      efficiency: share of the peak FLOP/s that matrix products reach.
    """

    dim: int
    levels: int
    flops: float
    params: float
    efficiency: float


Part = Literal["network", "loss", "gather", "reduce"]
Gather = Literal["all", "ring"]

TPU_PASSES = 6  # bfloat16 passes of a HIGHEST product: docstring of jax.lax.Precision
# The sources are in experiments/studies/SCALING.md. Links are half of the published
# bidirectional rates.
CHIPS = (
    Chip("TPU v5e", 197e12, 197e12 / TPU_PASSES, 16e9, 819e9, 400e9 / 2, 256, 6.4e12 / 8 / 256),
    Chip("TPU v5p", 459e12, 459e12 / TPU_PASSES, 95e9, 2765e9, 1200e9 / 2, 6144, 50e9 / 8),
    Chip("H200", 989e12, 67e12, 141e9, 4.8e12, 900e9 / 2, 8, 400e9 / 8),
)
GATHERS: tuple[Gather, Gather] = ("all", "ring")
COUNTS = (8, 64, 512, 4096)  # chips
BATCHES = (1024, 8192, 32_768, 131_072)  # images
FLOAT = 4  # bytes
BLOCK_PAIRS = 1 << 20  # rll_jax/loss/_problem.py
LEAST_BLOCK = 64  # rll_jax/loss/_problem.py
# Temporaries of XLA on a CPU: matrices of a block; copies of the gallery, by gallery_gradient.
BLOCK_MATRICES = 11
GALLERY_COPIES = {False: 3, True: 4}
# The same of a ring: matrices of a block, copies of a shard of the gallery.
RING_MATRICES = 2
RING_COPIES = {False: 8, True: 10}
# Products of N/C x N x D each, by gallery_gradient: rll_jax/loss/_blocks.py
PRODUCTS = {False: 2, True: 3}
PAIR_TRANSITS = 10  # assumed: times that one float of a pair passes through memory
GALLERY_TRANSITS = 6  # assumed: times that one float of a gathered row passes through memory
# Assumed: what is kept of one image for the gradient, bfloat16, ResNet-50, 224 pixels.
ACTIVATION_BYTES = 45e6
# Measured by experiments.benchmarks.loss with D = 512, for each N: milliseconds of the bare two
# products, milliseconds of rll_jax.
CPU_MS = {512: (1.65, 2.42), 2048: (25.8, 37.5), 8192: (470, 643)}


def gather_bytes(
    n: int, chips: int, dim: int, gallery_gradient: bool = False, gather: Gather = "all"
) -> int:
    """Returns the bytes that one chip receives for one level.

    Args:
      n: images of the whole batch.
      chips: chips that share the batch.
      dim: embedding dimension.
      gallery_gradient: adds the reduce-scatter of the gallery's gradient, which moves as many
        bytes as the gather.
      gather: "ring": the shards go round once for the lists and once for the gradient, and the
        gallery's gradient goes with them once. The last step of a round leads home.
    """
    if gather == "ring":
        return (2 + gallery_gradient) * chips * (n // chips) * dim * FLOAT
    return (1 + gallery_gradient) * (chips - 1) * (n // chips) * dim * FLOAT


def collective_seconds(chip: Chip, chips: int, received: float) -> float:
    """Returns the time of an all-gather or a reduce-scatter.

    Data from beyond a group enter it once and are then passed on to each of its chips.

    Args:
      chip: the kind of chip.
      chips: chips that take part.
      received: bytes that each chip receives.
    """
    group = min(chips, chip.group)
    beyond = received * (chips - group) / max(chips - 1, 1)
    return received / chip.link + beyond / (group * chip.outside)


def reduce_seconds(chip: Chip, chips: int, params: float) -> float:
    """Returns the time of an all-reduce of the gradients: a reduce-scatter, then an all-gather."""
    return 2 * collective_seconds(chip, chips, params * FLOAT * (chips - 1) / chips)


def block_size(n: int, chips: int, gather: Gather = "all") -> int:
    """Returns the number of queries in one block of the loss on one chip."""
    gallery = n if gather == "all" else n // chips
    return min(max(LEAST_BLOCK, BLOCK_PAIRS // gallery), n // chips)


def loss_bytes(
    n: int, chips: int, dim: int, gallery_gradient: bool = False, gather: Gather = "all"
) -> int:
    """Returns the temporary memory of one level's loss on one chip."""
    if gather == "ring":
        floats = RING_COPIES[gallery_gradient] * dim + RING_MATRICES * block_size(n, chips, gather)
        return FLOAT * (n // chips) * floats
    copies, matrices = GALLERY_COPIES[gallery_gradient], BLOCK_MATRICES
    return FLOAT * n * (copies * dim + matrices * block_size(n, chips))


def loss_seconds(
    chip: Chip, n: int, chips: int, dim: int, efficiency: float, gallery_gradient: bool = False
) -> float:
    """Returns the time of one level's loss on one chip, without its gather.

    A product takes the time of its FLOPs, or that of reading the gallery once for each block if
    that is longer. The pairs and the gathered rows pass through memory as often as
    `PAIR_TRANSITS` and `GALLERY_TRANSITS` say.
    """
    pairs = n // chips * n
    product = max(
        2 * pairs * dim / (chip.highest * efficiency),
        pairs / block_size(n, chips) * dim * FLOAT / chip.hbm_rate,
    )
    through_memory = FLOAT * (PAIR_TRANSITS * pairs + GALLERY_TRANSITS * n * dim) / chip.hbm_rate
    return PRODUCTS[gallery_gradient] * product + through_memory


def step(
    chip: Chip,
    n: int,
    chips: int,
    *,
    gallery_gradient: bool = False,
    **options: Unpack[Options],
) -> dict[Part, float]:
    """Returns the seconds of a step's network, loss, gather and all-reduce, without overlap."""
    dim, levels, efficiency = options["dim"], options["levels"], options["efficiency"]
    received = gather_bytes(n, chips, dim, gallery_gradient)
    return {
        "network": n // chips * options["flops"] / (chip.bf16 * efficiency),
        "loss": levels * loss_seconds(chip, n, chips, dim, efficiency, gallery_gradient),
        "gather": levels * collective_seconds(chip, chips, received),
        "reduce": reduce_seconds(chip, chips, options["params"]),
    }


def share(part: Part, chip: Chip, n: int, chips: int, **options: Unpack[Options]) -> float:
    """Returns the share, from 0 to 1, of a step that one part takes."""
    seconds = step(chip, n, chips, **options)
    return seconds[part] / sum(seconds.values())


def first_batch(
    part: Part, limit: float, chip: Chip, chips: int, **options: Unpack[Options]
) -> int | None:
    """Returns the smallest batch in which a part takes a share of `limit` or more of the step.

    The batches tried are N = chips * 2^k up to 2^24. None: the share is smaller in all of them.
    """
    sizes = (chips << k for k in range(24) if chips << k <= 1 << 24)
    return next((n for n in sizes if share(part, chip, n, chips, **options) >= limit), None)


def _marked(n: int, chip: Chip, chips: int) -> str:
    """Returns the batch, with a star where a chip's images do not fit in its memory."""
    return f"{n}*" if n / chips * ACTIVATION_BYTES > chip.hbm else str(n)


def _gather_table(options: Options) -> str:
    def mebibytes(n: int, chips: int) -> str:
        received = options["levels"] * gather_bytes(n, chips, options["dim"])
        return f"{received / 2**20:,.1f}" if n >= chips else ""

    rows = [[n, *(mebibytes(n, chips) for chips in COUNTS)] for n in BATCHES]
    return measuring.markdown_table(["N", *(f"{chips} chips" for chips in COUNTS)], rows)


def _step_table(chip: Chip, options: Options) -> str:
    rows = []
    for chips in COUNTS:
        for n in BATCHES:
            if n < chips:
                continue
            seconds = step(chip, n, chips, **options)
            total = sum(seconds.values())
            both = sum(step(chip, n, chips, gallery_gradient=True, **options).values())
            row = [chips, _marked(n, chip, chips), n // chips]
            row += [f"{1e3 * x:.3g}" for x in (*seconds.values(), total)]
            row += [
                f"{100 * seconds['loss'] / total:.2g}",
                f"{100 * seconds['gather'] / total:.2g}",
            ]
            rows.append([*row, f"{both / total:.2f}"])
    head = ["chips", "N", "images per chip", "network ms", "loss", "gather", "all-reduce"]
    head += ["step ms", "loss %", "gather %", "step with `gallery_gradient` / step"]
    return measuring.markdown_table(head, rows)


def _threshold_table(options: Options) -> str:
    parts: tuple[Part, Part] = ("loss", "gather")
    limits = (0.01, 0.1, 0.5)
    rows = []
    for chip in CHIPS:
        for chips in COUNTS:
            row = [chip.name, chips]
            for part in parts:
                for limit in limits:
                    n = first_batch(part, limit, chip, chips, **options)
                    row.append("-" if n is None else _marked(n, chip, chips))
            rows.append(row)
    head = ["", "chips", "loss 1 %", "10 %", "50 %", "gather 1 %", "10 %", "50 %"]
    return measuring.markdown_table(head, rows)


def _memory_table(dim: int, chips: int) -> str:
    rows = []
    for n in BATCHES:
        row = [n, block_size(n, chips)]
        row += [f"{loss_bytes(n, chips, dim, both) / 2**20:,.0f}" for both in (False, True)]
        rows.append([*row, f"{n * n / chips * FLOAT / 2**20:,.1f}"])
    head = ["N", "block", "loss, MiB", "with `gallery_gradient`", f"one N/{chips} x N matrix, MiB"]
    return measuring.markdown_table(head, rows)


def _ring_table(dim: int) -> str:
    rows = []
    for chips in (2, *COUNTS):
        for n in (131_072, 1_048_576):
            row = [f"{chips:,}", f"{n:,}"]
            for gather in GATHERS:
                memory = loss_bytes(n, chips, dim, gather=gather)
                received = gather_bytes(n, chips, dim, gather=gather)
                row += [f"{size / 2**20:,.0f}" for size in (memory, received)]
            rows.append(row)
    head = ["chips", "N", "whole: memory", "received", "ring: memory", "received"]
    return measuring.markdown_table(head, rows)


def first_batch_of_memory(
    limit: float, chip: Chip, chips: int, dim: int, gather: Gather
) -> int | None:
    """Returns the smallest batch whose loss takes a share of `limit` or more of a chip's memory.

    The batches tried are N = chips * 2^k up to 2^30. None: the share is smaller in all of them.
    """
    sizes = (chips << k for k in range(30) if chips << k <= 1 << 30)
    fits = limit * chip.hbm
    return next((n for n in sizes if loss_bytes(n, chips, dim, gather=gather) >= fits), None)


def _ring_threshold_table(dim: int) -> str:
    rows = []
    for chip in CHIPS:
        for chips in COUNTS:
            found = [first_batch_of_memory(0.1, chip, chips, dim, gather) for gather in GATHERS]
            rows.append([chip.name, chips, *("-" if n is None else f"{n:,}" for n in found)])
    return measuring.markdown_table(["", "chips", "whole", "ring"], rows)


def _measured_table(dim: int) -> str:
    rows = []
    for n, (products, ours) in CPU_MS.items():
        rate = 4 * n * n * dim / products / 1e6
        rows.append([n, products, ours, f"{rate:.0f}", f"{ours / products:.2f}"])
    head = ["N", "two products, ms", "rll_jax, ms", "GFLOP/s of the products", "loss / products"]
    return measuring.markdown_table(head, rows)


def tables(
    *,
    dim: int = 512,
    levels: int = 3,
    flops: float = 23.8e9,
    params: float = 36_292_160,
    efficiency: float = 0.4,
) -> str:
    """Returns all tables as Markdown. The arguments are those of `Options`."""
    options = Options(dim=dim, levels=levels, flops=flops, params=params, efficiency=efficiency)
    parts = [
        f"D = {dim}, {levels} levels, {flops / 1e9:g} GFLOP per image, "
        f"{params / 1e6:.1f} M parameters, {efficiency:.0%} of the peak rate.",
        "MiB that each chip receives in the gathers of one step:",
        _gather_table(options),
    ]
    for chip in CHIPS:
        parts += [f"{chip.name}:", _step_table(chip, options)]
    parts += [
        "The smallest N (chips x a power of two, up to 2^24) at which a part takes this share of "
        "the step or more; - means none:",
        _threshold_table(options),
        "Temporary memory of one level's loss on each of 8 chips:",
        _memory_table(dim, chips=8),
        "The whole gallery on each chip beside a ring, one level: temporary memory of the loss and "
        "what a chip receives, MiB:",
        _ring_table(dim),
        "The smallest N (chips x a power of two) at which one level's loss takes a tenth of a "
        "chip's memory or more:",
        _ring_threshold_table(dim),
        "Measured by `experiments.benchmarks.loss` on one device, 2 CPU cores, D = 512:",
        _measured_table(512),
    ]
    return "\n\n".join(parts)


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_integer(
        "dim", 512, "The embedding dimension of each level.", lower_bound=1, flag_values=flag_values
    )
    flags.DEFINE_integer(
        "levels",
        3,
        "The number of levels, each with a gather and a loss.",
        lower_bound=1,
        flag_values=flag_values,
    )
    flags.DEFINE_float(
        "gflop",
        23.8,
        "The work of a forward and backward pass for one image, in 1e9 operations.",
        lower_bound=0.0,
        flag_values=flag_values,
    )
    flags.DEFINE_float(
        "params",
        36_292_160,
        "The number of parameters. The default is a ResNet-50 with three heads.",
        lower_bound=0.0,
        flag_values=flag_values,
    )
    flags.DEFINE_float(
        "efficiency",
        0.4,
        "The share of the peak rate that matrix products are assumed to reach.",
        lower_bound=0.01,
        flag_values=flag_values,
    )


def main(_: Sequence[str]) -> None:
    """Prints the tables for the values of the flags."""
    options = flags.FLAGS
    with command.user_errors():
        print(
            tables(
                dim=options.dim,
                levels=options.levels,
                flops=options.gflop * 1e9,
                params=options.params,
                efficiency=options.efficiency,
            )
        )


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=command.parse_flags)
