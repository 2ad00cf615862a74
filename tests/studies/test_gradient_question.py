"""Slopes of pairs against the gradients that they come from, and the simulation's figures."""

import json

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import gradient_question
from experiments.studies import gradient_question_page as page
from rll_jax import loss
from rll_jax.loss import baselines
from tests.helpers.commands import refused, run
from tests.helpers.paths import ROOT

LABELS = np.repeat(np.arange(60), 3)


def simulated(rank, batches=4):
    values = flags.FlagValues()
    gradient_question.define_flags(values)
    values(["gradient_question", "--out=.", f"--batches={batches}"])
    return gradient_question.simulated(rank, LABELS, values)


@pytest.mark.parametrize(
    "rank, wrong, norm, wrong_at_5",
    [(8, 85, 18, 42), (16, 52, 9, 2), (32, 14, 1.4, 0), (64, 0.2, 0, 0)],
)
def test_differentiated_weights_pull_as_many_negatives_nearer_as_was_published(
    rank, wrong, norm, wrong_at_5
):
    batches = simulated(rank)
    at_10 = gradient_question.shares(batches, LABELS, 1.2, 10.0, weight_gradient=True)
    assert at_10["pairs"] == pytest.approx(wrong, abs=3)
    assert at_10["norm"] == pytest.approx(norm, abs=1.5)
    at_5 = gradient_question.shares(batches, LABELS, 1.2, 5.0, weight_gradient=True)
    assert at_5["pairs"] == pytest.approx(wrong_at_5, abs=3)
    assert at_10["active"] > 1


@pytest.mark.parametrize("temperature", [1.0, 10.0, 25.0])
def test_the_published_gradient_pulls_none(temperature):
    shares = gradient_question.shares(
        simulated(4, batches=1), LABELS, 1.2, temperature, weight_gradient=False
    )
    assert shares["pairs"] == shares["norm"] == shares["both_lists"] == 0
    assert shares["active"] > 20


@pytest.mark.parametrize("differentiated", [False, True])
def test_slopes_times_directions_are_the_gradient(differentiated):
    """Constant weights (published) move the query alone, differentiated ones (port) both ends."""
    labels = LABELS[:30]
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(30, 6))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        slope = np.asarray(
            gradient_question.slopes(x, labels, 1.2, 10.0, weight_gradient=differentiated)[0]
        )
        away = x[:, None] - x[None, :]
        away /= np.linalg.norm(away, axis=2, keepdims=True) + np.eye(30)[:, :, None]
        options = {
            "weight_gradient": differentiated,
            "gallery_gradient": differentiated,
            "normalize": False,
        }
        gradient = jax.jit(jax.grad(lambda x: loss.ranked_list_loss(x, labels, **options)))(x)
    moved = slope + slope.T if differentiated else slope
    np.testing.assert_allclose(gradient, np.einsum("ij,ijk->ik", moved, away) / 30, atol=1e-12)


def test_pytorch_metric_learnings_loss_pulls_the_same_pairs():
    """Of an added coordinate z, all 0, d2L / dz_i dz_j (i != j) is minus the slope / d_ij."""
    x = simulated(16, batches=1)[0]
    n = len(x)
    with jax.enable_x64(True):
        x = np.float64(x)

        def peer_loss(z):
            raised = jnp.concatenate([x, z[:, None]], axis=1)
            return n * baselines.pml_ranked_list_loss(raised, LABELS)

        def second_derivative(direction):
            return jax.jvp(jax.grad(peer_loss), (jnp.zeros(n),), (direction,))[1]

        distances = np.sqrt(np.maximum(2 - 2 * x @ x.T, 0))
        second = jax.lax.map(second_derivative, jnp.eye(n))
        slope, active = map(
            np.asarray, gradient_question.slopes(x, LABELS, 1.2, 10.0, weight_gradient=True)
        )
    peer, ours = -distances * np.asarray(second), slope + slope.T
    # The peer adds 1e-5 for each member of the batch.
    np.testing.assert_allclose(peer[active], ours[active], atol=2e-3 * np.abs(ours).max())
    pulled = np.mean((ours > 0)[active])
    assert np.mean((peer > 0)[active]) == pytest.approx(pulled, abs=0.005) and pulled > 0.4


def test_effective_dimension():
    x = np.random.default_rng(0).normal(size=(20_000, 6)) * [1, 1, 1, 1, 0, 0]
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    assert gradient_question.effective_dimension(x @ rotation) == pytest.approx(4, rel=0.01)


def test_the_command(tmp_path):
    small = [
        "--classes=6",
        "--batches=2",
        "--ranks=2,4",
        "--temperatures=10",
        "--embedding_dim=8",
        f"--out={tmp_path}",
    ]
    result = run(*small, name="studies.gradient_question")
    assert result.returncode == 0, result.stderr
    written = {path.name: path for path in tmp_path.iterdir()}
    assert written.keys() == set(page.NAMES)
    text = written["gradient_question.md"].read_text()
    numbers = json.loads(written["gradient_question.json"].read_text())
    assert text in result.stdout and numbers["command"] in text and numbers["commit"] in text
    assert written["gradient_question.png"].read_bytes().startswith(b"\x89PNG")
    first, second = numbers["simulations"]
    assert second["effective_dimension"] > first["effective_dimension"]
    assert first["published"]["10"]["pairs"] == 0
    moved = first["differentiated"]["10"]
    assert f"{moved['pairs']:.1f} ({moved['norm']:.1f})" in text
    refused("gradient_question.md exists", *small, name="studies.gradient_question")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--temperatures=40"], "--temperatures=40 times --alpha=1.2"),
        (["--ranks=1"], "--ranks=1: expected numbers of 2 or more"),
        (["--out=nowhere"], "--out=nowhere: found no such folder"),
        (["--alpha=3"], "--alpha=3"),
        (["--beta=3"], "Unknown command line flag 'beta'"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_a_mistake_takes_one_line(tmp_path, arguments, words):
    refused(words, f"--out={tmp_path}", *arguments, name="studies.gradient_question")
    assert not list(tmp_path.iterdir())


def test_lists_of_numbers():
    assert gradient_question._parse_numbers("ranks", ["8", "4"], int, 2) == [4, 8]
    for wrong in (["2", "x"], ["1"], ["4", "4"], []):
        with pytest.raises(ValueError, match="--ranks=.*: expected numbers of 2 or more"):
            gradient_question._parse_numbers("ranks", wrong, int, 2)
    with pytest.raises(ValueError, match="--temperatures=1,nan: expected numbers of 0 or more"):
        gradient_question._parse_numbers("temperatures", ["1", "nan"], float, 0)


def test_the_recorded_page_has_the_recorded_numbers():
    results = ROOT / "experiments/results"
    numbers = json.loads((results / "gradient_question.json").read_text())
    # The module has moved since.
    command = numbers["command"].replace(
        "experiments.gradient_question", "experiments.studies.gradient_question"
    )
    about = page.heading(numbers | {"command": command})
    rows = [*numbers["simulations"], *numbers["runs"]]
    text = (results / "gradient_question.md").read_text()
    assert text == page.as_markdown(rows, [1, 5, 10, 20], about)
