"""Runs an experiment for each value of some options and for some seeds, and makes one table.

    python -m experiments.sweep --sweep=margin=0.2,0.4,0.6 --seeds=3 --workdir=runs/margins

Takes all options of an experiment, on the dataset that --dataset names. --sweep may be given again:
all combinations are run. Values that contain commas are separated by semicolons:
'--sweep=levels=H;L,M,H'. The same command resumes, also with more values or seeds. --commands
prints the commands of the runs that are left, for a cluster; the same command without it then makes
the table of means and standard deviations (n - 1), on stdout, in sweep.md and in sweep.json.
"""

from collections.abc import Mapping, Sequence
import itertools
import json
import os
import pathlib
import shlex
import signal
import statistics
import sys
from typing import Any
import urllib.parse

from absl import app
from absl import flags as absl_flags

from experiments.engine import command, flags, many_runs, options
from experiments.engine.config import OPTIONS, Config, from_flat
from rll_jax.data import files

Axis = tuple[str, list[Any]]  # an option and its values


# ---- What is to be run: all of it is checked before the first run begins
def _axis(text: str) -> Axis:
    """Returns the option and the values of NAME=VALUE,VALUE,..."""
    name, equals, values = text.partition("=")
    if not equals or name not in OPTIONS or name in ("dataset", "seed", "workdir"):
        raise ValueError(
            f"--sweep={text}: expected NAME=VALUE,VALUE,... of an option of the runs other than "
            "dataset, seed and workdir"
        )
    parser = absl_flags.FLAGS[name].parser
    try:
        return name, [parser.parse(value) for value in values.split(";" if ";" in values else ",")]
    except ValueError as error:
        raise ValueError(f"--sweep={text}: {error}") from error


def _plan(base: Mapping[str, Any], axes: Sequence[Axis], seeds: int) -> list[Config]:
    names = [name for name, _ in axes]
    runs: dict[pathlib.Path, list[Config]] = {}
    for values in itertools.product(*(values for _, values in axes)):
        swept = dict(zip(names, values, strict=True))
        folder = pathlib.Path(base["workdir"]) / _folder_name(swept)
        if len(swept) < len(names) or folder in runs:
            raise ValueError(f"--sweep: an option or a value is there twice: {folder.name}")
        try:
            runs[folder] = [
                from_flat(
                    **{**base, **swept, "seed": seed, "workdir": str(folder / f"seed={seed}")}
                )
                for seed in range(base["seed"], base["seed"] + seeds)
            ]
        except ValueError as error:
            raise ValueError(f"{folder.name}: {error}") from error
    return list(itertools.chain(*runs.values()))


def _folder_name(swept: Mapping[str, Any]) -> str:
    parts = []
    for name in sorted(swept):
        value = os.fsencode(options.to_text(swept[name]))
        parts.append(f"{name}={urllib.parse.quote(value, safe=',+ ')}")
    return ",".join(parts) or "base"


# ---- The table
def _rows(
    runs: Sequence[Config], names: Sequence[str], failed: Mapping[str, str]
) -> list[dict[str, Any]]:
    rows = []
    for _, group in itertools.groupby(
        runs, key=lambda run: pathlib.Path(run.runtime.workdir).parent
    ):
        rows.append(_row(list(group), names, failed))
    return rows


def _row(
    group: Sequence[Config], names: Sequence[str], failed: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the row of the runs of one combination."""
    by_seed = {
        run.schedule.seed: many_runs.scores(run) or {}
        for run in group
        if run.runtime.workdir not in failed
    }
    scores = {}
    for name in next(iter(by_seed.values()), {}):
        values = [of_seed[name] for of_seed in by_seed.values()]
        std = statistics.stdev(values) if len(values) > 1 else None
        scores[name] = {"mean": statistics.fmean(values), "std": std, "values": values}
    reasons = {
        run.schedule.seed: failed[run.runtime.workdir]
        for run in group
        if run.runtime.workdir in failed
    }
    flat = group[0].flat()
    return {
        "options": {name: _plain(flat[name]) for name in names},
        "seeds": list(by_seed),
        "failed": reasons,
        "scores": scores,
    }


def _plain(value: Any) -> Any:
    return options.to_text(value) if isinstance(value, tuple) else value


def _as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table in Markdown, in percent."""
    lines = [[*rows[0]["options"], "recall@1", "±", "map@r", "±", "seeds"]]
    for row in rows:
        cells = []
        for name, part in itertools.product(("recall@1", "map@r"), ("mean", "std")):
            value = row["scores"].get(name, {}).get(part)
            cells.append("-" if value is None else f"{100 * value:.1f}")
        seeds = f"{len(row['seeds'])}"
        if row["failed"]:
            seeds += f", {len(row['failed'])} failed"
        lines.append([*map(str, row["options"].values()), *cells, seeds])
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "".join(
        "| "
        + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        + " |\n"
        for line in lines
    )


def _print_commands(runs: Sequence[Config]) -> None:
    for run in runs:
        if many_runs.scores(run) is None:
            print(shlex.join(many_runs.command(run)))


def main(_: Any) -> None:
    """Runs the command."""
    values = absl_flags.FLAGS
    with command.user_errors():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster interrupts by it
        axes = [_axis(text) for text in values.sweep]
        names = [name for name, _ in axes]
        base = many_runs.base_options()
        runs = _plan(base, axes, values.seeds)
        changeable = [("seeds", values.seeds), *(("sweep", text) for text in values.sweep)]
        many_runs.claim_folder("sweep", base, changeable, swept=names)
        if values.commands:
            _print_commands(runs)
            return
        failed = many_runs.run_all(runs, keep_going=values.keep_going, jobs=values.jobs)
        rows = _rows(runs, names, failed)
        folder = pathlib.Path(base["workdir"])
        texts = {"sweep.json": json.dumps(rows, indent=1) + "\n", "sweep.md": _as_text(rows)}
        for name, text in texts.items():
            with files.atomic_write(folder / name) as temporary:
                temporary.write_text(text)
        print(f"{_as_text(rows)}written: {folder / 'sweep.md'} and sweep.json")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    flags.define(workdir="runs/sweep")
    absl_flags.DEFINE_multi_string(
        "sweep", [], "An option and its values, NAME=VALUE,VALUE,... May be given again."
    )
    absl_flags.DEFINE_integer(
        "seeds", 1, "The number of runs of each combination, from --seed on.", lower_bound=1
    )
    absl_flags.DEFINE_bool(
        "commands",
        False,
        "Print the commands of the runs that are left, instead of running them.",
    )
    many_runs.define_flags()
    app.run(main, flags_parser=command.parse_flags)
