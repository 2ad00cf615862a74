"""Ranked List Loss in its variants beside other losses, on equal terms: one table and one plot.

    python -m experiments.compare --flagfile=experiments/flagfiles/emoji_compare.flags

Takes all options of an experiment, of the set that --dataset names, but for those of the loss. Equal terms: the network, the batches, the
steps, the optimiser and the budget of tuning are the same for all. That budget is one run for each of --rates, with --tuning_steps steps,
that searches --tuning_share of the training classes, which it does not train on; while the best of them is the lowest or the highest, one
more beyond it by the same factor, --more_rates at most. The best then trains on all training classes, once for each of --seeds, and only
these runs look at the test classes. Everything else of a loss is as its paper or its library has it, see ENTRIES.

The same command goes on where it stopped, also with more seeds. It ends in compare.md, compare.json and compare.png in --workdir, or
in --out.
"""

import dataclasses
import json
import pathlib
import shlex
import signal
import statistics
import sys
import time
from typing import NamedTuple

from absl import app, flags
import numpy as np

from experiments.engine import config as config_lib
from experiments.engine import logs, many_runs, measuring


class Entry(NamedTuple):
    title: str
    options: dict


def _other(loss: str, **options) -> dict:
    return {
        "loss": loss,
        "loss_options": ",".join(f"{name}={value}" for name, value in options.items()),
    }


# The first is what the others are compared with.
ENTRIES = {
    "rll": Entry("Ranked List Loss (CVPR 2019)", {}),
    "rll_both_ends": Entry("... gradient at both ends of a pair", {"gallery_gradient": True}),
    "rll_weights": Entry("... weights differentiated", {"weight_gradient": True}),
    "rll_both_weights": Entry(
        "... both of these: the value's true derivative",
        {"gallery_gradient": True, "weight_gradient": True},
    ),
    "rll_2020": Entry("... queries weighted by mass (2020 layer)", {"query_weighting": "mass"}),
    "rll_2019": Entry(
        "... and squared distances (2019 layer)",
        {"query_weighting": "mass", "pair_term": "squared"},
    ),
    "rll_t0": Entry("... T_n = 0", {"temperature_neg": 0.0}),
    "rll_t5": Entry("... T_n = 5", {"temperature_neg": 5.0}),
    "rll_t20": Entry("... T_n = 20", {"temperature_neg": 20.0}),
    "rll_lmh": Entry("... levels L, M and H: three times the dimensions", {"levels": "L,M,H"}),
    "pml_rll": Entry("pytorch-metric-learning 2.9's RankedListLoss", _other("pml_ranked_list")),
    "contrastive": Entry("Contrastive", _other("contrastive")),
    "triplet_semihard": Entry("Triplet, semi-hard", _other("triplet", mining="semihard")),
    "triplet_hard": Entry("Triplet, batch-hard", _other("triplet", mining="hard")),
    "lifted": Entry("Lifted structure", _other("lifted_structure")),
    "n_pair": Entry("N-pair, cosines times 10", _other("n_pair", scale=10.0)),
    "multi_similarity": Entry("Multi-similarity", _other("multi_similarity")),
    "proxy_anchor": Entry(
        "Proxy anchor, proxies at 100 times the rate",
        _other("proxy_anchor") | {"proxy_lr_multiplier": 100.0},
    ),
    "nt_xent": Entry("NT-Xent", _other("nt_xent")),
    "sup_con": Entry("SupCon", _other("sup_con")),
}
_VARIED = tuple(
    sorted({name for entry in ENTRIES.values() for name in entry.options if name != "levels"})
)
_TITLES = {"recall@1": "Recall@1", "map@r": "MAP@R"}  # of the scores


# ---- What is to be run
def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")] if text else list(ENTRIES)
    if unknown := [name for name in names if name not in ENTRIES]:
        raise ValueError(
            f"--only={text}: expected some of {', '.join(ENTRIES)}, found {', '.join(unknown)}"
        )
    return [name for name in ENTRIES if name in names]


def _rates(text: str) -> list[float]:
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = []
    if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
        raise ValueError(
            f"--rates={text}: expected learning rates with commas between, each once, such as 1e-3,3e-3"
        )
    return rates


def _runs_to_tune(
    base: dict, names: list[str], rates: list[float], share: float, steps: int
) -> dict[tuple[str, float], config_lib.Config]:
    folder = pathlib.Path(base["workdir"]) / "tuning"
    tuning = {"validation_share": share, "steps": steps or base["steps"]}
    return {
        (name, rate): config_lib.Config(
            **base
            | ENTRIES[name].options
            | tuning
            | {"learning_rate": rate, "workdir": str(folder / name / f"rate={rate:g}")}
        )
        for name in names
        for rate in rates
    }


def _tuned(
    base: dict, names: list[str], options, execute
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The best rate of each that has one, by --choose_by (the lower where two are alike), and the rates tried for each."""
    first = sorted(_rates(options.rates))
    factor = (first[-1] / first[0]) ** (1 / (len(first) - 1)) if len(first) > 1 else 3.0
    tried = {name: list(first) for name in names}
    for _ in range(options.more_rates + 1):
        runs = {}
        for name, rates in tried.items():
            runs |= _runs_to_tune(base, [name], rates, options.tuning_share, options.tuning_steps)
        execute(list(runs.values()))
        found = {
            key: scores[options.choose_by]
            for key, run in runs.items()
            if (scores := many_runs.scores(run))
        }
        best = {
            name: max(
                (rate for n, rate in found if n == name),
                key=lambda rate: (found[name, rate], -rate),
                default=None,
            )
            for name in names
        }
        at_an_end = {
            name: rate
            for name, rate in best.items()
            if rate in (min(tried[name]), max(tried[name]))
        }
        growing = {
            name: rate
            for name, rate in at_an_end.items()
            if len(tried[name]) < len(first) + options.more_rates
        }
        for name, rate in growing.items():
            beyond = rate / factor if rate == min(tried[name]) else rate * factor
            tried[name].append(float(f"{beyond:.1g}"))
        if not growing:
            break
    return {name: rate for name, rate in best.items() if rate is not None}, tried


def _runs_to_compare(
    base: dict, rates: dict[str, float], seeds: int
) -> dict[tuple[str, int], config_lib.Config]:
    """All of the first seed first, so that a table of fewer seeds is there early."""
    folder = pathlib.Path(base["workdir"]) / "runs"
    return {
        (name, seed): config_lib.Config(
            **base
            | ENTRIES[name].options
            | {
                "learning_rate": rate,
                "seed": seed,
                "workdir": str(folder / name / f"rate={rate:g},seed={seed}"),
            }
        )
        for seed in range(base["seed"], base["seed"] + seeds)
        for name, rate in rates.items()
    }


# ---- The table and the plot
def _rows(compared: dict, rates: dict[str, float], names: list[str]) -> list[dict]:
    """A dict for each entry; differences to the first are paired by seed."""
    found = {name: {} for name in names}
    for (name, seed), run in compared.items():
        if scores := many_runs.scores(run):
            found[name][seed] = scores
    rows, first = [], found[names[0]]
    for name, of_seeds in found.items():
        row = {
            "name": name,
            "title": ENTRIES[name].title,
            "learning_rate": rates.get(name),
            "seeds": list(of_seeds),
        }
        for score in _TITLES:
            values = [100 * scores[score] for scores in of_seeds.values()]
            paired = [
                100 * (scores[score] - first[seed][score])
                for seed, scores in of_seeds.items()
                if seed in first
            ]
            row[score] = {**_summary(values), "difference": _summary(paired)}
        rows.append(row)
    return rows


def _summary(values: list[float]) -> dict:
    """Mean, standard deviation (n - 1) and the half width of the mean's 95 % interval by Student's t."""
    from scipy import stats  # a second to import

    std = statistics.stdev(values) if len(values) > 1 else None
    half = (
        None
        if std is None
        else float(stats.t.ppf(0.975, len(values) - 1)) * std / len(values) ** 0.5
    )
    return {
        "values": values,
        "mean": statistics.fmean(values) if values else None,
        "std": std,
        "half": half,
    }


def _as_markdown(rows: list[dict], about: str, untrained: dict[str, float] | None = None) -> str:
    first = rows[0]["title"]
    lines = [
        f"# {len(rows)} losses on equal terms\n",
        about,
        f"Percent, mean ± standard deviation over seeds. The difference is to “{first}”, paired by seed, ± half of its 95 % interval: one that "
        "reaches over 0 is noise, as far as so many seeds tell. The intervals are each for itself, and leave out the noise of tuning.\n",
        "| loss | rate | Recall@1 | difference | MAP@R | difference | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["title"],
            "failed" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
        ]
        for score in _TITLES:
            cells += [
                _cell(row[score], "std"),
                _cell(row[score]["difference"], "half", "+") if row is not rows[0] else "",
            ]
        lines.append(f"| {' | '.join([*cells, str(len(row['seeds']))])} |")
    if untrained:
        lines.append(
            f"| the network before its first step | | {100 * untrained['recall@1']:.1f} | | {100 * untrained['map@r']:.1f} | | 1 |"
        )
    return "\n".join(lines) + "\n"


def _untrained(run: config_lib.Config) -> dict[str, float] | None:
    """The scores of its first line, before any step."""
    written = pathlib.Path(run.workdir, "metrics.jsonl")
    first = json.loads(written.open().readline()) if written.exists() else {}
    return first if first.get("step") == 0 and "recall@1" in first else None


def _cell(summary, spread, sign=""):
    if summary["mean"] is None:
        return "-"
    return f"{summary['mean']:{sign}.1f}" + (
        f" ± {summary[spread]:.1f}" if summary[spread] is not None else ""
    )


def _plot(rows: list[dict], path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.3 * len(rows)), layout="constrained")
    places = np.arange(len(rows))[::-1]
    for axes, (score, label) in zip(
        figure.subplots(1, 2, sharey=True), _TITLES.items(), strict=True
    ):
        for place, row in zip(places, rows):
            summary, colour = row[score], "C0" if row["name"].startswith("rll") else "C1"
            axes.plot(
                summary["values"], [place] * len(summary["values"]), ".", color=colour, alpha=0.35
            )
            if summary["mean"] is not None:
                axes.errorbar(
                    summary["mean"],
                    place,
                    xerr=summary["std"] or 0,
                    fmt="o",
                    color=colour,
                    capsize=3,
                )
        if rows[0][score]["mean"] is not None:
            axes.axvline(rows[0][score]["mean"], color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel=f"{label}, percent: mean, standard deviation, seeds")
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].set_yticks(places, [row["title"] for row in rows])
    figure.savefig(path, dpi=110, format="png")


def _about(base: dict, options, budget: str) -> str:
    environment = json.loads(logs.environment())
    command = shlex.join(["python", "-m", "experiments.compare", *sys.argv[1:]])
    what = f"{base['dataset']}, {base['backbone']}, {base['image_size']} px, {base['levels']} of {base['embedding_dim']} dimensions, batches of "
    what += f"{base['classes_per_batch']} x {base['images_per_class']}, {base['steps']} steps of {base['optimizer']}"
    return (
        f"    {command}\n\n{what}. Tuning of each: {budget}.\n\n{time.strftime('%F')}, {measuring.machine().rpartition(',')[0]}, "
        f"commit {environment['commit'] or 'unknown'}.\n"
    )


def main(_):
    options = flags.FLAGS
    with config_lib.mistakes_in_one_line():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        names, rates = _names(options.only), _rates(options.rates)
        base = many_runs.base_options() | {"report": options["report"].present and options.report}
        usual = {field.name: field.default for field in dataclasses.fields(config_lib.Config)}
        if taken := [
            name
            for name in (*_VARIED, "validation_share", "learning_rate")
            if base[name] != usual[name]
        ]:
            raise ValueError(f"--{taken[0]} is for the comparison to choose: leave it out")
        out = pathlib.Path(options.out or base["workdir"])
        if options.out and not out.is_dir():
            raise ValueError(f"--out={options.out}: no such folder")
        # refused before the first run begins, if at all
        _runs_to_tune(base, names, rates, options.tuning_share, options.tuning_steps)
        _runs_to_compare(base, dict.fromkeys(names, rates[0]), options.seeds)
        terms = {
            name: str(options[name].value)
            for name in ("rates", "more_rates", "choose_by", "tuning_share", "tuning_steps")
        }
        many_runs.claim("compare", base | terms, [("seeds", options.seeds), ("only", options.only)])
        failed = {}

        def execute(runs):
            failed.update(
                many_runs.execute_all(runs, keep_going=options.keep_going, jobs=options.jobs)
            )

        chosen, tried = _tuned(base, names, options, execute)
        compared = _runs_to_compare(base, chosen, options.seeds)
        execute(list(compared.values()))
        steps = options.tuning_steps or base["steps"]
        budget = (
            f"rates {options.rates}, the best by {_TITLES[options.choose_by]}, and up to {options.more_rates} more while the best is at an end "
            f"({max(map(len, tried.values()))} at most were tried), a run of {steps} steps each, of one seed, on {options.tuning_share:.0%} of "
            "the training classes held out"
        )
        rows = _rows(compared, chosen, names)
        text = _as_markdown(
            rows,
            _about(base, options, budget),
            next(filter(None, map(_untrained, compared.values())), None),
        )
        contents = {"compare.md": text, "compare.json": json.dumps(rows, indent=1) + "\n"}
        for name, content in contents.items():
            with config_lib.written_whole(out / name) as aside:
                aside.write_text(content)
        with config_lib.written_whole(out / "compare.png") as aside:
            _plot(rows, aside)
        print(text + f"written: {out / 'compare.md'}, compare.json and compare.png")
    sys.exit(1 if failed else 0)


def define_flags(flag_values=flags.FLAGS) -> None:
    config_lib.define_flags(workdir="runs/compare", flag_values=flag_values)
    own = {"flag_values": flag_values}
    flags.DEFINE_string(
        "only", "", f"entries, with commas between ({', '.join(ENTRIES)}); empty: all", **own
    )
    flags.DEFINE_string("rates", "2e-3,6e-3,2e-2", "learning rates tried for each entry", **own)
    flags.DEFINE_integer(
        "more_rates", 3, "beyond those, while the best is at an end", lower_bound=0, **own
    )
    flags.DEFINE_enum(
        "choose_by",
        "recall@1",
        list(_TITLES),
        "score of those classes held out by which the rate is chosen",
        **own,
    )
    flags.DEFINE_float(
        "tuning_share",
        0.3,
        "of the training classes, searched when tuning",
        lower_bound=0.01,
        upper_bound=0.9,
        **own,
    )
    flags.DEFINE_integer(
        "tuning_steps",
        0,
        "of a run of the tuning; 0: as many as of the others",
        lower_bound=0,
        **own,
    )
    flags.DEFINE_integer(
        "seeds", 5, "runs of each entry, of the seeds from --seed on", lower_bound=1, **own
    )
    flags.DEFINE_string("out", "", "folder for the table and the plot; empty: the workdir", **own)
    many_runs.define_flags(flag_values)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=config_lib.parse_flags)
