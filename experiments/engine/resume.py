"""How a run ends early and resumes: SIGTERM, lost processes, and the last readable checkpoint."""

from collections.abc import Callable, Iterator
import contextlib
import pathlib
import signal
import subprocess
import sys
from typing import Any, NamedTuple
import uuid

import jax
from jax.experimental import multihost_utils
import numpy as np

from experiments.engine import processes
from experiments.engine.errors import RunError
from rll_jax.data import files
from rll_jax.training import checkpoint, devices, steps

_WATCH = """
import signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if not sys.stdin.read():
    sys.stderr.write(sys.argv[1])
"""
_ABORTED = (
    "error: this process was aborted, as happens where another process of this run has gone: the "
    "same command resumes from the last checkpoint\n"
)


@contextlib.contextmanager
def explain_abort() -> Iterator[None]:
    """Has another process explain an abort of this one.

    gloo and JAX's coordination service abort a process when another one of the run has gone.
    """
    watch = subprocess.Popen(
        [sys.executable, "-ISc", _WATCH, _ABORTED],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        watch.communicate(b"ended")


class Restored(NamedTuple):
    """What a run resumes from.

    Attributes:
      state: the state of the last readable checkpoint, or the fresh state.
      step: the step of the checkpoint, or 0.
      best_score: the best score by then, or -1.
    """

    state: steps.TrainState
    step: int = 0
    best_score: float = -1.0


def restore(workdir: pathlib.Path, runner: devices.Runner, fresh: steps.TrainState) -> Restored:
    """Restores the last checkpoint that can be read.

    Damaged checkpoints after it are moved to damaged_checkpoints/.

    Raises:
      RunError: there are checkpoints and none can be read.
    """
    directory = workdir / "checkpoints"
    restored, damaged = Restored(fresh), []
    if directory.is_dir():
        with checkpoint.Checkpoints(directory, read_only=True) as saved:
            restored, damaged = _last_readable(saved, runner, fresh)
    if damaged and not restored.step:
        all_steps = ", ".join(str(step) for step, _ in damaged)
        raise RunError(
            f"none of the checkpoints of {workdir} can be read (steps {all_steps}): "
            f"{damaged[0][1]}; remove {directory} to begin again"
        )
    if processes.is_first():
        for step, reason in damaged:
            _move_damaged(workdir, step, reason)
    multihost_utils.sync_global_devices("restored")
    return restored


def _last_readable(
    saved: checkpoint.Checkpoints, runner: devices.Runner, fresh: steps.TrainState
) -> tuple[Restored, list[tuple[int, str]]]:
    """Returns the last readable checkpoint, and (step, reason) of the damaged ones after it."""
    damaged = []
    for step in reversed(saved.all_steps()):
        try:
            state = runner.replicate(saved.restore(step, runner.to_global(fresh)))
            best_score = saved.metadata(step).get("best_score", -1.0)
        except Exception as error:  # orbax, tensorstore and json have their own kinds
            damaged.append((step, files.first_line(error)))
        else:
            return Restored(state, step, best_score), damaged
    return Restored(fresh), damaged


def _move_damaged(workdir: pathlib.Path, step: int, reason: str) -> None:
    target = workdir / "damaged_checkpoints" / f"{step}-{uuid.uuid4().hex[:8]}"
    target.parent.mkdir(exist_ok=True)
    (workdir / "checkpoints" / str(step)).rename(target)
    print(
        f"the checkpoint of step {step} cannot be read and was moved to {target}: {reason[:300]}",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def stop_requests(every: int) -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step: whether SIGTERM has come to any process of the run.

    A second SIGTERM ends a process at once.

    Args:
      every: several processes ask each other only at multiples of so many steps.
    """
    requested = False

    def note(*_: Any) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def stop_requested(step: int) -> bool:
        if jax.process_count() == 1:
            return requested
        if step % every:
            return False
        return bool(multihost_utils.process_allgather(np.array(requested)).any())

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield stop_requested
    finally:
        signal.signal(signal.SIGTERM, before)
