"""What a machine with a GPU should be asked: checks, benchmarks and CUB-200-2011, in stages.

    python -m experiments.benchmarks.gpu --out=runs/gpu  # 9 minutes at most; run it again
    python -m experiments.benchmarks.gpu --out=runs/gpu --cub=DIR --pretrained=FILE --vit=FILE

Each stage is a command in a process of its own. A call ends after --minutes, with exit code 75
where stages are left: the same call goes on with them. Training resumes from its checkpoint, and
another stage begins again. README.md in --out has what the stages printed, with device, date and
commit.
"""

from collections.abc import Sequence
import contextlib
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from absl import app, flags

from experiments.engine import command, environment, many_runs, signals
from rll_jax.data import files

_ROOT = pathlib.Path(__file__).parents[2]
_PYTHON = (sys.executable, "-u", "-m")
_GRACE = 45  # seconds for a checkpoint, and for processes to end
_LAST_LINES = 60  # of a stage's output, in the page


class Stage(NamedTuple):
    """A command of its own.

    Attributes:
      name: its name, and that of its files.
      arguments: the command.
      resumes: whether it goes on where SIGTERM ended it, with exit code 75.
    """

    name: str
    arguments: Sequence[str]
    resumes: bool = False


def stages(cub: str, pretrained: str, vit: str, out: pathlib.Path) -> list[Stage]:
    """Returns the stages; training only where CUB-200-2011 is given."""

    def benchmark(name: str, *arguments: str) -> Stage:
        module = f"experiments.benchmarks.{name.split('_')[0]}"
        return Stage(name, (*_PYTHON, module, *arguments))

    def training(name: str, weights: str) -> Stage:
        return Stage(
            name,
            (
                *_PYTHON,
                "experiments.cub",
                f"--flagfile={_ROOT / 'experiments/flagfiles' / name}.flags",
                f"--data_dir={cub}",
                f"--workdir={out / name}",
                *([f"--pretrained={weights}"] if weights else []),
            ),
            resumes=True,
        )

    numerics = ("test_loss.py", "test_loss_numerics.py", "test_derivatives.py")
    return [
        Stage("checks", (*_PYTHON, "pytest", "-q", "-n0", *(f"tests/loss/{x}" for x in numerics))),
        benchmark("loss", "--sizes=64,256,1024,2048,8192", "--rounds=2", "--seconds=1"),
        benchmark("loss_131072", "--sizes=131072", "--dim=128", "--rounds=2", "--nolarge"),
        benchmark("evaluation", "--levels"),
        benchmark(
            "model_resnet50", "--models=resnet50", "--sizes=224", "--batch=256",
            "--dtype=bfloat16", "--rounds=2",
        ),
        benchmark(
            "model_vit", "--models=vit_small_16", "--sizes=224", "--batch=256",
            "--dtype=bfloat16", "--rounds=2",
        ),
        *([training("cub_modern", pretrained)] if cub else []),
        *([training("cub_modern_vit", vit)] if cub and vit else []),
    ]  # fmt: skip


def run(todo: Sequence[Stage], out: pathlib.Path, seconds: float) -> bool:
    """Runs the stages that have not ended, as far as the time reaches.

    A stage that the time cuts off begins again in the next call. One that had a whole call to
    itself, and does not resume, ends as "too long".

    Args:
      todo: the stages.
      out: the folder of their outputs, NAME.txt, and results, NAME.json.
      seconds: the time.

    Returns:
      Whether all stages have ended.
    """
    end = time.monotonic() + seconds
    is_first = True
    for stage in todo:
        result = out / f"{stage.name}.json"
        if result.exists():
            continue
        left = end - time.monotonic()
        if left <= 0:
            return False
        print(f"{stage.name}: at most {left:.0f} s", flush=True)
        start = time.monotonic()
        code = _run_stage(stage, out, left)
        cut_off = code is None or (stage.resumes and code == signals.RUN_AGAIN)
        if cut_off and (stage.resumes or not is_first):
            return False
        is_first = False
        ended = {
            "command": list(stage.arguments),
            "exit_code": "too long" if code is None else code,
            "seconds": round(time.monotonic() - start),
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
            "commit": environment.commit(),
        }
        with files.atomic_write(result) as temporary:
            temporary.write_text(json.dumps(ended, indent=1) + "\n")
    return True


def _run_stage(stage: Stage, out: pathlib.Path, seconds: float) -> int | None:
    """Returns the exit code of a stage; None where it was told to stop as the time was over."""
    with (out / f"{stage.name}.txt").open("a" if stage.resumes else "w") as log:
        process = subprocess.Popen(
            stage.arguments, cwd=_ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            many_runs.terminate(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(_GRACE)
                return code if stage.resumes else None
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def page(todo: Sequence[Stage], out: pathlib.Path, device: str) -> str:
    """Returns what the stages printed last, in Markdown."""
    parts = [f"# On {device}\n"]
    for stage in todo:
        result, log = out / f"{stage.name}.json", out / f"{stage.name}.txt"
        if not result.exists():
            parts.append(f"## {stage.name}\n\nNot ended yet.\n")
            continue
        ended: dict[str, Any] = json.loads(result.read_text())
        lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        parts.append(
            f"## {stage.name}\n\n{ended['date']}, commit {ended['commit'] or 'unknown'}, "
            f"{ended['seconds']} s in the last call, exit code {ended['exit_code']}:\n\n"
            + "".join(f"    {line}\n" for line in lines)
        )
    return "\n".join(parts)


def _device() -> str:
    """Returns the names of JAX's devices. Another process asks: one that asks keeps the memory."""
    asked = "import jax; print(*(d.device_kind for d in jax.devices()), sep=', ')"
    found = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"JAX finds no device: {found.stderr.strip().splitlines()[-1]}")
    return found.stdout.strip()


def main(_: Any) -> None:
    """Runs the command."""
    options = flags.FLAGS
    with command.user_errors():
        if options.vit and not options.cub:
            raise ValueError(f"--vit={options.vit} goes with --cub")
        if options.cub and not pathlib.Path(options.cub).is_dir():
            raise ValueError(f"--cub={options.cub}: no such folder")
        out = pathlib.Path(options.out).absolute()
        out.mkdir(parents=True, exist_ok=True)
        todo = stages(options.cub, options.pretrained, options.vit, out)
        device = _device()
        is_done = run(todo, out, 60 * options.minutes - _GRACE)
        with files.atomic_write(out / "README.md") as temporary:
            temporary.write_text(page(todo, out, device))
        print(f"{'done' if is_done else 'not done: run the same command again'}: {out}/README.md")
        if not is_done:
            sys.exit(signals.RUN_AGAIN)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The folder of the results.", required=True)
    flags.DEFINE_float("minutes", 9.0, "How long a call takes at most.", lower_bound=1.0)
    flags.DEFINE_string("cub", "", "The folder of CUB-200-2011. Empty: no training.")
    flags.DEFINE_string(
        "pretrained", "", "Weights of the ResNet-50. Empty: those of cub_modern.flags, by the hub."
    )
    flags.DEFINE_string("vit", "", "Weights of the ViT-S of cub_modern_vit.flags. Empty: no ViT.")
    app.run(main, flags_parser=command.parse_flags)
