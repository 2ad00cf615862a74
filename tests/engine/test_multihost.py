"""Two processes of four devices each over loopback: the same run as one process of eight."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest

from experiments.engine import trained_network
from tests.helpers.commands import FEW, command, run, scores

pytestmark = pytest.mark.usefixtures("pictures")

RUN = [
    *(a for a in FEW if "every" not in a and "steps" not in a),
    "--eval_every=5",
    "--checkpoint_every=5",
    "--log_every=1",
]


def start(workdir, *arguments):
    """Two processes, which find each other at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}"
    return [
        subprocess.Popen(
            **command(
                *RUN,
                f"--workdir={workdir}",
                "--multihost",
                address,
                "--num_processes=2",
                f"--process_id={i}",
                *arguments,
                devices=4,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]


def ends(processes, timeout=240):
    ended = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def weights(workdir):
    return jax.tree.leaves(trained_network.load(workdir).variables)


@pytest.fixture(scope="module")
def of_one(tmp_path_factory, pictures):
    workdir = tmp_path_factory.mktemp("one") / "run"
    result = run(*RUN, "--steps=5", f"--workdir={workdir}", devices=8)
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.mark.parametrize("parallel", ["pmap", pytest.param("shard_map", marks=pytest.mark.slow)])
def test_two_processes_are_one(parallel, of_one, tmp_path):
    (first, out, err), (second, out_of_second, _) = ends(
        start(tmp_path / "run", "--steps=5", "--report", f"--parallel={parallel}")
    )
    assert first == second == 0, err
    # gloo's lines may be written into each other
    said = [
        line
        for line in out_of_second.splitlines()
        if line and not any(word in line for word in ("[Gloo]", "peer ranks"))
    ]
    assert "Recall@1" in out and not said  # the first process alone speaks
    for ours, theirs in zip(weights(tmp_path / "run"), weights(of_one), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    last, expected = scores(tmp_path / "run")[-1], scores(of_one)[-1]
    assert last["recall@1"] == pytest.approx(expected["recall@1"], abs=0.01)
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "best",
        "checkpoints",
        "metrics.jsonl",
        "report.html",
    }
    if parallel == "pmap":  # goes on as one process
        shutil.rmtree(tmp_path / "run/compiled", ignore_errors=True)
        text = (tmp_path / "run/flags.txt").read_text().replace("--steps=5\n", "--steps=7\n")
        (tmp_path / "run/flags.txt").write_text(text)
        result = run(*RUN, "--steps=7", f"--workdir={tmp_path / 'run'}", devices=8)
        assert result.returncode == 0 and "at step 5 of 7" in result.stdout, result.stderr


@pytest.mark.slow
def test_one_of_two_is_killed_and_the_run_goes_on(of_one, tmp_path):
    """The other ends by itself within a minute and says why; two more finish what one had begun."""
    workdir = tmp_path / "run"
    shutil.copytree(of_one, workdir)  # begun by one process of eight devices
    options = (workdir / "flags.txt").read_text().replace("--steps=5\n", "--steps=2000\n")
    (workdir / "flags.txt").write_text(options)
    processes = start(workdir, "--steps=2000", "--eval_every=5")
    deadline = time.time() + 200
    while time.time() < deadline and not any(
        line["step"] > 8
        for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    ):
        assert processes[0].poll() is None
        time.sleep(0.1)
    os.kill(processes[1].pid, signal.SIGKILL)
    begun = time.time()
    code, _, err = ends(processes[:1], timeout=120)[0]
    ends(processes[1:])
    assert time.time() - begun < 110 and code != 0
    assert code in (75, -signal.SIGABRT) and "another process of this run has gone" in err, err[
        -2000:
    ]
    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    stop = step + 5
    (workdir / "flags.txt").write_text(options.replace("--steps=2000\n", f"--steps={stop}\n"))
    (first, out, err), (second, *_) = ends(start(workdir, f"--steps={stop}"))
    assert first == second == 0 and f"at step {step} of {stop}" in out, err


@pytest.mark.slow
def test_told_to_stop_all_stop_at_one_step(tmp_path):
    """One of the two is told; both save the same step and say: run me again. And they do go on."""
    workdir = tmp_path / "run"
    processes = start(workdir, "--steps=3000", "--eval_every=3000", "--checkpoint_every=3000")
    deadline = time.time() + 200
    while time.time() < deadline and not (
        (workdir / "metrics.jsonl").exists()
        and '"step": 6,' in (workdir / "metrics.jsonl").read_text()
    ):
        assert processes[0].poll() is None
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    (first, _, err), (second, _, err_of_second) = ends(processes, timeout=100)
    assert first == second == 75 and "told to stop: saved step" in err, err_of_second
    (saved,) = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    text = (workdir / "flags.txt").read_text().replace("--steps=3000\n", f"--steps={saved + 2}\n")
    (workdir / "flags.txt").write_text(text)
    (first, out, err), (second, *_) = ends(
        start(workdir, f"--steps={saved + 2}", "--eval_every=3000", "--checkpoint_every=3000")
    )
    assert first == second == 0 and f"at step {saved} of {saved + 2}" in out, err


@pytest.mark.slow
def test_two_processes_score_the_untrained_backbone_as_one(of_one, tmp_path):
    given = ["--steps=5", f"--init_from={of_one}", "--memory_size=0"]
    one = run(*RUN, *given, f"--workdir={tmp_path / 'one'}", devices=8)
    assert one.returncode == 0, one.stderr
    (first, out, err), (second, out_of_second, _) = ends(start(tmp_path / "two", *given))
    assert first == second == 0, err
    assert "fine-tuning brought" in out and "fine-tuning" not in out_of_second
    logged = [
        [line for line in scores(tmp_path / name) if "zero_shot/recall@1" in line]
        for name in ("one", "two")
    ]
    assert len(logged[0]) == 1 and logged[1] == [pytest.approx(logged[0][0], abs=0.01)]
