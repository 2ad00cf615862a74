"""What the page of recipes says is what happens, in each library that is installed."""

import importlib.util
import re

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from rll_jax import loss
from tests.helpers.paths import ROOT
from tests.helpers.snippets import blocks_of, check_block

PAGE = (ROOT / "rll_jax/loss/RECIPES.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE))


@pytest.mark.parametrize("title", SECTIONS)
def test_a_recipe_prints_what_it_says(title):
    (block,) = blocks_of(SECTIONS[title])
    for library in sorted(set(re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE))):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    assert "print(" in block
    check_block(block)


def test_the_list_at_the_top_leads_to_every_recipe():
    anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in SECTIONS]
    top = PAGE.split("\n## ")[0]
    assert re.findall(r"\]\(#([\w-]+)\)", top) == anchors
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) == set(anchors)


@pytest.mark.parametrize(
    "function, check_vma, kind",
    [
        (loss.caffe2019, True, AxisType.Auto),
        (loss.caffe2019, False, AxisType.Explicit),
        (loss.contrastive_loss, True, AxisType.Explicit),
        (loss.contrastive_loss, False, AxisType.Auto),
    ],
)
def test_the_gradient_outside_shard_map_is_that_of_one_device(function, check_vma, kind):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: JAX_NUM_CPU_DEVICES=8")
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"kernel": jax.random.normal(keys[0], (16, 8)) / 4, "bias": jnp.full(8, 0.1)}
    images, labels = jax.random.normal(keys[1], (96, 16)), jnp.arange(96) // 5

    def batch_loss(params, images, labels, axis_name=None):
        rows = images @ params["kernel"] + params["bias"]
        return function(rows, labels, axis_name=axis_name)

    def mean_over_devices(*batch):
        return lax.pmean(batch_loss(*batch, axis_name="data"), "data")

    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,), devices=jax.devices()[:8])
    on_devices = jax.shard_map(
        mean_over_devices,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    value, gradient = jax.jit(jax.value_and_grad(batch_loss))(params, images, labels)
    rows = jax.device_put((images, labels), NamedSharding(mesh, P("data")))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    actual = jax.jit(jax.value_and_grad(on_devices))(params, *rows)
    np.testing.assert_allclose(actual[0], value, rtol=1e-6)
    for name, expected in gradient.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual[1][name], expected, rtol=0, atol=1e-6 * scale)
