"""What a type checker tells a user of the library: nothing of correct code, and each mistake."""

import importlib.util
import inspect
import json
import os
import pathlib
import subprocess
import sys

import pytest

from rll_jax import loss
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

two_towers = loss.two_tower_ranked_list_loss(
    np.ones((6, 4)), embeddings, labels, jnp.asarray(labels), precision="high", gather="ring"
)
assert_type(two_towers, jax.Array)
assert_type(loss.caffe2019(np.ones((6, 4)), labels, where=jnp.asarray(mask)), jax.Array)
loss.two_tower_ranked_list_loss(embeddings, embeddings, labels, labels, where_a=mask)
loss.ranked_list_loss(embeddings, labels, margin=np.float32(0.2), balance=jnp.float32(0.5))
bank = loss.memory.push(bank, np.ones((6, 4), np.float32), labels, where=mask)
jitted = jax.jit(loss.ranked_list_loss, static_argnames=loss.STATIC_ARGUMENTS)

scores = metrics.retrieval_metrics(np.ones((6, 4), np.float32), labels, ks=(1, 2))
recall = scores["recall@1"]
"""

MISTAKES = """
import jax.numpy as jnp

from rll_jax import loss

embeddings, labels = jnp.ones((6, 4)), jnp.arange(6)
loss.ranked_list_loss(embeddings, labels, pair_term="squared", precision="high")
loss.tpami2020(embeddings, labels, margin=0.2, query_weighting="mass")
loss.ranked_list_loss(embeddings, labels, pair_term="sqared")
loss.ranked_list_loss(embeddings, labels, precision="hihg")
loss.caffe2019(embeddings, labels, precision="hihg")
loss.caffe2019(embeddings, labels, gather="rign")
loss.tpami2020(embeddings, labels, margin=0.2, weighting="mass")
loss.cvpr2019(embeddings, labels, marign=0.2)
loss.two_tower_ranked_list_loss(embeddings, embeddings, labels, labels, query_weighting="mas")
loss.triplet_loss(embeddings, labels, mining="semi-hard")
loss.ranked_list_loss([[1.0]], labels)
"""

# What each message names, from line 8 on.
NAMED = (
    ("sqared", "squared"),
    ("hihg", "high"),
    ("hihg", "high"),
    ("rign", "ring"),
    ("weighting",),
    ("marign",),
    ("mas", "mass"),
    ("semi-hard", "semihard"),
    ("list[list[float]]",),
)

PROGRAMS = {"correct": CORRECT, "mistakes": MISTAKES}


@pytest.fixture(scope="module", params=["pyright", "mypy"])
def errors_of(request, tmp_path_factory):
    """{name: [(line, message)]} of the two files, by one run of a type checker."""
    checker = request.param
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"needs {checker}")
    folder = tmp_path_factory.mktemp("user")
    for name, text in PROGRAMS.items():
        (folder / f"{name}.py").write_text(text.lstrip())
    check = {"pyright": by_pyright, "mypy": by_mypy}[checker]
    errors = {name: [] for name in PROGRAMS}
    for name, line, message in check(folder):
        errors[name].append((line, message))
    return errors


def by_pyright(folder):
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if not result.stdout.startswith("{"):
        pytest.skip(f"pyright does not run: {(result.stderr or result.stdout)[-300:]}")
    report = json.loads(result.stdout)
    assert report["summary"]["filesAnalyzed"] == len(PROGRAMS)
    for entry in report["generalDiagnostics"]:
        line = entry["range"]["start"]["line"] + 1
        yield pathlib.Path(entry["file"]).stem, line, entry["message"]


def by_mypy(folder):
    """The library's own files are silent, as an installed package's are."""
    options = ["--strict", "--follow-imports=silent", "--output=json", "--cache-dir=cache"]
    command = [sys.executable, "-m", "mypy", *options, *(f"{name}.py" for name in PROGRAMS)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and not result.stderr, result.stderr
    for entry in map(json.loads, result.stdout.splitlines()):
        if entry["severity"] == "error":
            yield pathlib.Path(entry["file"]).stem, entry["line"], entry["message"]


def test_correct_calls_have_no_error(errors_of):
    assert errors_of["correct"] == []


def test_each_mistake_is_an_error_and_nothing_else(errors_of):
    assert [line for line, _ in errors_of["mistakes"]] == [8 + k for k in range(len(NAMED))]
    for (_, message), names in zip(errors_of["mistakes"], NAMED, strict=True):
        assert all(name in message for name in names), message


@pytest.mark.parametrize(
    "preset, changed",
    [
        (loss.cvpr2019, {}),
        (loss.caffe2019, {"pair_term": "squared", "query_weighting": "mass"}),
        (loss.tpami2020, {"alpha": 1.2, "query_weighting": "mass"}),
    ],
)
def test_a_preset_shows_its_full_signature(preset, changed):
    full = inspect.signature(loss.ranked_list_loss).parameters
    shown = inspect.signature(preset).parameters
    assert list(shown) == list(full)
    defaults = {name: parameter.default for name, parameter in full.items()}
    assert {name: p.default for name, p in shown.items()} == {**defaults, **changed}
