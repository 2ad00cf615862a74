"""A machine on which every program that could reach a cloud is a stand-in."""

import shlex
import signal
import subprocess
import time

import pytest

from tests.helpers.paths import ROOT

CLOUD = ROOT / "experiments/cloud"
SCRIPTS = sorted(path.name for path in CLOUD.glob("*.sh") if path.name != "common.sh")
RUN = ["--", "experiments.sop", "--flagfile=a.flags", "--data_dir=my data's $(HOME) & \\__ARGS__"]
BUCKET = [*RUN, "--workdir=/mnt/bucket/run"]
DATA = [*RUN, "--workdir=/data/run"]
SLICE = ["--name=slice", "--zone=us-east5-b", "--accelerator_type=v6e-16"]
TPU = [*SLICE, "--bucket=bucket"]
JOB = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4"}
# Appends its arguments to `calls`, one line for each call. Then it does what the first line left in
# `plan` says whose pattern occurs in its command line.
STAND_IN = r"""#!/usr/bin/env bash
here=${BASH_SOURCE[0]%/*} name=${0##*/}
{ printf '%s' "$name"; printf '\t%s' "$@"; echo; } >>"$here/calls"
[[ $name == kubectl ]] && cat >"$here/manifest"
number=0
while IFS=$'\t' read -r -u 3 pattern code output; do
  number=$((number + 1))
  if [[ "$name $*" == *$pattern* ]]; then
    sed -i "${number}d" "$here/plan"
    [[ $output ]] && eval "$output"
    exit "$code"
  fi
done 3<"$here/plan"
exit 0
"""


class Machine:
    """A PATH where every program that could reach a cloud is a stand-in."""

    def __init__(self, folder):
        self.folder = folder
        self.plan()
        for name in (
            "gcloud",
            "git",
            "kubectl",
            "sbatch",
            "srun",
            "squeue",
            "scontrol",
            "scancel",
            "python",
            "sleep",
        ):
            (folder / name).write_text(STAND_IN)
            (folder / name).chmod(0o755)
        self.environment = {
            "PATH": f"{folder}:/usr/bin:/bin",
            "TMPDIR": str(folder),
            "HOME": str(folder),
        }

    def plan(self, *lines):
        """Sets what the next calls do.

        A line has a piece of a call's command line, the exit code and a shell command to run first.
        """
        (self.folder / "plan").write_text(
            "".join("\t".join(map(str, line)) + "\n" for line in lines)
        )
        (self.folder / "calls").write_text("")

    def run(self, script, *arguments, **more):
        environment = self.environment | more
        return subprocess.run(
            [CLOUD / script, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
        )

    def run_and_stop(self, script, *arguments, **more):
        """Sends SIGTERM once the file `ready` exists, and returns the exit code."""
        process = subprocess.Popen(
            [CLOUD / script, *arguments], cwd=ROOT, env=self.environment | more
        )
        until = time.time() + 10
        while not (self.folder / "ready").exists() and time.time() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=10)

    def calls(self):
        return [line.split("\t") for line in (self.folder / "calls").read_text().splitlines()]


def printed(result):
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def manifest(text):
    return pytest.importorskip("yaml").safe_load(text)
