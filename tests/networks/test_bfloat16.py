"""Networks of bfloat16 with the CPU's own products, which a process has from its start or not."""

import os
import subprocess
import sys

import pytest

from experiments.engine import startup
from rll_jax._jaxlib_fault import FLAG, PRODUCTS
from tests.helpers.paths import ROOT

# Trains one step in both dtypes, and prints how many products have matrices of bfloat16.
PROCESS = r"""
import re
import sys
import jax
import jax.numpy as jnp
import numpy as np
from rll_jax import loss
from rll_jax.networks import backbones, embedding_net
from tests.helpers.networks import random_variables

rng = np.random.default_rng(0)
images, labels = rng.integers(0, 255, (8, 64, 64, 3), np.uint8), np.arange(8) // 2

def gradient_of(dtype):
    model = embedding_net.EmbeddingNet(backbones.BACKBONES[sys.argv[1]], 16, dtype=dtype)
    variables = random_variables(model, scale=0.1)
    def of_batch(params):
        found = model.apply(
            variables | {"params": params}, images, train=True, mutable=["batch_stats"]
        )[0]
        return loss.ranked_list_loss(found["H"], labels)
    step = jax.jit(jax.grad(of_batch)).lower(variables["params"]).compile()
    flat = [np.ravel(leaf) for leaf in jax.tree.leaves(step(variables["params"]))]
    bodies = re.findall(r"^%\S+ \(.*\) -> .*\{\n(?:  .*\n)+\}", step.as_text(), re.MULTILINE)
    products = [body for body in bodies if " dot(" in body and body.count("= bf16") >= 2]
    return np.concatenate(flat), len(products)

(wide, _), (narrow, products) = map(gradient_of, (jnp.float32, jnp.bfloat16))
cosine = wide @ narrow / np.linalg.norm(wide) / np.linalg.norm(narrow)
print(cosine, products)
"""


@pytest.mark.skipif(
    not startup._multiplies_bfloat16() or startup.jaxlib_version() < startup._PRODUCTS_FROM,
    reason="the CPU has no products of bfloat16, or this jaxlib does not use them",
)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_test", "vit_test"])
def test_a_network_is_trained_with_the_products_of_the_cpu(name):
    ended = subprocess.run(
        [sys.executable, "-c", PROCESS, name], cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": FLAG + PRODUCTS, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    cosine, products = ended.stdout.split()
    assert float(cosine) > 0.9 and int(products) > 10
