"""The arithmetic of experiments/studies/SCALING.md against its text, the README and what XLA compiles."""

import functools
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
from tests.helpers.paths import ROOT

N, DIM, CHIPS = 16_384, 512, 8
OPTIONS = {"dim": 512, "levels": 3, "flops": 23.8e9, "params": 36_292_160, "efficiency": 0.4}


class Program(NamedTuple):
    lowered: str
    compiled: str
    temporary: int


@functools.cache
def program(gallery_gradient):
    def step(x, labels):
        of = lambda x: loss.ranked_list_loss(
            x, labels, axis_name="batch", gallery_gradient=gallery_gradient
        )
        value, gradient = jax.value_and_grad(of)(x)
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
    """Sizes of the results of all float32 collectives of this name, also when XLA joins some into one."""
    results = re.findall(rf"= (.*?) {operation}(?:-start)?\(", text)
    return [
        np.prod([int(x) for x in shape.split(",")])
        for r in results
        for shape in re.findall(r"f32\[([\d,]+)\]", r)
    ]


@pytest.mark.parametrize("gallery_gradient", [False, True])
def test_bytes_and_products_are_those_of_the_compiled_loss(gallery_gradient):
    found = program(gallery_gradient)
    received = sum(floats(found.compiled, "all-gather")) * 4 * (CHIPS - 1) // CHIPS
    assert received == scaling.gather_bytes(N, CHIPS, DIM)
    scattered = sum(floats(found.compiled, "reduce-scatter")) * 4 * (CHIPS - 1)
    assert received + scattered == scaling.gather_bytes(N, CHIPS, DIM, gallery_gradient)
    products = re.findall(r"dot_general.*HIGHEST.*: \(tensor<(\d+)x", found.lowered)
    assert (
        len([rows for rows in products if rows != "1"]) == scaling.PRODUCTS[gallery_gradient]
    )  # 1: the mean of the gallery


@pytest.mark.parametrize("gallery_gradient", [False, True])
def test_memory_is_about_what_xla_takes(gallery_gradient):
    expected = scaling.loss_bytes(N, CHIPS, DIM, gallery_gradient)
    assert program(gallery_gradient).temporary == pytest.approx(expected, rel=0.1)


def test_page_holds_the_output():
    text = (ROOT / "experiments/studies/SCALING.md").read_text()
    assert text.split("## Tables\n\n")[1] == scaling.tables() + "\n"
    assert len(text.split("## Tables")[0].splitlines()) <= 40


def test_measured_times_are_the_readmes():
    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| [\d.]+ \| \d+ / \d+ \|$",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    times = {int(n): (float(two), float(ours)) for n, two, ours in rows}
    assert all(times[n] == measured for n, measured in scaling.CPU_MS.items())


@pytest.mark.parametrize("chip", scaling.CHIPS, ids=lambda chip: chip.name)
def test_more_images_take_longer_and_more_chips_receive_more(chip):
    for c in scaling.COUNTS:
        steps = [scaling.step(chip, n, c, **OPTIONS) for n in scaling.BATCHES if n >= c]
        for less, more in zip(steps, steps[1:]):
            assert (
                all(less[k] < more[k] for k in ("network", "loss", "gather"))
                and less["reduce"] == more["reduce"]
            )
    steps = [scaling.step(chip, 131_072, c, **OPTIONS) for c in scaling.COUNTS]
    for fewer, many in zip(steps, steps[1:]):
        assert many["network"] < fewer["network"] and many["loss"] < fewer["loss"]
        assert many["gather"] > fewer["gather"] and many["reduce"] > fewer["reduce"]
    assert scaling.step(chip, 4096, 1, **OPTIONS)["gather"] == 0
    shares = [scaling.share("loss", chip, n, 8, **OPTIONS) for n in (8192, 32_768, 131_072)]
    assert shares == sorted(shares)
