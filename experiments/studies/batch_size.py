r"""Does a longer ranked list help? Compares losses at several batch sizes, on equally many images.

    python -m experiments.studies.batch_size --flagfile=experiments/flagfiles/emoji_compare.flags \
        --workdir=runs/emoji_batch_size --only=rll,multi_similarity,nt_xent --seeds=3

Each of --batches, classes x images per class, is a comparison as `experiments.compare` makes it, in
a folder of the workdir. Its runs are of as many steps as --images make. The rate of each loss is
tuned for each batch, in half as many steps. So --steps, --tuning_steps, --classes_per_batch and
--images_per_class have no effect. The largest batch runs first, as it needs the most memory and
classes. --embed_chunk bounds that memory, where a batch is larger. With --batch_norm=train the
statistics are of the chunk or the batch, whose size then changes more than the list.

The same command resumes, also with more seeds or batches. It writes batch_size.md, .json and .png
into --workdir, or into --out.
"""

from collections.abc import Mapping, Sequence
import functools
import pathlib
import signal
import sys
import types
from typing import Any

from absl import app
from absl import flags as absl_flags

from experiments import compare
from experiments.engine import command, comparison_table, many_runs, measuring, record
from experiments.engine.config import OPTIONS

Batch = tuple[int, int]  # classes, images per class
Rows = Sequence[comparison_table.Row]  # of the losses, at one batch


def parse_batches(text: str) -> list[Batch]:
    """Returns --batches, the smallest first."""
    try:
        pairs = [part.split("x") for part in text.split(",")]
        batches = [(int(classes), int(each)) for classes, each in pairs]
    except ValueError:
        batches = []
    if not batches or min(map(min, batches)) < 1 or len(set(map(size, batches))) < len(batches):
        raise ValueError(
            f"--batches={text}: expected classes x images per class with commas between, no two of "
            "the same number of images, such as 20x4,250x4"
        )
    return sorted(batches, key=size)


def size(batch: Batch) -> int:
    """Returns the number of images in a batch."""
    return batch[0] * batch[1]


def name(batch: Batch) -> str:
    """Returns the name of a batch, such as "20x4"."""
    return f"{batch[0]}x{batch[1]}"


def planned(base: compare.Options, values: Any, batch: Batch) -> tuple[compare.Options, Any]:
    """Returns the options and the flags of the comparison at one batch.

    Args:
      base: what all runs share.
      values: {flag: value}.
      batch: classes and images per class.

    Raises:
      ValueError: the images are fewer than a batch, or an option counts steps.
    """
    steps, chunk = round(values["images"] / size(batch)), base["embed_chunk"]
    if values["images"] < size(batch):
        raise ValueError(f"--images={values['images']}: expected at least a batch of {name(batch)}")
    if base["schedule"] == "step" or base["head_warmup_steps"] or base["ema"]:
        raise ValueError(
            "--schedule=step, --head_warmup_steps and --ema count steps, and the number of steps "
            "changes with the batch: leave them out"
        )
    if chunk and size(batch) > chunk and size(batch) % chunk:
        raise ValueError(f"--embed_chunk={chunk} does not divide a batch of {name(batch)}")
    options = {
        **base,
        "classes_per_batch": batch[0],
        "images_per_class": batch[1],
        "steps": steps,
        "embed_chunk": chunk if size(batch) > chunk else 0,
        "workdir": str(pathlib.Path(base["workdir"], name(batch))),
    }
    return options, types.SimpleNamespace(**{**values, "tuning_steps": max(1, steps // 2)})


def _claim(base: compare.Options, values: Any) -> None:
    """Keeps --workdir for this study, or raises ValueError where it holds something else."""
    without_effect = ("classes_per_batch", "images_per_class", "steps")
    fixed = {**base, **{key: OPTIONS[key].default for key in without_effect}}
    terms = compare.terms(values)
    del terms["tuning_steps"]
    fixed |= {**terms, "images": str(values.images)}
    changeable = [(key, getattr(values, key)) for key in ("seeds", "only", "batches")]
    many_runs.claim_folder("batch_size", fixed, changeable)


def as_markdown(found: Mapping[Batch, Rows], about: str) -> str:
    """Returns a table for each score: a row for each loss, a column for each batch.

    Args:
      found: {batch: rows}.
      about: what was run.
    """
    seeds = max(len(row["seeds"]) for rows in found.values() for row in rows)
    parts = [f"# Batch size\n\n{about}\n\nPercent, mean ± standard deviation over {seeds} seeds.\n"]
    for score, title in comparison_table.SCORES.items():
        lines = [
            [of_loss[0]["title"], *(comparison_table.cell(row[score], "std") for row in of_loss)]
            for of_loss in zip(*found.values(), strict=True)
        ]
        parts.append(measuring.markdown_table([title, *map(name, found)], lines) + "\n")
    return "\n".join(parts)


def plot(found: Mapping[Batch, Rows], path: pathlib.Path) -> None:
    """Draws each score against the number of images in a batch, a line for each loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    scores, sizes = comparison_table.SCORES, [size(batch) for batch in found]
    for axes, (score, title) in zip(figure.subplots(1, 2), scores.items(), strict=True):
        for of_loss in zip(*found.values(), strict=True):
            summaries = [row[score] for row in of_loss]
            # Where all runs failed there is no mean; matplotlib leaves a gap for NaN.
            means = [float("nan") if of["mean"] is None else of["mean"] for of in summaries]
            spreads = [of["std"] or 0.0 for of in summaries]
            label = of_loss[0]["title"]
            axes.errorbar(sizes, means, spreads, marker="o", capsize=3, label=label)
        axes.set(xscale="log", xlabel="images in a batch", ylabel=f"{title}, percent")
        axes.set_xticks(sizes, [str(count) for count in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110, format="png")


def _about(base: compare.Options, values: Any) -> dict[str, str]:
    setting = (
        f"{base['dataset']}, {base['backbone']}, {base['image_size']} px, "
        f"{base['embedding_dim']} dimensions, {values.images} images for each run"
    )
    return {**record.circumstances("experiments.studies.batch_size"), "setting": setting}


def _write(folder: pathlib.Path, found: Mapping[Batch, Rows], about: Mapping[str, str]) -> str:
    made = f"{about['date']}, {about['hardware']}, commit {about['commit']}"
    text = as_markdown(found, f"    {about['command']}\n\n{about['setting']}. {made}.")
    numbers = {**about, "batches": {name(batch): rows for batch, rows in found.items()}}
    record.write(folder, "batch_size", text, numbers, functools.partial(plot, found))
    return text


def main(_: Any) -> None:
    """Runs the command."""
    values = absl_flags.FLAGS
    with command.user_errors():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        base = compare.base_options()
        out = compare.out_folder(base, values)
        given, batches = values.flag_values_dict(), parse_batches(values.batches)
        plans = {batch: planned(base, given, batch) for batch in batches}
        for options, terms in plans.values():
            compare.check(options, terms)
        _claim(base, values)
        found: dict[Batch, Rows] = {}
        failed: dict[str, str] = {}
        text, about = "", _about(base, values)
        for batch, (options, terms) in reversed(plans.items()):
            print(f"batches of {name(batch)}, {options['steps']} steps:", flush=True)
            compared = compare.compare(options, terms)
            found = {batch: compared.rows, **found}
            failed |= compared.failed
            text = _write(out, found, about)
        print(f"{text}written: {out / 'batch_size.md'}, batch_size.json and batch_size.png")
    sys.exit(1 if failed else 0)


def define_flags(flag_values: absl_flags.FlagValues = absl_flags.FLAGS) -> None:
    """Defines the flags of the command."""
    compare.define_flags(flag_values)
    flag_values.set_default("workdir", "runs/batch_size")
    absl_flags.DEFINE_string(
        "batches",
        "20x4,50x4,125x4,250x4,500x4",
        "The batches to compare, classes x images per class, with commas between.",
        flag_values=flag_values,
    )
    absl_flags.DEFINE_integer(
        "images",
        48_000,
        "The number of images that each run trains on, whatever its batch.",
        lower_bound=1,
        flag_values=flag_values,
    )


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=command.parse_flags)
