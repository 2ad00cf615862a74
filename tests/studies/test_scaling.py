"""The arithmetic of SCALING.md against its text, the measured times and what XLA compiles."""

import functools
import itertools
import re
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from experiments.studies import scaling
from rll_jax import loss
from tests.helpers.commands import refused
from tests.helpers.paths import ROOT

N, DIM, CHIPS = 16_384, 512, 8
OPTIONS = {"dim": 512, "levels": 3, "flops": 23.8e9, "params": 36_292_160, "efficiency": 0.4}


class Program(NamedTuple):
    lowered: str
    compiled: str
    temporary: int


@functools.cache
def program(gallery_gradient, gather="all"):
    def step(x, labels):
        def batch_loss(x):
            return loss.ranked_list_loss(
                x,
                labels,
                axis_name="batch",
                gallery_gradient=gallery_gradient,
                gather=gather,
            )

        value, gradient = jax.value_and_grad(batch_loss)(x)
        return lax.pmean(value, "batch"), gradient

    rows = P("batch")
    mesh = Mesh(np.array(jax.devices()[:CHIPS]), ("batch",))
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(rows, rows), out_specs=(P(), rows)))
    lowered = mapped.lower(
        jax.ShapeDtypeStruct((N, DIM), jnp.float32), jax.ShapeDtypeStruct((N,), jnp.int32)
    )
    compiled = lowered.compile()
    return Program(
        lowered.as_text(), compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes
    )


def floats(text, operation):
    """Sizes of the results of all float32 collectives of this name, joined by XLA or not."""
    results = re.findall(rf"= (.*?) {operation}(?:-start)?\(", text)
    return [
        np.prod([int(x) for x in shape.split(",")])
        for r in results
        for shape in re.findall(r"f32\[([\d,]+)\]", r)
    ]


@pytest.mark.parametrize("gallery_gradient", [False, True])
def test_bytes_and_products_are_those_of_the_compiled_loss(gallery_gradient):
    texts = program(gallery_gradient)
    received = sum(floats(texts.compiled, "all-gather")) * 4 * (CHIPS - 1) // CHIPS
    assert received == scaling.gather_bytes(N, CHIPS, DIM)
    scattered = sum(floats(texts.compiled, "reduce-scatter")) * 4 * (CHIPS - 1)
    assert received + scattered == scaling.gather_bytes(N, CHIPS, DIM, gallery_gradient)
    products = re.findall(r"dot_general.*HIGHEST.*: \(tensor<(\d+)x", texts.lowered)
    many_rows = [rows for rows in products if rows != "1"]  # 1: the mean of the gallery
    assert len(many_rows) == scaling.PRODUCTS[gallery_gradient]


@pytest.mark.parametrize("gallery_gradient", [False, True])
def test_memory_is_about_what_xla_takes(gallery_gradient):
    expected = scaling.loss_bytes(N, CHIPS, DIM, gallery_gradient)
    if jax.__version_info__ < (0, 11) and not gallery_gradient:
        expected -= 4 * N * DIM  # that XLA keeps a copy of the gallery less
    assert program(gallery_gradient).temporary == pytest.approx(expected, rel=0.1)


def test_the_ring_takes_the_bytes_and_the_memory_of_the_page():
    ring = program(False, "ring")
    received = sum(floats(ring.compiled, "collective-permute")) * 4 * CHIPS
    assert received == scaling.gather_bytes(N, CHIPS, DIM, gather="ring")
    assert not floats(ring.compiled, "all-gather")
    expected = scaling.loss_bytes(N, CHIPS, DIM, gather="ring")
    if jax.__version_info__ < (0, 11):
        expected -= 4 * N // CHIPS * DIM  # that XLA keeps a copy of the shard less
    assert ring.temporary == pytest.approx(expected, rel=0.1)
    assert scaling.loss_bytes(N, 2, DIM) > scaling.loss_bytes(N, 2, DIM, gather="ring")


def test_page_holds_the_output():
    text = (ROOT / "experiments/studies/SCALING.md").read_text()
    assert text.split("## Tables\n\n")[1] == scaling.tables() + "\n"
    assert len(text.split("## Tables")[0].splitlines()) <= 40


def test_measured_times_are_those_of_the_loss_benchmark():
    pages = (ROOT / "experiments/benchmarks/README.md", ROOT / "README.md")
    text = next(page for page in pages if page.exists()).read_text()
    row = r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| [\d.]+ \| \d+ / \d+ \|$"
    rows = re.findall(row, text, re.M)
    times = {int(n): (float(two), float(ours)) for n, two, ours in rows}
    assert all(times[n] == measured for n, measured in scaling.CPU_MS.items())


@pytest.mark.parametrize("chip", scaling.CHIPS, ids=lambda chip: chip.name)
def test_more_images_take_longer_and_more_chips_receive_more(chip):
    for c in scaling.COUNTS:
        steps = [scaling.step(chip, n, c, **OPTIONS) for n in scaling.BATCHES if n >= c]
        for less, more in itertools.pairwise(steps):
            assert all(less[k] < more[k] for k in ("network", "loss", "gather"))
            assert less["reduce"] == more["reduce"]
    steps = [scaling.step(chip, 131_072, c, **OPTIONS) for c in scaling.COUNTS]
    for fewer, many in itertools.pairwise(steps):
        assert many["network"] < fewer["network"] and many["loss"] < fewer["loss"]
        assert many["gather"] > fewer["gather"] and many["reduce"] > fewer["reduce"]
    assert scaling.step(chip, 4096, 1, **OPTIONS)["gather"] == 0
    shares = [scaling.share("loss", chip, n, 8, **OPTIONS) for n in (8192, 32_768, 131_072)]
    assert shares == sorted(shares)


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--chip=1", "Unknown command line flag 'chip'"),
        ("--efficiency=0", "--efficiency=0"),
        ("8", "unexpected argument '8'"),
    ],
)
def test_a_mistake_takes_one_line(argument, words):
    refused(words, argument, name="studies.scaling")
