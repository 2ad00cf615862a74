"""Ranked List Loss in its variants beside other losses, on equal terms: one table and one plot.

    python -m experiments.compare --flagfile=experiments/flagfiles/emoji_compare.flags

Takes all options of an experiment, of the set that --dataset names, but for those of the loss. Equal terms: the network, the batches, the
steps, the optimiser and the budget of tuning are the same for all. That budget is one run for each of --rates, with --tuning_steps steps,
that searches --tuning_share of the training classes, which it does not train on; the best rate then trains on all training classes, once
for each of --seeds, and only these runs look at the test classes. Everything else of a loss is as published, see ENTRIES.

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

from experiments import config as config_lib
from experiments import logs, measuring
from experiments import runs as runs_lib


class Entry(NamedTuple):
    title: str
    options: dict


def _other(loss: str, **options) -> dict:
    return {"loss": loss, "loss_options": ",".join(f"{name}={value}" for name, value in options.items())}


# The first is what the others are compared with.
ENTRIES = {
    "rll": Entry("Ranked List Loss (CVPR 2019)", {}),
    "rll_both_ends": Entry("... gradient at both ends of a pair", {"gallery_gradient": True}),
    "rll_weights": Entry("... weights differentiated", {"weight_gradient": True}),
    "rll_both_weights": Entry("... both of these: the value's true derivative", {"gallery_gradient": True, "weight_gradient": True}),
    "rll_2020": Entry("... queries weighted by mass (2020 layer)", {"query_weighting": "mass"}),
    "rll_2019": Entry("... and squared distances (2019 layer)", {"query_weighting": "mass", "pair_term": "squared"}),
    "rll_t0": Entry("... T_n = 0", {"temperature_neg": 0.0}),
    "rll_t5": Entry("... T_n = 5", {"temperature_neg": 5.0}),
    "rll_t20": Entry("... T_n = 20", {"temperature_neg": 20.0}),
    "rll_lmh": Entry("... levels L, M and H", {"levels": "L,M,H"}),
    "pml_rll": Entry("pytorch-metric-learning 2.9's RankedListLoss", _other("pml_ranked_list")),
    "contrastive": Entry("Contrastive", _other("contrastive")),
    "triplet_semihard": Entry("Triplet, semi-hard", _other("triplet", mining="semihard")),
    "triplet_hard": Entry("Triplet, batch-hard", _other("triplet", mining="hard")),
    "lifted": Entry("Lifted structure", _other("lifted_structure")),
    "n_pair": Entry("N-pair, cosines times 10", _other("n_pair", scale=10.0)),
    "multi_similarity": Entry("Multi-similarity", _other("multi_similarity")),
    "proxy_anchor": Entry("Proxy anchor", _other("proxy_anchor")),
    "nt_xent": Entry("NT-Xent", _other("nt_xent")),
    "sup_con": Entry("SupCon", _other("sup_con")),
}
_VARIED = tuple(sorted({name for entry in ENTRIES.values() for name in entry.options if name != "levels"} | {"proxy_lr_multiplier"}))
_SCORES = ("recall@1", "map@r")


# ---- What is to be run
def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")] if text else list(ENTRIES)
    if unknown := [name for name in names if name not in ENTRIES]:
        raise ValueError(f"--only={text}: expected some of {', '.join(ENTRIES)}, found {', '.join(unknown)}")
    return [name for name in ENTRIES if name in names]


def _rates(text: str) -> list[float]:
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = []
    if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
        raise ValueError(f"--rates={text}: expected learning rates with commas between, each once, such as 1e-3,3e-3")
    return rates


def _runs_to_tune(base: dict, names: list[str], rates: list[float], share: float, steps: int) -> dict[tuple[str, float], config_lib.Config]:
    folder = pathlib.Path(base["workdir"]) / "tuning"
    tuning = {"validation_share": share, "steps": steps or base["steps"]}
    return {
        (name, rate): config_lib.Config(
            **base | ENTRIES[name].options | tuning | {"learning_rate": rate, "workdir": str(folder / name / f"rate={rate:g}")}
        )
        for name in names
        for rate in rates
    }


def _chosen(tuned: dict, names: list[str]) -> dict[str, float]:
    """The rate of each that has one, by Recall@1; the lower one where two are alike."""
    found = {key: scores["recall@1"] for key, run in tuned.items() if (scores := runs_lib.scores(run))}
    return {name: max((key for key in found if key[0] == name), key=lambda key: (found[key], -key[1]))[1] for name in names if any(key[0] == name for key in found)}


def _runs_to_compare(base: dict, rates: dict[str, float], seeds: int) -> dict[tuple[str, int], config_lib.Config]:
    """All of the first seed first, so that a table of fewer seeds is there early."""
    folder = pathlib.Path(base["workdir"]) / "runs"
    return {
        (name, seed): config_lib.Config(
            **base | ENTRIES[name].options | {"learning_rate": rate, "seed": seed, "workdir": str(folder / name / f"seed={seed}")}
        )
        for seed in range(base["seed"], base["seed"] + seeds)
        for name, rate in rates.items()
    }


# ---- The table and the plot
def _rows(compared: dict, rates: dict[str, float]) -> list[dict]:
    """A dict for each entry; differences to the first are paired by seed."""
    found = {key: scores for key, run in compared.items() if (scores := runs_lib.scores(run))}
    rows = []
    for name, rate in rates.items():
        of_seeds = {seed: found[key] for key in found for seed in key[1:] if key[0] == name}
        row = {"name": name, "title": ENTRIES[name].title, "learning_rate": rate, "seeds": list(of_seeds)}
        for score in _SCORES:
            values = {seed: 100 * scores[score] for seed, scores in of_seeds.items()}
            first = {seed: 100 * found[key][score] for key in found for seed in key[1:] if key[0] == next(iter(rates))}
            paired = [values[seed] - first[seed] for seed in values if seed in first]
            row[score] = {**_summary(list(values.values())), "difference": _summary(paired)}
        rows.append(row)
    return rows


def _summary(values: list[float]) -> dict:
    """Mean, standard deviation (n - 1) and the half width of the mean's 95 % interval by Student's t."""
    from scipy import stats  # a second to import

    std = statistics.stdev(values) if len(values) > 1 else None
    half = None if std is None else float(stats.t.ppf(0.975, len(values) - 1)) * std / len(values) ** 0.5
    return {"values": values, "mean": statistics.fmean(values) if values else None, "std": std, "half": half}


def _as_markdown(rows: list[dict], about: str) -> str:
    first = rows[0]["title"]
    lines = [
        f"# {len(rows)} losses on equal terms\n",
        about,
        f"Percent, mean ± standard deviation over seeds. The difference is to “{first}”, paired by seed, ± half of its 95 % interval: one that "
        "reaches over 0 is noise, as far as so many seeds tell.\n",
        "| loss | rate | Recall@1 | difference | MAP@R | difference | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["title"], f"{row['learning_rate']:g}"]
        for score in _SCORES:
            cells += [_cell(row[score], "std"), _cell(row[score]["difference"], "half", "+") if row is not rows[0] else ""]
        lines.append(f"| {' | '.join([*cells, str(len(row['seeds']))])} |")
    return "\n".join(lines) + "\n"


def _cell(summary, spread, sign=""):
    if summary["mean"] is None:
        return "-"
    return f"{summary['mean']:{sign}.1f}" + (f" ± {summary[spread]:.1f}" if summary[spread] is not None else "")


def _plot(rows: list[dict], path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.3 * len(rows)), layout="constrained")
    places = np.arange(len(rows))[::-1]
    for axes, score, label in zip(figure.subplots(1, 2, sharey=True), _SCORES, ("Recall@1", "MAP@R"), strict=True):
        for place, row in zip(places, rows):
            summary, colour = row[score], "C0" if row["name"].startswith("rll") else "C1"
            axes.plot(summary["values"], [place] * len(summary["values"]), ".", color=colour, alpha=0.35)
            if summary["mean"] is not None:
                axes.errorbar(summary["mean"], place, xerr=summary["std"] or 0, fmt="o", color=colour, capsize=3)
        if rows[0][score]["mean"] is not None:
            axes.axvline(rows[0][score]["mean"], color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel=f"{label}, percent: mean, standard deviation, seeds")
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].set_yticks(places, [row["title"] for row in rows])
    figure.savefig(path, dpi=110, format="png")


def _about(base: dict, options, budget: str) -> str:
    environment = json.loads(logs.environment())
    given = [argument for argument in sys.argv[1:]]
    command = shlex.join(["python", "-m", "experiments.compare", *given])
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
        base = runs_lib.base_options() | {"report": options["report"].present and options.report}
        usual = {field.name: field.default for field in dataclasses.fields(config_lib.Config)}
        if taken := [name for name in (*_VARIED, "validation_share", "learning_rate") if base[name] != usual[name]]:
            raise ValueError(f"--{taken[0]} is for the comparison to choose: leave it out")
        out = pathlib.Path(options.out or base["workdir"])
        if options.out and not out.is_dir():
            raise ValueError(f"--out={options.out}: no such folder")
        tuned = _runs_to_tune(base, names, rates, options.tuning_share, options.tuning_steps)
        _runs_to_compare(base, dict.fromkeys(names, rates[0]), options.seeds)  # refused before the first run begins, if at all
        terms = {"rates": options.rates, "tuning_share": options.tuning_share, "tuning_steps": options.tuning_steps}
        runs_lib.claim("compare", base | terms, [("seeds", options.seeds), ("only", options.only)])
        failed = runs_lib.execute_all(list(tuned.values()), keep_going=options.keep_going, jobs=options.jobs)
        chosen = _chosen(tuned, names)
        compared = _runs_to_compare(base, chosen, options.seeds)
        failed |= runs_lib.execute_all(list(compared.values()), keep_going=options.keep_going, jobs=options.jobs)
        steps = options.tuning_steps or base["steps"]
        budget = f"{len(rates)} rates ({options.rates}), a run of {steps} steps each, on {options.tuning_share:.0%} of the training classes held out"
        rows = _rows(compared, chosen)
        text = _as_markdown(rows, _about(base, options, budget))
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
    flags.DEFINE_string("only", "", f"entries, with commas between ({', '.join(ENTRIES)}); empty: all", **own)
    flags.DEFINE_string("rates", "2e-3,6e-3,2e-2", "learning rates tried for each entry", **own)
    flags.DEFINE_float("tuning_share", 0.3, "of the training classes, searched when tuning", lower_bound=0.01, upper_bound=0.9, **own)
    flags.DEFINE_integer("tuning_steps", 0, "of a run of the tuning; 0: as many as of the others", lower_bound=0, **own)
    flags.DEFINE_integer("seeds", 5, "runs of each entry, of the seeds from --seed on", lower_bound=1, **own)
    flags.DEFINE_string("out", "", "folder for the table and the plot; empty: the workdir", **own)
    runs_lib.define_flags(flag_values)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=config_lib.parse_flags)
