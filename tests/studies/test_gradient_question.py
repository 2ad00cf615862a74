"""Slopes of pairs against the gradients that they stand for, and the published figures of the simulation."""

import json

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import gradient_question
from rll_jax import loss
from rll_jax.loss import baselines
from tests.helpers.commands import refused, run

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
    found = gradient_question.shares(batches, LABELS, 1.2, 10.0, weight_gradient=True)
    assert found["pairs"] == pytest.approx(wrong, abs=3) and found["norm"] == pytest.approx(
        norm, abs=1.5
    )
    assert gradient_question.shares(batches, LABELS, 1.2, 5.0, weight_gradient=True)[
        "pairs"
    ] == pytest.approx(wrong_at_5, abs=3)
    assert found["active"] > 1


@pytest.mark.parametrize("temperature", [1.0, 10.0, 25.0])
def test_the_published_gradient_pulls_none(temperature):
    found = gradient_question.shares(
        simulated(4, batches=1), LABELS, 1.2, temperature, weight_gradient=False
    )
    assert found["pairs"] == found["norm"] == found["both_lists"] == 0 and found["active"] > 20


@pytest.mark.parametrize("differentiated", [False, True])
def test_slopes_times_directions_are_the_gradient(differentiated):
    """The published one moves the query alone, by constant weights; the port both ends, weights differentiated."""
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
    np.testing.assert_allclose(
        gradient,
        np.einsum("ij,ijk->ik", slope + slope.T if differentiated else slope, away) / 30,
        atol=1e-12,
    )


def test_pytorch_metric_learnings_loss_pulls_the_same_pairs():
    """One coordinate z more, 0 everywhere: the second derivative by z_i and z_j, i != j, is minus the slope over d_ij."""
    x = simulated(16, batches=1)[0]
    n = len(x)
    with jax.enable_x64(True):
        x = np.float64(x)
        of = lambda z: (
            n * baselines.pml_ranked_list_loss(jnp.concatenate([x, z[:, None]], axis=1), LABELS)
        )
        d = np.sqrt(np.maximum(2 - 2 * x @ x.T, 0))
        basis = jnp.eye(n)
        second = jax.lax.map(
            lambda along: jax.jvp(jax.grad(of), (jnp.zeros(n),), (along,))[1], basis
        )
        slope, active = map(
            np.asarray, gradient_question.slopes(x, LABELS, 1.2, 10.0, weight_gradient=True)
        )
    peer, ours = -d * np.asarray(second), slope + slope.T
    np.testing.assert_allclose(
        peer[active], ours[active], atol=2e-3 * np.abs(ours).max()
    )  # its 1e-5 for each of the batch
    assert (
        np.mean((peer > 0)[active]) == pytest.approx(np.mean((ours > 0)[active]), abs=0.005)
        and np.mean((ours > 0)[active]) > 0.4
    )


def test_effective_dimension():
    x = np.random.default_rng(0).normal(size=(20_000, 6)) * [1, 1, 1, 1, 0, 0]
    assert gradient_question.effective_dimension(
        x @ np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    ) == pytest.approx(4, rel=0.01)


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
    assert written.keys() == {
        "gradient_question.md",
        "gradient_question.json",
        "gradient_question.png",
    }
    text, numbers = (
        written["gradient_question.md"].read_text(),
        json.loads(written["gradient_question.json"].read_text()),
    )
    assert text in result.stdout and numbers["command"] in text and numbers["commit"] in text
    assert written["gradient_question.png"].read_bytes().startswith(b"\x89PNG")
    first, second = numbers["simulations"]
    assert (
        second["effective_dimension"] > first["effective_dimension"]
        and first["published"]["10"]["pairs"] == 0
    )
    assert (
        f"{first['differentiated']['10']['pairs']:.1f} ({first['differentiated']['10']['norm']:.1f})"
        in text
    )
    refused("gradient_question.md exists", *small, name="studies.gradient_question")
    refused(
        "--temperatures=40 times --alpha=1.2",
        *small,
        "--temperatures=40",
        "--overwrite",
        name="studies.gradient_question",
    )


def test_lists_of_numbers():
    assert gradient_question._numbers("ranks", ["8", "4"], int, 2) == [4, 8]
    for wrong in (["2", "x"], ["1"], ["4", "4"], []):
        with pytest.raises(ValueError, match="--ranks=.*: expected numbers of 2 or more"):
            gradient_question._numbers("ranks", wrong, int, 2)
