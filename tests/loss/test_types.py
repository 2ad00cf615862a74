"""What a type checker tells a user of the library: nothing of correct code, and each mistake."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

CORRECT = """
from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np

import rll_jax
from rll_jax import loss, metrics
from rll_jax.loss import baselines
from rll_jax.typing import Loss

embeddings, labels = jnp.ones((6, 4)), np.arange(6) // 2
mask = np.ones(6, bool)

assert_type(loss.ranked_list_loss(embeddings, labels), jax.Array)
assert_type(loss.ranked_list_loss(np.ones((6, 4)), labels, where=mask), jax.Array)
terms = loss.ranked_list_loss_terms(
    embeddings, labels, alpha=jnp.float32(1.4), pair_term="squared", query_weighting="mass"
)
assert_type(terms, loss.RankedListLossTerms)
assert_type(terms.num_positives, jax.Array)
query_loss = loss.ranked_list_loss_of_query(embeddings[0], 0, embeddings, labels, where=mask)
assert_type(query_loss, jax.Array)

loss.cvpr2019(embeddings, labels)
loss.caffe2019(embeddings, labels, margin=0.2, weight_gradient=True)
loss.tpami2020(embeddings, labels, margin=0.2, alpha=1.0, axis_name=None)

gradient = jax.grad(loss.ranked_list_loss)(embeddings, labels)
value, gradient = jax.jit(jax.value_and_grad(loss.ranked_list_loss))(embeddings, labels)
scheduled = jax.jit(lambda margin: loss.ranked_list_loss(embeddings, labels, margin=margin))

loss.triplet_loss(embeddings, labels, mining="hard")
baselines.multi_similarity_loss(embeddings, labels, epsilon=None)
rll_jax.loss.proxy_anchor_loss(embeddings, labels, jnp.ones((3, 4)))
rll_jax.loss.baselines.n_pair_loss(embeddings, labels, scale=4.0)
losses: list[Loss] = [loss.ranked_list_loss, loss.contrastive_loss, loss.cvpr2019]

bank = loss.memory.push(loss.memory.init(16, 4), embeddings, labels)
loss.ranked_list_loss(
    embeddings,
    labels,
    gallery=bank.embeddings,
    gallery_labels=bank.labels,
    gallery_where=bank.valid,
)

scores = metrics.retrieval_metrics(np.ones((6, 4), np.float32), labels, ks=(1, 2))
recall = scores["recall@1"]
"""

MISTAKES = """
import jax.numpy as jnp

from rll_jax import loss

embeddings, labels = jnp.ones((6, 4)), jnp.arange(6)
loss.ranked_list_loss(embeddings, labels, pair_term="squared")
loss.ranked_list_loss(embeddings, labels, pair_term="sqared")
"""

IN_A_PRESET = """
import jax.numpy as jnp

from rll_jax import loss

embeddings, labels = jnp.ones((6, 4)), jnp.arange(6)
loss.tpami2020(embeddings, labels, margin=0.2, query_weighting="mass")
loss.tpami2020(embeddings, labels, margin=0.2, weighting="mass")
"""


@pytest.fixture(scope="module")
def errors_of(tmp_path_factory):
    """{name: [(line, message)]} of the three files, by one run of pyright."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("needs pyright")
    folder = tmp_path_factory.mktemp("user")
    programs = {"correct": CORRECT, "mistakes": MISTAKES, "preset": IN_A_PRESET}
    for name, text in programs.items():
        (folder / f"{name}.py").write_text(text.lstrip())
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if not result.stdout.startswith("{"):
        pytest.skip(f"pyright does not run: {(result.stderr or result.stdout)[-300:]}")
    report = json.loads(result.stdout)
    assert report["summary"]["filesAnalyzed"] == len(programs)
    errors = {name: [] for name in programs}
    for entry in report["generalDiagnostics"]:
        name = pathlib.Path(entry["file"]).stem
        errors[name].append((entry["range"]["start"]["line"] + 1, entry["message"]))
    return errors


def test_correct_calls_have_no_error(errors_of):
    assert errors_of["correct"] == []


def test_a_misspelt_choice_is_the_one_error(errors_of):
    ((line, message),) = errors_of["mistakes"]
    assert line == 7 and "sqared" in message and "Literal['squared']" in message


def test_a_misspelt_option_of_a_preset_is_the_one_error(errors_of):
    ((line, message),) = errors_of["preset"]
    assert line == 7 and '"weighting"' in message
