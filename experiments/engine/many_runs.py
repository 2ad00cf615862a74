"""Many runs of experiments, each a process, that resume where they stopped: sweeps, comparisons."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
import contextlib
import importlib.util
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from absl import flags

from experiments.engine import logs, options
from experiments.engine.config import OPTIONS, Config
from rll_jax.data import files

# The defaults of a dataset's own command where the dataset is not the emoji.
_DATASET_DEFAULTS = {"backbone": "resnet50", "image_size": 224}


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of every command that has many runs."""
    flags.DEFINE_bool(
        "keep_going",
        False,
        "Continue after a run that fails, and list it in the table.",
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "jobs",
        1,
        "The number of runs at a time, each on its share of the CPU cores.",
        lower_bound=1,
        flag_values=flag_values,
    )


def base_options() -> dict[str, Any]:
    """Returns {option: value} of the flags, with the defaults of the dataset's own command.

    Raises:
      ValueError: --dry_run, which is of one run.
    """
    values = flags.FLAGS
    if values.dry_run:
        raise ValueError("--dry_run is of one run: give it to the dataset's own command")
    base = {name: values[name].value for name in OPTIONS}
    if base["dataset"] != "emoji":
        base |= {
            name: value for name, value in _DATASET_DEFAULTS.items() if not values[name].present
        }
    return base


def claim_folder(
    kind: str,
    base: Mapping[str, Any],
    changeable: Iterable[tuple[str, object]],
    swept: Sequence[str] = (),
) -> None:
    """Writes KIND.flags into the workdir, a flagfile that repeats the command.

    Args:
      kind: "sweep", "compare" or "batch_size".
      base: what all runs share: options, and what else must not change.
      changeable: other flags of the command, which may change when it resumes.
      swept: the options of `base` that the runs do not share.

    Raises:
      ValueError: the folder holds another sweep or comparison, or anything else.
    """
    folder = pathlib.Path(base["workdir"])
    path = folder / f"{kind}.flags"
    texts = {name: options.to_text(value) for name, value in base.items() if name not in swept}
    if path.exists():
        if differing := _differences(path, texts):
            raise ValueError(
                f"--workdir={folder} holds another {kind} ({'; '.join(differing)}): choose another "
                "--workdir"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"--workdir={folder} is in use and holds no {kind} to resume: choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as temporary:
        lines = (f"--{name}={value}\n" for name, value in [*texts.items(), *changeable])
        options.write_flagfile(temporary, "".join(lines))


def _differences(path: pathlib.Path, now: Mapping[str, str]) -> list[str]:
    before: dict[str, str] = {}
    swept: set[str] = set()
    for line in options.read_flagfile(path):
        name, _, value = line.removeprefix("--").partition("=")
        before[name] = value
        if name == "sweep":
            swept.add(value.partition("=")[0])
    for name in OPTIONS.keys() - swept:  # the file may be older than some options
        before.setdefault(name, options.to_text(OPTIONS[name].metadata["earlier"]))
    return [
        f"--{name}={before.get(name, '(swept)')} there, {now.get(name, '(swept)')} here"
        for name in {**OPTIONS, **now}
        if before.get(name) != now.get(name)
        and not (name in OPTIONS and OPTIONS[name].free_on_resume)
    ]


def command(run: Config) -> list[str]:
    """Returns the command line of a run."""
    name = run.data.dataset  # tfds:NAME:VERSION may have dots
    own = name.isidentifier() and importlib.util.find_spec(f"experiments.{name}")
    module = name if own else "folder"
    given = [
        f"--{name}={options.to_text(value)}"
        for name, value in run.flat().items()
        if value != OPTIONS[name].default or name in _DATASET_DEFAULTS
    ]
    return [sys.executable, "-m", f"experiments.{module}", *given]


def run_name(run: Config) -> str:
    """Returns the last two folders of a run's workdir."""
    return " ".join(pathlib.Path(run.runtime.workdir).parts[-2:])


def scores(run: Config) -> dict[str, float] | None:
    """Returns the scores of a run's last step, or None where the run has not ended.

    A run has ended when it has the scores of its last step, and its report if it writes one.

    Raises:
      ValueError: as `logs.read_lines`.
    """
    written = pathlib.Path(run.runtime.workdir, "metrics.jsonl")
    if run.runtime.report and not written.with_name("report.html").exists():
        return None
    for entry in logs.read_lines(written):
        if entry["step"] == run.schedule.steps and "recall@1" in entry:
            unwanted = ("step", "queries_without_match")
            return {name: value for name, value in entry.items() if name not in unwanted}
    return None


def run_all(runs: Sequence[Config], *, keep_going: bool, jobs: int = 1) -> dict[str, str]:
    """Runs all runs that have not ended.

    Where a run is interrupted or fails, the same call resumes it from its last checkpoint. Compiled
    programs are shared, in compiled/ beside the runs' folders, unless the environment says where.

    Args:
      runs: the runs.
      keep_going: continue after a run that fails; otherwise end the program.
      jobs: the number of runs at a time.

    Returns:
      {workdir: reason} of the runs that failed.
    """
    pool = _Pool(runs, keep_going=keep_going, jobs=jobs)
    try:
        pool.wait()
    finally:
        pool.close()
    return pool.failed


class _Pool:
    """Runs in a pool of threads, each of which waits for a process."""

    def __init__(self, runs: Sequence[Config], *, keep_going: bool, jobs: int) -> None:
        self.failed: dict[str, str] = {}
        self._runs, self._keep_going = runs, keep_going
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._closed = threading.Event()
        self._core_shares = _core_shares(jobs)
        self._threads = futures.ThreadPoolExecutor(jobs)
        self._futures = [
            self._threads.submit(self._run_one, number, run)
            for number, run in enumerate(runs, start=1)
        ]

    def wait(self) -> None:
        """Waits for all runs; raises KeyboardInterrupt after it has said where it stopped."""
        for number, (future, run) in enumerate(zip(self._futures, self._runs, strict=True), 1):
            try:
                future.result()
            except KeyboardInterrupt:
                self._closed.set()
                place = f"{number}/{len(self._runs)} {run_name(run)}"
                print(f"stopped at {place}: the same command resumes there", flush=True)
                raise

    def close(self) -> None:
        """Ends the processes that still run."""
        self._closed.set()
        for process in list(self._processes):
            terminate(process)
        self._threads.shutdown(cancel_futures=True)

    def _run_one(self, number: int, run: Config) -> None:
        if self._closed.is_set():
            return
        place = f"{number}/{len(self._runs)} {run_name(run)}"
        log = pathlib.Path(f"{run.runtime.workdir}.log")
        begin, code = time.time(), 0
        ended_before = scores(run) is not None
        if not ended_before:
            print(f"{place}: running, see {log}", flush=True)
            code = self._execute_on_a_share(run, log)
        if self._closed.is_set():
            return
        if code == 0:
            took = "finished before" if ended_before else f"{time.time() - begin:.0f} s"
            last = scores(run)
            recall = 100 * last["recall@1"] if last else float("nan")
            print(f"{place}: recall@1 {recall:.1f}  ({took})", flush=True)
            return
        reason = f"exit code {code}: {_last_line(log)}"
        self.failed[run.runtime.workdir] = reason
        print(f"error: {place}: {reason}", file=sys.stderr, flush=True)
        if not self._keep_going:
            self._closed.set()
            sys.exit(2 if code == 2 else 1)

    def _execute_on_a_share(self, run: Config, log: pathlib.Path) -> int:
        cores = self._core_shares.get()
        try:
            if cores:
                # The affinity of this thread, which the process inherits.
                os.sched_setaffinity(0, cores)
            return self._execute(run, log)
        finally:
            self._core_shares.put(cores)

    def _execute(self, run: Config, log: pathlib.Path) -> int:
        """Returns the exit code of a run, which resumes from its last checkpoint by itself."""
        log.parent.mkdir(parents=True, exist_ok=True)
        shared = {}
        if run.runtime.compilation_cache:
            shared = {
                "JAX_COMPILATION_CACHE_DIR": str(log.parents[1] / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            }
        with contextlib.ExitStack() as stack:
            try:
                # The run inherits the file, so that the lock is held as long as the run lives.
                out = stack.enter_context(files.exclusive_lock(log, wait=False))
            except BlockingIOError:
                raise ValueError(
                    f"{run_name(run)} is being run by another process: wait for that, or end it"
                ) from None
            process = subprocess.Popen(
                command(run),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=shared | os.environ,
            )
            self._processes.add(process)
            if self._closed.is_set():  # between the process's beginning and this line
                terminate(process)
            try:
                return process.wait()
            finally:
                self._processes.discard(process)


def _core_shares(jobs: int) -> "queue.SimpleQueue[list[int]]":
    """Returns a share of the CPU cores for each job; empty shares where they cannot be set."""
    shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    settable = jobs > 1 and hasattr(os, "sched_setaffinity")  # Linux alone has it
    cores = sorted(os.sched_getaffinity(0)) if settable else []
    for job in range(jobs):
        shares.put(cores[job::jobs] or cores)
    return shares


def terminate(process: "subprocess.Popen[bytes]") -> None:
    """Sends SIGTERM to a process that leads a session of its own, and to all in it."""
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, signal.SIGTERM)  # the processes that read for it too


def _last_line(log: pathlib.Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else ""
