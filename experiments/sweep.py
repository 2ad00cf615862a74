"""An experiment for each value of some options and for some seeds, one after the other, and one table of them all.

    python -m experiments.sweep --flagfile=experiments/flagfiles/emoji.flags --sweep=margin=0.2,0.4,0.6 --seeds=3 --workdir=runs/margins

Takes all options of an experiment, of the set that --dataset names. --sweep may be given again: all combinations are run. Values that
contain commas have semicolons between: '--sweep=levels=H;L,M,H'. The same command goes on where it stopped, also with more values or seeds.
--commands prints the commands of the runs that are left, for a cluster; the same without it then makes the table of means and standard
deviations (n - 1), on stdout, in sweep.md and in sweep.json.
"""

import itertools
import json
import pathlib
import shlex
import signal
import statistics
import sys
import urllib.parse

from absl import app, flags

from experiments.engine import config as config_lib
from experiments.engine import many_runs


# ---- What is to be run: all of it checked before the first run begins
def _axis(text: str) -> tuple[str, list]:
    """An option and its values, from NAME=VALUE,VALUE,..."""
    name, equals, values = text.partition("=")
    if not equals or name not in many_runs.FIELDS or name in ("dataset", "seed", "workdir"):
        raise ValueError(
            f"--sweep={text}: expected NAME=VALUE,VALUE,... of an option of the runs other than dataset, seed and workdir"
        )
    try:
        return name, [
            flags.FLAGS[name].parser.parse(value)
            for value in values.split(";" if ";" in values else ",")
        ]
    except ValueError as error:
        raise ValueError(f"--sweep={text}: {error}")


def _plan(base: dict, axes: list[tuple[str, list]], seeds: int) -> list[config_lib.Config]:
    names, runs = [name for name, _ in axes], {}
    for values in itertools.product(*(values for _, values in axes)):
        swept = dict(zip(names, values))
        parts = (
            f"{name}={urllib.parse.quote(str(swept[name]), safe=',+ ')}" for name in sorted(swept)
        )
        folder = pathlib.Path(base["workdir"]) / (",".join(parts) or "base")
        if len(swept) < len(names) or folder in runs:
            raise ValueError(f"--sweep: an option or a value is there twice: {folder.name}")
        try:
            runs[folder] = [
                config_lib.Config(
                    **base | swept | {"seed": seed, "workdir": str(folder / f"seed={seed}")}
                )
                for seed in range(base["seed"], base["seed"] + seeds)
            ]
        except ValueError as error:
            raise ValueError(f"{folder.name}: {error}")
    return list(itertools.chain(*runs.values()))


# ---- The table
def _rows(runs: list[config_lib.Config], names: list[str], failed: dict[str, str]) -> list[dict]:
    rows = []
    for _, group in itertools.groupby(runs, key=lambda run: pathlib.Path(run.workdir).parent):
        group = list(group)
        found = {run.seed: many_runs.scores(run) for run in group if run.workdir not in failed}
        scores = {}
        for name in next(iter(found.values()), {}):
            values = [of_seed[name] for of_seed in found.values()]
            std = statistics.stdev(values) if len(values) > 1 else None
            scores[name] = {"mean": statistics.fmean(values), "std": std, "values": values}
        why = {run.seed: failed[run.workdir] for run in group if run.workdir in failed}
        rows.append(
            {
                "options": {name: getattr(group[0], name) for name in names},
                "seeds": list(found),
                "failed": why,
                "scores": scores,
            }
        )
    return rows


def _as_text(rows: list[dict]) -> str:
    """Markdown, in percent."""
    lines = [[*rows[0]["options"], "recall@1", "±", "map@r", "±", "seeds"]]
    for row in rows:
        parts = [
            row["scores"].get(name, {}).get(part)
            for name in ("recall@1", "map@r")
            for part in ("mean", "std")
        ]
        cells = ["-" if part is None else f"{100 * part:.1f}" for part in parts]
        lines.append(
            [
                *map(str, row["options"].values()),
                *cells,
                f"{len(row['seeds'])}" + f", {len(row['failed'])} failed" * bool(row["failed"]),
            ]
        )
    widths = [max(2, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |\n"
        for line in lines
    )


def main(_):
    options = flags.FLAGS
    with config_lib.mistakes_in_one_line():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's way to interrupt
        axes = [_axis(text) for text in options.sweep]
        base = many_runs.base_options()
        runs = _plan(base, axes, options.seeds)
        given = [("seeds", options.seeds), *(("sweep", text) for text in options.sweep)]
        many_runs.claim("sweep", base, given, swept=tuple(name for name, _ in axes))
        if options.commands:
            print(
                "".join(
                    shlex.join(many_runs.command(run)) + "\n"
                    for run in runs
                    if many_runs.scores(run) is None
                ),
                end="",
            )
            return
        failed = many_runs.execute_all(runs, keep_going=options.keep_going, jobs=options.jobs)
        rows = _rows(runs, [name for name, _ in axes], failed)
        for name, text in {
            "sweep.json": json.dumps(rows, indent=1) + "\n",
            "sweep.md": _as_text(rows),
        }.items():
            with config_lib.written_whole(pathlib.Path(base["workdir"], name)) as aside:
                aside.write_text(text)
        print(
            _as_text(rows) + f"written: {pathlib.Path(base['workdir'], 'sweep.md')} and sweep.json"
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    config_lib.define_flags(workdir="runs/sweep")
    flags.DEFINE_multi_string(
        "sweep", [], "an option and its values, NAME=VALUE,VALUE,...; may be given again"
    )
    flags.DEFINE_integer(
        "seeds", 1, "runs of each combination, of the seeds from --seed on", lower_bound=1
    )
    flags.DEFINE_bool(
        "commands", False, "print the commands of the runs that are left, instead of running them"
    )
    many_runs.define_flags()
    app.run(main, flags_parser=config_lib.parse_flags)
