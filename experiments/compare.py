"""Compares variants of Ranked List Loss and other losses on equal terms: one table and one plot.

    python -m experiments.compare --flagfile=experiments/flagfiles/emoji_compare.flags

Takes all options of an experiment, on the dataset that --dataset names, but those of the loss.

Equal terms: the network, the batches, the steps, the optimiser and the budget of tuning are the
same for all. The budget is one run for each of --rates, of --tuning_steps steps. Such a run
searches --tuning_share of the training classes, which it does not train on. While the best rate is
the lowest or the highest, one more rate beyond it is tried, by the same factor, at most
--more_rates times. The best rate then trains on all training classes, once for each of --seeds.
These runs alone look at the test classes. All else of a loss is as its paper or its library has
it, see ENTRIES.

The same command resumes, also with more seeds. It writes compare.md, compare.json and compare.png
into --workdir, or into --out.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import pathlib
import signal
import sys
from typing import Any, NamedTuple

from absl import app
from absl import flags as absl_flags

from experiments.engine import (
    command,
    comparison_table,
    flags,
    logs,
    many_runs,
    options,
    query_scores,
    record,
)
from experiments.engine.comparison_table import SCORES
from experiments.engine.config import OPTIONS, Config, from_flat
from rll_jax import metrics

Options = Mapping[str, Any]  # {option: value}
Execute = Callable[[Sequence[Config]], None]


class Entry(NamedTuple):
    """An entry of the comparison: its title and its options of the loss."""

    title: str
    options: Options


def _baseline(loss: str, **arguments: object) -> dict[str, Any]:
    """Returns the options of another loss with keyword arguments."""
    text = ",".join(f"{name}={value}" for name, value in arguments.items())
    return {"loss": loss, "loss_options": text}


# Options that an entry sets, and that may be given for all other entries.
_SHARED = {"levels", "alpha", "margin", "temperature_pos"}

# All others are compared with the first.
ENTRIES = {
    "rll": Entry("Ranked List Loss (CVPR 2019)", {}),
    "rll_both_ends": Entry("... gradient at both ends of a pair", {"gallery_gradient": True}),
    "rll_weights": Entry("... weights differentiated", {"weight_gradient": True}),
    "rll_both_weights": Entry(
        "... both of these: the value's true derivative",
        {"gallery_gradient": True, "weight_gradient": True},
    ),
    "rll_wide": Entry(
        "... both ends, alpha = 1.4, m = 0.6, T_p = 10, T_n = 20",
        {
            "gallery_gradient": True,
            "alpha": 1.4,
            "margin": 0.6,
            "temperature_pos": 10.0,
            "temperature_neg": 20.0,
        },
    ),
    "rll_2020": Entry("... queries weighted by mass (2020 layer)", {"query_weighting": "mass"}),
    "rll_2019": Entry(
        "... and squared distances (2019 layer)",
        {"query_weighting": "mass", "pair_term": "squared"},
    ),
    "rll_t0": Entry("... T_n = 0", {"temperature_neg": 0.0}),
    "rll_t5": Entry("... T_n = 5", {"temperature_neg": 5.0}),
    "rll_t20": Entry("... T_n = 20", {"temperature_neg": 20.0}),
    "rll_lmh": Entry(
        "... levels L, M and H: three times the dimensions", {"levels": ("L", "M", "H")}
    ),
    "pml_rll": Entry("pytorch-metric-learning 2.9's RankedListLoss", _baseline("pml_ranked_list")),
    "contrastive": Entry("Contrastive", _baseline("contrastive")),
    "triplet_semihard": Entry("Triplet, semi-hard", _baseline("triplet", mining="semihard")),
    "triplet_hard": Entry("Triplet, batch-hard", _baseline("triplet", mining="hard")),
    "lifted": Entry("Lifted structure", _baseline("lifted_structure")),
    "n_pair": Entry("N-pair, cosines times 10", _baseline("n_pair", scale=10.0)),
    "multi_similarity": Entry("Multi-similarity", _baseline("multi_similarity")),
    "proxy_anchor": Entry(
        "Proxy anchor, proxies at 100 times the rate",
        {**_baseline("proxy_anchor"), "proxy_lr_multiplier": 100.0},
    ),
    "nt_xent": Entry("NT-Xent", _baseline("nt_xent")),
    "sup_con": Entry("SupCon", _baseline("sup_con")),
    "circle": Entry("Circle", _baseline("circle")),
    "arcface": Entry("ArcFace", _baseline("arcface")),
    "soft_triple": Entry(
        "SoftTriple, proxies at 100 times the rate",
        {**_baseline("soft_triple"), "proxy_lr_multiplier": 100.0},
    ),
    "smooth_ap": Entry("Smooth-AP", _baseline("smooth_ap")),
    "recall_at_k": Entry("Recall@K surrogate", _baseline("recall_at_k")),
}


# ---- What is to be run
def _names(text: str) -> list[str]:
    """Returns the entries of --only, in the order of ENTRIES."""
    names = [name.strip() for name in text.split(",")] if text else list(ENTRIES)
    if unknown := [name for name in names if name not in ENTRIES]:
        raise ValueError(
            f"--only={text}: expected some of {', '.join(ENTRIES)}, found {', '.join(unknown)}"
        )
    return [name for name in ENTRIES if name in names]


def _rates(text: str) -> list[float]:
    """Returns the learning rates of --rates."""
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = []
    if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
        raise ValueError(
            f"--rates={text}: expected learning rates with commas between, each once, such as "
            "1e-3,3e-3"
        )
    return rates


def _runs_to_tune(
    base: Options, names: Sequence[str], rates: Sequence[float], share: float, steps: int
) -> dict[tuple[str, float], Config]:
    folder = pathlib.Path(base["workdir"]) / "tuning"
    tuning = {"validation_share": share, "steps": steps or base["steps"]}
    return {
        (name, rate): from_flat(
            **{
                **base,
                **ENTRIES[name].options,
                **tuning,
                "learning_rate": rate,
                "workdir": str(folder / name / f"rate={rate:g}"),
            }
        )
        for name in names
        for rate in rates
    }


def _tuned(
    base: Options, names: Sequence[str], values: Any, execute: Execute
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Tunes the learning rate of each entry by --choose_by.

    Returns:
      {entry: best rate} of those that have a run with scores, the lower of equal rates; and
      {entry: rates that were tried}.
    """
    first = sorted(_rates(values.rates))
    factor = (first[-1] / first[0]) ** (1 / (len(first) - 1)) if len(first) > 1 else 3.0
    tried = {name: list(first) for name in names}
    best: dict[str, float] = {}
    for _ in range(values.more_rates + 1):
        runs: dict[tuple[str, float], Config] = {}
        for name, rates in tried.items():
            runs |= _runs_to_tune(base, [name], rates, values.tuning_share, values.tuning_steps)
        execute(list(runs.values()))
        best = _best_rates(runs, values.choose_by)
        growing = {
            name: rate
            for name, rate in best.items()
            if rate in (min(tried[name]), max(tried[name]))
            and len(tried[name]) < len(first) + values.more_rates
        }
        for name, rate in growing.items():
            beyond = rate / factor if rate == min(tried[name]) else rate * factor
            tried[name].append(float(f"{beyond:.1g}"))
        if not growing:
            break
    return best, tried


def _best_rates(runs: Mapping[tuple[str, float], Config], score: str) -> dict[str, float]:
    best: dict[str, tuple[float, float]] = {}  # {entry: (score, minus the rate)}
    for (name, rate), run in runs.items():
        if scores := many_runs.scores(run):
            best[name] = max(best.get(name, (-1.0, 0.0)), (scores[score], -rate))
    return {name: -minus_rate for name, (_, minus_rate) in best.items()}


def _runs_to_compare(
    base: Options, rates: Mapping[str, float], seeds: int
) -> dict[tuple[str, int], Config]:
    """Returns all runs of the first seed first, so that a table of few seeds is there early."""
    folder = pathlib.Path(base["workdir"]) / "runs"
    return {
        (name, seed): from_flat(
            **{
                **base,
                **ENTRIES[name].options,
                "learning_rate": rate,
                "seed": seed,
                "workdir": str(folder / name / f"rate={rate:g},seed={seed}"),
            }
        )
        for seed in range(base["seed"], base["seed"] + seeds)
        for name, rate in rates.items()
    }


def _check_options(base: Options) -> None:
    """Raises ValueError where an option is given that the comparison chooses."""
    varied = {name for entry in ENTRIES.values() for name in entry.options} - _SHARED
    for name in (*sorted(varied), "validation_share", "learning_rate"):
        if base[name] != OPTIONS[name].default:
            raise ValueError(f"--{name} is for the comparison to choose: leave it out")


# ---- What was found
def _rows(
    compared: Mapping[tuple[str, int], Config], rates: Mapping[str, float], names: Sequence[str]
) -> list[comparison_table.Row]:
    found: dict[str, dict[int, Mapping[str, float]]] = {name: {} for name in names}
    for (name, seed), run in compared.items():
        if scores := many_runs.scores(run):
            found[name][seed] = scores
    titles = {name: ENTRIES[name].title for name in names}
    return comparison_table.make_rows(found, titles, rates, _over_classes(compared, names))


def _over_classes(
    compared: Mapping[tuple[str, int], Config], names: Sequence[str]
) -> dict[str, dict[str, metrics.Interval]]:
    """Returns the intervals of the differences to the first entry, by drawing test classes.

    Left out are runs of earlier versions, which have not kept the scores of each query, and seeds
    in which an entry and the first one scored other queries, as where they skipped images.
    """
    kept: dict[str, dict[int, query_scores.QueryScores]] = {name: {} for name in names}
    for (name, seed), run in compared.items():
        workdir = pathlib.Path(run.runtime.workdir)
        if (workdir / query_scores.NAME).exists():
            kept[name][seed] = query_scores.read(workdir)
    found: dict[str, dict[str, metrics.Interval]] = {}
    for name in names[1:]:
        both = kept[name].keys() & kept[names[0]].keys()
        if seeds := [s for s in sorted(both) if kept[name][s].is_paired_with(kept[names[0]][s])]:
            mine, first = (
                query_scores.join([kept[of][seed] for seed in seeds]) for of in (name, names[0])
            )
            found[name] = query_scores.intervals(mine, (1,), first)
    return found


def _untrained(runs: Sequence[Config]) -> Mapping[str, float] | None:
    """Returns the scores before any step, of the first run that has some."""
    for run in runs:
        lines = logs.read_lines(pathlib.Path(run.runtime.workdir, "metrics.jsonl"))
        if lines and lines[0]["step"] == 0 and "recall@1" in lines[0]:
            return lines[0]
    return None


class Compared(NamedTuple):
    """What a comparison found.

    Attributes:
      rows: the rows of the table.
      untrained: the scores of the network before its first step, or None.
      most_rates: the largest number of rates that were tried for an entry.
      failed: {workdir: reason} of the runs that failed.
    """

    rows: list[comparison_table.Row]
    untrained: Mapping[str, float] | None
    most_rates: int
    failed: dict[str, str]


def base_options() -> dict[str, Any]:
    """Returns {option: value} of what all runs share, of the flags.

    A run makes a report and scores the backbone's own features only where the user asks for it:
    they would all make the same.
    """
    values, base = absl_flags.FLAGS, many_runs.base_options()
    asked = ("report", "zero_shot")
    return base | {name: values[name].present and values[name].value for name in asked}


def check(base: Options, values: Any) -> None:
    """Raises ValueError where a comparison cannot run, before its first run.

    Args:
      base: what all runs share.
      values: what has the values of the flags of `define_flags` as attributes.
    """
    names, rates = _names(values.only), _rates(values.rates)
    _check_options(base)
    _runs_to_tune(base, names, rates, values.tuning_share, values.tuning_steps)
    _runs_to_compare(base, dict.fromkeys(names, rates[0]), values.seeds)


def out_folder(base: Options, values: Any) -> pathlib.Path:
    """Returns --out, or the workdir; raises ValueError where --out is not there."""
    if values.out and not pathlib.Path(values.out).is_dir():
        raise ValueError(f"--out={values.out}: no such folder")
    return pathlib.Path(values.out or base["workdir"])


def terms(values: Any) -> dict[str, str]:
    """Returns {flag: value} of the flags that a comparison does not change when it resumes."""
    names = ("rates", "more_rates", "choose_by", "tuning_share", "tuning_steps")
    return {name: str(getattr(values, name)) for name in names}


def compare(base: Options, values: Any) -> Compared:
    """Tunes, runs and compares the entries; the same call resumes. Args are those of `check`."""
    failed: dict[str, str] = {}

    def execute(runs: Sequence[Config]) -> None:
        failed.update(many_runs.run_all(runs, keep_going=values.keep_going, jobs=values.jobs))

    names = _names(values.only)
    changeable = [("seeds", values.seeds), ("only", values.only)]
    many_runs.claim_folder("compare", {**base, **terms(values)}, changeable)
    chosen, tried = _tuned(base, names, values, execute)
    compared = _runs_to_compare(base, chosen, values.seeds)
    execute(list(compared.values()))
    rows = _rows(compared, chosen, names)
    untrained = _untrained(list(compared.values()))
    return Compared(rows, untrained, max(map(len, tried.values())), failed)


# ---- What is written
def _about(base: Options, values: Any, most_rates: int) -> str:
    """Returns the command, what was run, how it was tuned, and where."""
    made = record.circumstances("experiments.compare")
    steps = values.tuning_steps or base["steps"]
    pixels = f"{base['image_size']} px"
    if base["test_image_size"]:
        pixels += f" (searched at {base['test_image_size']} px)"
    return (
        f"    {made['command']}\n\n{base['dataset']}, {base['backbone']}, {pixels}, "
        f"{options.to_text(base['levels'])} of {base['embedding_dim']} dimensions, batches of "
        f"{base['classes_per_batch']} x {base['images_per_class']}, {base['steps']} steps of "
        f"{base['optimizer']}. Tuning of each: rates {values.rates}, the best by "
        f"{SCORES[values.choose_by]}, and up to {values.more_rates} more while the best is at an "
        f"end ({most_rates} at most were tried), a run of {steps} steps each, of one seed, on "
        f"{values.tuning_share:.0%} of the training classes held out.\n\n{made['date']}, "
        f"{made['hardware']}, commit {made['commit']}.\n"
    )


def main(_: Any) -> None:
    """Runs the command."""
    values = absl_flags.FLAGS
    with command.user_errors():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        base = base_options()
        out = out_folder(base, values)
        check(base, values)
        found = compare(base, values)
        about = _about(base, values, found.most_rates)
        text = comparison_table.as_markdown(found.rows, about, found.untrained)
        plot = functools.partial(comparison_table.plot, found.rows)
        record.write(out, "compare", text, found.rows, plot)
        print(f"{text}written: {out / 'compare.md'}, compare.json and compare.png")
    sys.exit(1 if found.failed else 0)


def define_flags(flag_values: absl_flags.FlagValues = absl_flags.FLAGS) -> None:
    """Defines the flags of the command."""
    flags.define(workdir="runs/compare", flag_values=flag_values)
    absl_flags.DEFINE_string(
        "only",
        "",
        f"The entries to compare, with commas between: {', '.join(ENTRIES)}. Empty: all.",
        flag_values=flag_values,
    )
    absl_flags.DEFINE_string(
        "rates",
        "2e-3,6e-3,2e-2",
        "The learning rates that are tried for each entry.",
        flag_values=flag_values,
    )
    absl_flags.DEFINE_integer(
        "more_rates",
        3,
        "The number of rates that may be tried beyond --rates, while the best is at an end.",
        lower_bound=0,
        flag_values=flag_values,
    )
    absl_flags.DEFINE_enum(
        "choose_by",
        "recall@1",
        list(SCORES),
        "The score of the held-out classes that chooses the rate.",
        flag_values=flag_values,
    )
    absl_flags.DEFINE_float(
        "tuning_share",
        0.3,
        "The share of the training classes that a tuning run searches, 0.01 to 0.9.",
        lower_bound=0.01,
        upper_bound=0.9,
        flag_values=flag_values,
    )
    absl_flags.DEFINE_integer(
        "tuning_steps",
        0,
        "The number of steps of a tuning run. 0: --steps.",
        lower_bound=0,
        flag_values=flag_values,
    )
    absl_flags.DEFINE_integer(
        "seeds",
        5,
        "The number of runs of each entry, from --seed on.",
        lower_bound=1,
        flag_values=flag_values,
    )
    absl_flags.DEFINE_string(
        "out",
        "",
        "The folder for the table and the plot. Empty: the workdir.",
        flag_values=flag_values,
    )
    many_runs.define_flags(flag_values)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=command.parse_flags)
