"""Commands as a user gives them, in processes of their own."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

from experiments.engine import startup
from tests.helpers.paths import ROOT
from tests.helpers.warm_process import WarmProcess

TINY = [
    "--backbone=resnet_tiny",
    "--image_size=16",
    "--embedding_dim=16",
    "--classes_per_batch=8",
    "--images_per_class=2",
    "--steps=12",
    "--eval_every=6",
    "--checkpoint_every=3",
    "--log_every=1",
    "--memory_size=32",
    "--ema=0.9",
    "--noreport",
]


_TEMPORARY = tempfile.TemporaryDirectory()
PICTURES = pathlib.Path(_TEMPORARY.name, "pictures")


FEW = [
    *TINY,
    "--dataset=folder",
    f"--data_dir={PICTURES}",
    "--augment=affine",
]  # with the fixture `pictures`: evaluated in no time


def command(*arguments, name="emoji", devices=1):
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # quick to compile
    flags["XLA_FLAGS"] = startup.xla_flags(flags, startup.jaxlib_version())
    environment = (
        os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)} | flags
    )
    return dict(
        args=[sys.executable, "-m", f"experiments.{name}", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        text=True,
    )


@functools.cache
def warm_process(devices):
    given = command(devices=devices)
    return WarmProcess(given["env"], given["cwd"])


def run(*arguments, name="emoji", devices=1):
    """The completed process of a command; see `WarmProcess`."""
    given = command(*arguments, name=name, devices=devices)
    return warm_process(devices).run(given["args"][2], given["args"][3:], given["env"], timeout=240)


def scores(workdir):
    """The metrics without what a clock decides."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("images_per_second", "seconds_waiting")}
        for line in lines
    ]


def refused(text, *arguments, **kwargs):
    result = run(*arguments, **kwargs)
    assert result.returncode == 2, result.stderr
    told = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(told) == 1 and text in told[0] and "Traceback" not in result.stderr, result.stderr


def browse(path, profile):
    """How many pictures headless Chromium shows on a page, and what its console says."""
    if not shutil.which("chromium"):
        pytest.skip("no Chromium on this machine")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--enable-logging=stderr",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        path.as_uri(),
    ]
    result = subprocess.run(["chromium", *flags], capture_output=True, text=True, timeout=120)
    return result.stdout.count("<img"), [
        line for line in result.stderr.splitlines() if "CONSOLE" in line
    ]


SMALL = [
    *(a for a in TINY if "classes" not in a and "steps" not in a),
    "--classes_per_batch=4",
    "--steps=3",
]
