"""Many runs of experiments, each a process of its own, that go on where they stopped: what sweeps and comparisons are made of."""

from concurrent import futures
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time

from absl import flags

from experiments.engine import config as config_lib
from experiments.engine import datasets

FIELDS = tuple(field.name for field in dataclasses.fields(config_lib.Config))
_USUAL = {
    "backbone": "resnet50",
    "image_size": 224,
}  # where the set is not the emoji and nothing is said, as in its own command


def define_flags(flag_values=flags.FLAGS) -> None:
    """Those of every command that has many runs."""
    flags.DEFINE_bool(
        "keep_going",
        False,
        "go on after a run that fails, and list it in the table",
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "jobs",
        1,
        "runs at a time, each on its share of the CPU cores",
        lower_bound=1,
        flag_values=flag_values,
    )


def base_options() -> dict:
    """{option: value} of the flags, those of the data set's own command where nothing is said; raises ValueError for --dry_run."""
    options = flags.FLAGS
    if options.dry_run:
        raise ValueError("--dry_run is of one run: give it to the data set's own command")
    base = {name: options[name].value for name in FIELDS}
    return base | {
        name: value
        for name, value in _USUAL.items()
        if base["dataset"] != "emoji" and not options[name].present
    }


def claim(
    kind: str, base: dict, given: list[tuple[str, object]], swept: tuple[str, ...] = ()
) -> None:
    """Writes KIND.flags, which repeats the command; raises ValueError where the folder holds another such or anything else.

    Args:
      base: the options that all runs share, but for those in `swept`, and what else must not change.
      given: other flags of the command, which may change when it goes on.
    """
    folder = pathlib.Path(base["workdir"])
    path = folder / f"{kind}.flags"
    here = {name: str(value) for name, value in base.items() if name not in swept}
    if path.exists():
        there = dict(
            line.removeprefix("--").partition("=")[::2] for line in path.read_text().splitlines()
        )
        differing = [
            f"--{name}={there.get(name, '(swept)')} there, {here.get(name, '(swept)')} here"
            for name in {**dict.fromkeys(FIELDS), **here}
            if there.get(name) != here.get(name) and name not in config_lib.FREE_TO_CHANGE
        ]
        if differing:
            raise ValueError(
                f"--workdir={folder} holds another {kind} ({'; '.join(differing)}): choose another --workdir"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"--workdir={folder} is in use and holds no {kind} to resume: choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with config_lib.written_whole(path) as aside:
        aside.write_text("".join(f"--{name}={value}\n" for name, value in [*here.items(), *given]))


def command(run: config_lib.Config) -> list[str]:
    usual, options = dataclasses.asdict(config_lib.Config()), dataclasses.asdict(run)
    module = run.dataset if run.dataset in datasets.SOURCES else "folder"  # any would do for tfds
    given = [
        f"--{name}={value}"
        for name, value in options.items()
        if value != usual[name] or name in _USUAL
    ]
    return [sys.executable, "-m", f"experiments.{module}", *given]


def name(run: config_lib.Config) -> str:
    return " ".join(pathlib.Path(run.workdir).parts[-2:])


def scores(run: config_lib.Config) -> dict[str, float] | None:
    """Those of its last step, or None where it has not come to its end: to that step's scores, and its report."""
    written = pathlib.Path(run.workdir, "metrics.jsonl")
    if not written.exists() or run.report and not written.with_name("report.html").exists():
        return None
    entries = map(json.loads, written.read_text().split("\n")[:-1])
    last = next(
        (entry for entry in entries if entry["step"] == run.steps and "recall@1" in entry), None
    )
    return last and {
        name: value for name, value in last.items() if name not in ("step", "queries_without_match")
    }


def execute_all(
    runs: list[config_lib.Config], *, keep_going: bool, jobs: int = 1
) -> dict[str, str]:
    """{workdir: why} of those that failed; ends the program at the first unless `keep_going`.

    Where a run is interrupted or fails, the same call goes on from its last checkpoint. Compiled programs are shared, in `compiled` beside
    the runs' folders, unless the environment says where.
    """
    failed, live, over = {}, set(), threading.Event()
    divided = jobs > 1 and hasattr(os, "sched_setaffinity")  # Linux alone has it
    cores, shares = sorted(os.sched_getaffinity(0)) if divided else [], queue.SimpleQueue()
    for i in range(jobs):
        shares.put(cores[i::jobs] or cores)

    def one(number, run):
        if over.is_set():
            return
        at, log, code, start = (
            f"{number}/{len(runs)} {name(run)}",
            pathlib.Path(f"{run.workdir}.log"),
            0,
            time.time(),
        )
        if due := scores(run) is None:
            print(f"{at}: running, see {log}", flush=True)
            share = shares.get()
            try:
                if divided:
                    os.sched_setaffinity(
                        0, share
                    )  # of this thread, and of the process that it begins
                code = _execute(run, log, live, over)
            finally:
                shares.put(share)
        if over.is_set():
            return
        if code == 0:
            took = f"{time.time() - start:.0f} s" if due else "finished before"
            print(f"{at}: recall@1 {100 * scores(run)['recall@1']:.1f}  ({took})", flush=True)
            return
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        failed[run.workdir] = f"exit code {code}: {''.join(last).removeprefix('error: ')}"
        print(f"error: {at}: {failed[run.workdir]}", file=sys.stderr, flush=True)
        if not keep_going:
            over.set()
            sys.exit(2 if code == 2 else 1)

    pool = futures.ThreadPoolExecutor(jobs)
    waiting = [pool.submit(one, number, run) for number, run in enumerate(runs, start=1)]
    try:
        for number, (future, run) in enumerate(zip(waiting, runs), start=1):
            future.result()
    except KeyboardInterrupt:
        over.set()
        print(
            f"stopped at {number}/{len(runs)} {name(run)}: the same command goes on from there",
            flush=True,
        )
        raise
    finally:
        over.set()
        for process in list(live):
            _end(process)
        pool.shutdown(cancel_futures=True)
    return failed


def _end(process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, signal.SIGTERM)  # the processes that read for it too


def _execute(run: config_lib.Config, log: pathlib.Path, live: set, over: threading.Event) -> int:
    """The run's exit code; it goes on from its last checkpoint by itself."""
    log.parent.mkdir(parents=True, exist_ok=True)
    shared = {
        "JAX_COMPILATION_CACHE_DIR": str(log.parents[1] / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    environment = (shared if run.compilation_cache else {}) | os.environ
    with log.open("ab") as out:
        try:
            fcntl.flock(
                out, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the run inherits it, so it is held while the run lives
        except BlockingIOError:
            raise ValueError(
                f"{name(run)} is being run by another process: wait for that, or end it"
            )
        process = subprocess.Popen(
            command(run),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=environment,
        )
        live.add(process)
        if over.is_set():  # between its beginning and this
            _end(process)
        try:
            return process.wait()
        finally:
            live.discard(process)
