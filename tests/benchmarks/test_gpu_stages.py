"""The stages for a GPU: they end once, resume, and are cut off, whatever they run."""

import json
import sys
import time

import pytest

from experiments.benchmarks import gpu
from tests.helpers.commands import refused, run

RESUMING = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
mark = pathlib.Path({mark!r})
if mark.exists():
    print("the end")
else:
    mark.touch()
    print("half", flush=True)
    time.sleep(60)
"""


def stage(name, code, resumes=False):
    return gpu.Stage(name, (sys.executable, "-c", code), resumes)


def result(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["exit_code"]


def test_stages_end_once_and_resume(tmp_path):
    todo = [
        stage("quick", "print('12 | 3')"),
        stage("fails", "raise SystemExit(3)"),
        stage("trains", RESUMING.format(mark=str(tmp_path / "mark")), resumes=True),
        stage("last", "print('at last')"),
    ]
    assert not gpu.run(todo, tmp_path, 4)
    assert result(tmp_path, "quick") == 0 and result(tmp_path, "fails") == 3
    assert not (tmp_path / "trains.json").exists() and "Not ended yet" in gpu.page(
        todo, tmp_path, "a card"
    )
    before = (tmp_path / "quick.json").stat().st_mtime_ns
    assert gpu.run(todo, tmp_path, 60)
    assert (tmp_path / "quick.json").stat().st_mtime_ns == before
    page = gpu.page(todo, tmp_path, "a card")
    for text in ("# On a card", "    12 | 3\n", "    half\n    the end\n", "    at last\n"):
        assert text in page


def test_a_stage_that_is_cut_off_begins_again_once(tmp_path):
    todo = [stage("quick", "pass"), stage("long", "import time; time.sleep(60)")]
    start = time.monotonic()
    assert not gpu.run(todo, tmp_path, 2)  # it did not have the call to itself
    assert not (tmp_path / "long.json").exists()
    assert gpu.run(todo, tmp_path, 1)
    assert result(tmp_path, "long") == "too long" and time.monotonic() - start < 30


def test_a_training_that_has_to_be_killed_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_GRACE", 1)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    assert not gpu.run([stage("trains", code, resumes=True)], tmp_path, 2)
    assert not (tmp_path / "trains.json").exists()


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("--vit=x",), "--vit=x goes with --cub"),
        (("--cub=nowhere",), "--cub=nowhere: no such folder"),
    ],
)
def test_mistakes(arguments, text, tmp_path):
    refused(text, f"--out={tmp_path / 'out'}", *arguments, name="benchmarks.gpu")
    assert not (tmp_path / "out").exists()


def test_the_stages_are_commands_with_these_flags(tmp_path):
    """The flag that does not exist is the only one that is refused."""
    for each in gpu.stages("cub", "a.npz", "b.npz", tmp_path)[1:]:
        module, *flags = each.arguments[3:]
        told = run(*flags, "--no_such_flag=1", name=module.removeprefix("experiments."))
        assert told.returncode and "no_such_flag" in told.stderr, told.stderr
