"""How a run ends early and goes on: being told to stop, and the last checkpoint that can be read."""

import contextlib
import signal
import subprocess
import sys
import uuid

import jax
from jax.experimental import multihost_utils
import numpy as np

from experiments.engine import logs
from rll_jax.training import checkpoint

RUN_AGAIN = 75  # the exit code of a run that was told to stop and has saved its state (EX_TEMPFAIL)

_WATCH = """
import signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if not sys.stdin.read():
    sys.stderr.write(sys.argv[1])
"""


@contextlib.contextmanager
def last_word():
    """Has a process of its own say what happened where this one cannot: gloo and JAX's coordination abort it when another has gone."""
    told = "error: this process was aborted, as happens where another process of this run has gone: the same command goes on from the last checkpoint\n"
    watch = subprocess.Popen(
        [sys.executable, "-ISc", _WATCH, told], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        watch.communicate(b"ended")


def restore(workdir, config, runner, state):
    """The state of the last checkpoint that can be read, its step, and the best score then; the fresh state, 0 and -1 where there is none."""
    directory, damaged = workdir / "checkpoints", []
    restored, start, best_score = state, 0, -1.0
    if directory.is_dir():
        with checkpoint.Checkpoints(directory, read_only=True) as saved:
            for step in reversed(saved.all_steps()):
                try:
                    restored = runner.replicate(saved.restore(step, runner.to_global(state)))
                    start, best_score = step, saved.metadata(step).get("best_score", -1.0)
                    break
                except (
                    Exception
                ) as error:  # orbax, tensorstore and json have their own for each kind of damage
                    damaged.append(
                        (step, str(error).splitlines()[0] if str(error) else repr(error))
                    )
    if damaged and not start:
        steps = ", ".join(str(step) for step, _ in damaged)
        raise logs.BadRun(
            f"none of the checkpoints of {workdir} can be read (steps {steps}): {damaged[0][1]}; remove {directory} to begin again"
        )
    for step, reason in damaged:
        aside = workdir / "damaged_checkpoints" / f"{step}-{uuid.uuid4().hex[:8]}"
        if jax.process_index() == 0:
            aside.parent.mkdir(exist_ok=True)
            (directory / str(step)).rename(aside)
            print(
                f"the checkpoint of step {step} cannot be read and was moved to {aside}: {reason[:300]}",
                file=sys.stderr,
                flush=True,
            )
    multihost_utils.sync_global_devices("restored")
    return restored, start, best_score


def end_on_sigterm() -> None:
    """What SIGTERM does where there is nothing to save yet, or all is saved: half-written files go, and the exit code says: run me again."""

    def end(*_):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.exit(RUN_AGAIN)

    signal.signal(signal.SIGTERM, end)


@contextlib.contextmanager
def told_to_stop(every: int):
    """A function of the step: whether SIGTERM has come, to any process (asked every so many steps); a second one ends a process at once."""
    told = []

    def note(*_):
        told.append(True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def stop(step):
        if jax.process_count() == 1:
            return bool(told)
        return step % every == 0 and bool(
            multihost_utils.process_allgather(np.array(bool(told))).any()
        )

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
