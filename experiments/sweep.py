"""An experiment for each value of some options and for some seeds, one after the other, and one table of them all.

    python -m experiments.sweep --flagfile=experiments/flagfiles/emoji.flags --sweep=margin=0.2,0.4,0.6 --seeds=3 --workdir=runs/margins

Takes all options of an experiment, of the set that --dataset names. --sweep may be given again: all combinations are run. Values that
contain commas have semicolons between: '--sweep=levels=H;L,M,H'. The same command goes on where it stopped, also with more values or seeds.
--commands prints the commands of the runs that are left, for a cluster; the same without it then makes the table of means and standard
deviations (n - 1), on stdout, in sweep.md and in sweep.json.
"""
import dataclasses
import fcntl
import itertools
import json
import os
import pathlib
import shlex
import signal
import statistics
import subprocess
import sys
import time
import urllib.parse

from absl import app, flags

from experiments import config as config_lib
from experiments import sources

_FIELDS = tuple(field.name for field in dataclasses.fields(config_lib.Config))
_USUAL = {"backbone": "resnet50", "image_size": 224}  # where the set is not the emoji and nothing is said, as in its own command


# ---- What is to be run: all of it checked before the first run begins
def _axis(text: str) -> tuple[str, list]:
    """An option and its values, from NAME=VALUE,VALUE,..."""
    name, equals, values = text.partition("=")
    if not equals or name not in _FIELDS or name in ("dataset", "seed", "workdir"):
        raise ValueError(f"--sweep={text}: expected NAME=VALUE,VALUE,... of an option of the runs other than dataset, seed and workdir")
    try:
        return name, [flags.FLAGS[name].parser.parse(value) for value in values.split(";" if ";" in values else ",")]
    except ValueError as error:
        raise ValueError(f"--sweep={text}: {error}")


def _plan(base: dict, axes: list[tuple[str, list]], seeds: int) -> list[config_lib.Config]:
    names, runs = [name for name, _ in axes], {}
    for values in itertools.product(*(values for _, values in axes)):
        swept = dict(zip(names, values))
        parts = (f"{name}={urllib.parse.quote(str(swept[name]), safe=',+ ')}" for name in sorted(swept))
        folder = pathlib.Path(base["workdir"]) / (",".join(parts) or "base")
        if len(swept) < len(names) or folder in runs:
            raise ValueError(f"--sweep: an option or a value is there twice: {folder.name}")
        try:
            runs[folder] = [
                config_lib.Config(**base | swept | {"seed": seed, "workdir": str(folder / f"seed={seed}")})
                for seed in range(base["seed"], base["seed"] + seeds)
            ]
        except ValueError as error:
            raise ValueError(f"{folder.name}: {error}")
    return list(itertools.chain(*runs.values()))


def _claim(base: dict, axes: list[tuple[str, list]]) -> None:
    """Writes sweep.flags, which repeats the sweep; raises ValueError where the folder holds another or anything else."""
    folder = pathlib.Path(base["workdir"])
    path, names = folder / "sweep.flags", [name for name, _ in axes]
    here = {name: str(value) for name, value in base.items() if name not in names}
    if path.exists():
        there = dict(line.removeprefix("--").partition("=")[::2] for line in path.read_text().splitlines())
        differing = [
            f"--{name}={there.get(name, '(swept)')} there, {here.get(name, '(swept)')} here"
            for name in _FIELDS
            if there.get(name) != here.get(name) and name not in config_lib.FREE_TO_CHANGE
        ]
        if differing:
            raise ValueError(f"--workdir={folder} holds another sweep ({'; '.join(differing)}): choose another --workdir")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--workdir={folder} is in use and holds no sweep to resume: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*here.items(), ("seeds", flags.FLAGS.seeds), *(("sweep", text) for text in flags.FLAGS.sweep)]
    with config_lib.written_whole(path) as aside:
        aside.write_text("".join(f"--{name}={value}\n" for name, value in lines))


# ---- The runs
def _command(run: config_lib.Config) -> list[str]:
    usual, options = dataclasses.asdict(config_lib.Config()), dataclasses.asdict(run)
    module = run.dataset if run.dataset in sources.SOURCES else "folder"  # any would do for tfds
    given = [f"--{name}={value}" for name, value in options.items() if value != usual[name] or name in _USUAL]
    return [sys.executable, "-m", f"experiments.{module}", *given]


def _name(run: config_lib.Config) -> str:
    return " ".join(pathlib.Path(run.workdir).parts[-2:])


def _scores(run: config_lib.Config) -> dict[str, float] | None:
    """Those of its last step, or None where it has not come to its end, which is its report."""
    if not pathlib.Path(run.workdir, "report.html").exists():
        return None
    entries = map(json.loads, pathlib.Path(run.workdir, "metrics.jsonl").read_text().splitlines())
    *_, last = (entry for entry in entries if "recall@1" in entry)
    return {name: value for name, value in last.items() if name not in ("step", "queries_without_match")}


def _execute(run: config_lib.Config, log: pathlib.Path) -> int:
    """The run's exit code; it goes on from its last checkpoint by itself."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the run inherits it, so it is held while the run lives
        except BlockingIOError:
            raise ValueError(f"{_name(run)} is being run by another process: wait for that, or end it")
        process = subprocess.Popen(_command(run), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        try:
            return process.wait()
        finally:
            if process.returncode is None:  # interrupted
                os.killpg(process.pid, signal.SIGTERM)  # the processes that read for it too
                process.wait()


def _execute_all(runs: list[config_lib.Config], keep_going: bool) -> dict[str, str]:
    """{workdir: why} of those that failed; ends the program at the first unless `keep_going`."""
    failed = {}
    for number, run in enumerate(runs, start=1):
        at, log, code, start = f"{number}/{len(runs)} {_name(run)}", pathlib.Path(f"{run.workdir}.log"), 0, time.time()
        if due := _scores(run) is None:
            print(f"{at}: running, see {log}", flush=True)
            try:
                code = _execute(run, log)
            except KeyboardInterrupt:
                print(f"stopped at {at}: the same command goes on from there", flush=True)
                raise
        if code == 0:
            took = f"{time.time() - start:.0f} s" if due else "finished before"
            print(f"{at}: recall@1 {100 * _scores(run)['recall@1']:.1f}  ({took})", flush=True)
            continue
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        failed[run.workdir] = f"exit code {code}: {''.join(last).removeprefix('error: ')}"
        print(f"error: {at}: {failed[run.workdir]}", file=sys.stderr, flush=True)
        if not keep_going:
            sys.exit(2 if code == 2 else 1)
    return failed


# ---- The table
def _rows(runs: list[config_lib.Config], names: list[str], failed: dict[str, str]) -> list[dict]:
    rows = []
    for _, group in itertools.groupby(runs, key=lambda run: pathlib.Path(run.workdir).parent):
        group = list(group)
        found = {run.seed: _scores(run) for run in group if run.workdir not in failed}
        scores = {}
        for name in next(iter(found.values()), {}):
            values = [of_seed[name] for of_seed in found.values()]
            std = statistics.stdev(values) if len(values) > 1 else None
            scores[name] = {"mean": statistics.fmean(values), "std": std, "values": values}
        why = {run.seed: failed[run.workdir] for run in group if run.workdir in failed}
        rows.append({"options": {name: getattr(group[0], name) for name in names}, "seeds": list(found), "failed": why, "scores": scores})
    return rows


def _as_text(rows: list[dict]) -> str:
    """Markdown, in percent."""
    lines = [[*rows[0]["options"], "recall@1", "±", "map@r", "±", "seeds"]]
    for row in rows:
        parts = [row["scores"].get(name, {}).get(part) for name in ("recall@1", "map@r") for part in ("mean", "std")]
        cells = ["-" if part is None else f"{100 * part:.1f}" for part in parts]
        lines.append([*map(str, row["options"].values()), *cells, f"{len(row['seeds'])}" + f", {len(row['failed'])} failed" * bool(row["failed"])])
    widths = [max(2, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "".join("| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |\n" for line in lines)


def main(_):
    options = flags.FLAGS
    with config_lib.mistakes_in_one_line():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's way to interrupt
        axes = [_axis(text) for text in options.sweep]
        base = {name: options[name].value for name in _FIELDS}
        base |= {name: value for name, value in _USUAL.items() if base["dataset"] != "emoji" and not options[name].present}
        runs = _plan(base, axes, options.seeds)
        _claim(base, axes)
        if options.commands:
            print("".join(shlex.join(_command(run)) + "\n" for run in runs if _scores(run) is None), end="")
            return
        failed = _execute_all(runs, options.keep_going)
        rows = _rows(runs, [name for name, _ in axes], failed)
        for name, text in {"sweep.json": json.dumps(rows, indent=1) + "\n", "sweep.md": _as_text(rows)}.items():
            with config_lib.written_whole(pathlib.Path(base["workdir"], name)) as aside:
                aside.write_text(text)
        print(_as_text(rows) + f"written: {pathlib.Path(base['workdir'], 'sweep.md')} and sweep.json")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    config_lib.define_flags(workdir="runs/sweep")
    flags.DEFINE_multi_string("sweep", [], "an option and its values, NAME=VALUE,VALUE,...; may be given again")
    flags.DEFINE_integer("seeds", 1, "runs of each combination, of the seeds from --seed on", lower_bound=1)
    flags.DEFINE_bool("commands", False, "print the commands of the runs that are left, instead of running them")
    flags.DEFINE_bool("keep_going", False, "go on after a run that fails, and list it in the table")
    app.run(main, flags_parser=config_lib.parse_flags)
