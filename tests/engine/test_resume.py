"""What a run lives through: SIGTERM, damaged checkpoints, steps that are not finite."""

import functools
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.engine import build, config, signals
from rll_jax.training import checkpoint
from tests.helpers.commands import FEW as TINY
from tests.helpers.commands import command, refused, run, scores
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.usefixtures("pictures")

STEPS = [
    *(a for a in TINY if "steps" not in a),
    "--steps=4000",
    "--eval_every=4000",
    "--checkpoint_every=500",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    workdir = tmp_path_factory.mktemp("small") / "run"
    return run(*TINY, f"--workdir={workdir}"), workdir


def wait_for_step(process, workdir, step):
    path, deadline = workdir / "metrics.jsonl", time.time() + 200
    while time.time() < deadline and process.poll() is None:
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.02)
    process.kill()  # what a run that goes on writes has no end
    raise AssertionError(process.stderr.read())


def begin(*arguments):
    return subprocess.Popen(
        **command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where the tests run in the background, SIGINT is ignored, and processes inherit that.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def everything(workdir):
    """All arrays of the last checkpoint."""
    state = jax.eval_shape(
        functools.partial(build.create_state, config.from_flagfile(workdir / "flags.txt"))
    )
    with checkpoint.Checkpoints(workdir / "checkpoints", read_only=True) as saved:
        return saved.restore_subset(saved.latest_step(), checkpoint._arrays(state))


def same_end(workdir, other):
    """Two runs ended bit for bit alike: metrics, parameters, optimiser, average, memory."""
    assert scores(workdir) == scores(other)
    found, expected = everything(workdir), everything(other)
    assert {
        "params",
        "opt_state",
        "batch_stats",
        "ema",
        "memory",
        "step",
        "skipped",
    } == found.keys()
    assert np.all(found["memory"]["H"].valid)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_flags_txt_repeats_the_run(finished, tmp_path):
    result = run(f"--flagfile={finished[1] / 'flags.txt'}", f"--workdir={tmp_path / 'again'}")
    assert result.returncode == 0, result.stderr
    assert scores(tmp_path / "again") == scores(finished[1])


def test_more_steps_for_a_run_that_has_ended(finished, tmp_path):
    """With a learning rate that no later step changes; otherwise the message says what to do."""
    refused("--init_from=", *TINY, "--steps=15", f"--workdir={finished[1]}")
    refused("(--steps=12 there, 8 here)", *TINY, "--steps=8", f"--workdir={finished[1]}")
    falls = [*TINY, "--schedule=step", "--decay_at=4,14"]
    for steps in (12, 15):
        result = run(*falls, f"--steps={steps}", f"--workdir={tmp_path / 'grown'}")
        assert result.returncode == 0, result.stderr
    assert "at step 12 of 15" in result.stdout
    assert run(*falls, "--steps=15", f"--workdir={tmp_path / 'whole'}").returncode == 0
    same_end(tmp_path / "grown", tmp_path / "whole")


def test_killed_and_given_again_ends_the_same(finished, tmp_path):
    workdir = tmp_path / "killed"
    for stop_at in (2, 5, 10):  # before the first checkpoint, and between later ones
        process = subprocess.Popen(
            **command(*TINY, f"--workdir={workdir}"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics, deadline = workdir / "metrics.jsonl", time.time() + 200
        while time.time() < deadline and process.poll() is None:
            if metrics.exists() and f'"step": {stop_at}, "grad' in metrics.read_text():
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    result = run(*TINY, f"--workdir={workdir}")
    assert result.returncode == 0 and "resuming" in result.stdout, result.stderr
    same_end(workdir, finished[1])


def test_told_to_stop_saves_and_says_so(tmp_path):
    workdir = tmp_path / "run"
    process = begin(*STEPS, f"--workdir={workdir}")
    wait_for_step(process, workdir, 5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == signals.RUN_AGAIN == 75 and "Traceback" not in err
    (saved,) = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert f"told to stop: saved step {saved} of 4000" in err and saved % 500
    again = begin(*STEPS, f"--workdir={workdir}")
    wait_for_step(again, workdir, saved + 3)
    again.kill()
    out, _ = again.communicate(timeout=60)
    assert f"resuming {workdir} at step {saved}" in out


def test_a_second_sigterm_ends_at_once():
    """The first is noted for every later step; the second ends the process as usual."""
    code = (
        "import os, signal, time; from experiments.engine import resume\n"
        "with resume.stop_requests(10) as stop:\n"
        "    assert not stop(10); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop(11) and stop(12); print('noted', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == -signal.SIGTERM and ended.stdout == "noted\n", ended.stderr


@pytest.mark.slow
def test_told_to_stop_in_the_middle_of_an_evaluation(finished, tmp_path):
    """It is not waited for: the step is saved, and evaluated when the run goes on."""
    code = (
        "import os, signal, sys; from absl import app\n"
        "from experiments.engine import command, flags, scoring, train_loop\n"
        "embed_readable, times = scoring.embed_readable, []\n"
        "def told(embed, *args):\n"
        "    times.append(1)\n"
        "    if len(times) == 2: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return embed_readable(embed, *args)\n"
        "scoring.embed_readable = told\n"
        "flags.define(); app.run(train_loop.main, flags_parser=command.parse_flags)"
    )
    given = command(*TINY, f"--workdir={tmp_path / 'run'}")
    given["args"][1:3] = ["-c", code]
    ended = subprocess.run(**given, capture_output=True, timeout=240)
    assert ended.returncode == 75 and "told to stop: saved step 6 of 12" in ended.stderr, (
        ended.stderr
    )
    assert [line["step"] for line in scores(tmp_path / "run") if "recall@1" in line] == [0]
    assert run(*TINY, f"--workdir={tmp_path / 'run'}").returncode == 0
    same_end(tmp_path / "run", finished[1])


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    return tmp_path / "run"


def damage(directory):
    """Cuts off every file of the arrays."""
    files = [p for p in directory.rglob("*") if p.is_file() and p.stat().st_size > 50]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(copy, finished):
    steps = sorted(int(p.name) for p in (copy / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [9, 12]
    damage(copy / "checkpoints/12")
    told = run(f"--workdir={copy}", "--clustering=false", name="evaluate")
    assert (
        told.returncode == 2
        and "the checkpoint of step 12 cannot be read" in told.stderr
        and "Traceback" not in told.stderr
    )
    result = run(*TINY, f"--workdir={copy}")
    assert (
        result.returncode == 0
        and "resuming" in result.stdout
        and "at step 9 of 12" in result.stdout
    ), result.stderr
    assert "the checkpoint of step 12 cannot be read and was moved to" in result.stderr
    assert list((copy / "damaged_checkpoints").glob("12-*")) and (copy / "checkpoints/12").is_dir()
    assert scores(copy) == scores(finished[1])
    for step in (9, 12):
        damage(copy / "checkpoints" / str(step))
    told = run(*TINY, f"--workdir={copy}")
    assert (
        told.returncode == 2
        and "error: none of the checkpoints of" in told.stderr
        and "Traceback" not in told.stderr
    )


def test_the_best_is_kept(finished, copy):
    lines = [line for line in scores(finished[1]) if "recall@1" in line]
    best = max(lines, key=lambda line: line["recall@1"])
    assert [p.name for p in (finished[1] / "best").iterdir() if p.name.isdigit()] == [
        str(best["step"])
    ]
    found = run(
        f"--workdir={finished[1]}",
        "--best",
        "--clustering=false",
        f"--out={finished[1] / 'of_best.json'}",
        name="evaluate",
    )
    assert found.returncode == 0, found.stderr
    measured = json.loads((finished[1] / "of_best.json").read_text())
    assert measured["step"] == best["step"] and measured["scores"]["H"][
        "recall@1"
    ] == pytest.approx(best["recall@1"])
    with checkpoint.Checkpoints(copy / "checkpoints", read_only=True) as saved:
        assert saved.metadata(12) == {
            "best_score": best["recall@1"]
        }  # whatever becomes of metrics.jsonl


def test_a_workdir_that_cannot_be_written():
    """Not by root either: the kernel's own folder."""
    refused("error: [Errno", *TINY, "--workdir=/sys/run")


def test_steps_that_are_not_finite_stop_a_run(tmp_path):
    """At this rate the first updates are finite and huge; what they make is not."""
    result = run(
        *TINY,
        "--steps=60",
        "--eval_every=60",
        "--learning_rate=1e30",
        "--warmup=0",
        "--optimizer=sgd",
        "--max_bad_steps=4",
        f"--workdir={tmp_path / 'run'}",
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and (
        "steps in a row, until step" in told[0] and "lower --learning_rate" in told[0]
    )
    lines = scores(tmp_path / "run")
    assert lines[-1]["skipped_steps"] >= 4


@pytest.mark.slow
def test_told_to_stop_where_it_would_evaluate(tmp_path):
    """The evaluation of the very step is made when the run goes on."""
    workdir = tmp_path / "run"
    every = [
        *(a for a in TINY if "every" not in a and "steps" not in a),
        "--steps=2000",
        "--eval_every=1",
        "--checkpoint_every=5000",
        "--log_every=1",
    ]
    process = begin(*every, f"--workdir={workdir}")
    wait_for_step(process, workdir, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    (saved,) = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    again = begin(*every, f"--workdir={workdir}")
    wait_for_step(again, workdir, saved + 1)
    again.kill()
    again.communicate()
    scored = [line["step"] for line in scores(workdir) if "recall@1" in line]
    assert scored[: saved + 1] == list(range(saved + 1))


@pytest.mark.slow
def test_killed_while_it_wrote_its_first_files(tmp_path):
    """After the first of them; and a cut-off one lies there."""
    code = (
        "import os, pathlib; from absl import app\n"
        "from experiments.engine import command, flags, train_loop\n"
        "replace = pathlib.Path.replace\n"
        "pathlib.Path.replace = lambda *args: (replace(*args), os.kill(os.getpid(), 9))\n"
        "flags.define(); app.run(train_loop.main, flags_parser=command.parse_flags)"
    )
    given = command(*TINY, "--steps=1", f"--workdir={tmp_path / 'run'}")
    given["args"][1:3] = ["-c", code]
    assert subprocess.run(**given, capture_output=True, timeout=240).returncode == -signal.SIGKILL
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", "flags.txt"}
    (tmp_path / "run/.data.json.0.tmp").touch()
    again = run(*TINY, "--steps=1", f"--workdir={tmp_path / 'run'}")
    assert again.returncode == 0, again.stderr


def test_two_runs_in_one_workdir(tmp_path):
    workdir = tmp_path / "run"
    endless = [*STEPS, "--steps=1000000", f"--workdir={workdir}"]
    process = begin(*endless)
    wait_for_step(process, workdir, 3)
    told = run(*endless)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert told.returncode == 2 and "is in use by another run" in told.stderr, told.stderr
    assert (
        process.returncode == 130
        and "interrupted: the same command resumes" in err
        and "Traceback" not in err
    )


def test_init_from_takes_all_the_weights(finished, tmp_path):
    result = run(
        *TINY,
        "--steps=1",
        "--learning_rate=1e-12",
        f"--init_from={finished[1]}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert result.returncode == 0, result.stderr
    first = next(line for line in scores(tmp_path / "run") if "recall@1" in line)
    last = scores(finished[1])[-1]
    assert first["step"] == 0 and first["recall@1"] == last["recall@1"]
    refused(
        "give one of them", *TINY, "--init_from=a", "--pretrained=b", f"--workdir={tmp_path / 'no'}"
    )


def test_a_dry_run_tells_and_writes_nothing(tmp_path):
    result = run(*TINY, "--dry_run", "--embed_chunk=2", f"--workdir={tmp_path / 'run'}", devices=8)
    assert result.returncode == 0, result.stderr
    for text in (
        "5,352 parameters",
        "batch, image: (16, 16, 16, 3) uint8",
        "for 8 devices",
        "GFLOP on each",
        "temporary",
        "nothing written into the workdir",
    ):
        assert text in result.stdout
    assert not (tmp_path / "run").exists()


def test_what_is_watched(finished):
    lines = map(json.loads, (finished[1] / "metrics.jsonl").read_text().splitlines())
    line = next(line for line in lines if "loss" in line)
    assert {
        "nontrivial_positives_H",
        "nontrivial_negatives_H",
        "learning_rate",
        "seconds_waiting",
        "gradient_norm",
    } <= line.keys()
    environment = json.loads((finished[1] / "environment.json").read_text())
    assert (
        environment["packages"]["jax"] == jax.__version__
        and environment["devices"]
        and environment["command"]
    )
    events = b"".join(p.read_bytes() for p in (finished[1] / "tensorboard").glob("events*"))
    for name in (
        b"positive_distances_H",
        b"nontrivial_negatives_H",
        b"learning_rate",
        b"device_mib",
        b"options",
        b"environment",
    ):
        assert name in events


@pytest.mark.slow
def test_a_profile(tmp_path):
    result = run(*TINY, "--profile_steps=3:5", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_killed_at_random_25_times(tmp_path):
    """SIGKILL at any moment, in saves too: steps after the last checkpoint alone are lost."""
    many = [
        *(a for a in TINY if "every" not in a and "steps" not in a),
        "--steps=300",
        "--eval_every=100",
        "--checkpoint_every=2",
        "--log_every=1",
    ]
    straight, workdir = tmp_path / "straight", tmp_path / "killed"
    assert run(*many, f"--workdir={straight}").returncode == 0
    chance, kills, reached = random.Random(0), 0, 0
    while kills < 25:
        process = begin(*many, f"--workdir={workdir}")
        deadline = time.time() + 120
        while (
            time.time() < deadline and process.poll() is None
        ):  # some steps further than the last time
            done = (
                [
                    json.loads(line)["step"]
                    for line in (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
                ]
                if (workdir / "metrics.jsonl").exists()
                else []
            )
            if done and max(done) >= min(reached + chance.randrange(1, 10), 299):
                break
            time.sleep(0.01)
        time.sleep(chance.random() * 0.2)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kills += 1
        steps = (
            [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
            if (workdir / "checkpoints").exists()
            else []
        )
        assert max(steps, default=0) >= reached, "a finished checkpoint was lost"
        reached = max(steps, default=0)
    result = run(*many, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert kills == 25
    same_end(workdir, straight)
    assert not list(pathlib.Path(workdir).rglob("*tmp*"))
