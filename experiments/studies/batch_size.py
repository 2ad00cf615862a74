"""Does a longer ranked list help? Compares losses at several batch sizes, on equally many images.

    python -m experiments.studies.batch_size --flagfile=experiments/flagfiles/emoji_compare.flags

Each of --batches, classes x images per class, is a comparison as `experiments.compare` makes it, in
a folder of the workdir, of as many steps as --images make. The rate of each loss is tuned for each
batch, in half as many steps. The same command resumes. It writes batch_size.md, .json and .png into
--workdir, or into --out. --only names the losses. --embed_chunk bounds the memory that a large
batch takes.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
import shlex
import signal
import sys
import time
import types
from typing import Any

from absl import app
from absl import flags as absl_flags

from experiments import compare
from experiments.engine import command, comparison_table, environment, measuring
from rll_jax.data import files

Batch = tuple[int, int]  # classes, images per class
Rows = Sequence[comparison_table.Row]  # of the losses, at one batch


def parse_batches(texts: Sequence[str]) -> list[Batch]:
    """Returns --batches, the smallest first."""
    try:
        batches = [(int(classes), int(each)) for classes, each in (t.split("x") for t in texts)]
    except ValueError:
        batches = []
    if not batches or min(map(min, batches)) < 1 or len(set(batches)) < len(batches):
        raise ValueError(
            f"--batches={','.join(texts)}: expected classes x images per class with commas "
            "between, each once, such as 20x4,250x4"
        )
    return sorted(batches, key=size)


def size(batch: Batch) -> int:
    """Returns the number of images in a batch."""
    return batch[0] * batch[1]


def planned(base: compare.Options, values: Any, batch: Batch) -> tuple[compare.Options, Any]:
    """Returns the options and the flags of the comparison at one batch.

    Args:
      base: what all runs share.
      values: the flags.
      batch: classes and images per class.
    """
    steps = max(1, round(values.images / size(batch)))
    options = {
        **base,
        "classes_per_batch": batch[0],
        "images_per_class": batch[1],
        "steps": steps,
        "workdir": str(pathlib.Path(base["workdir"], name(batch))),
    }
    terms = {key: values[key].value for key in compare.OWN_FLAGS}
    return options, types.SimpleNamespace(**terms | {"tuning_steps": max(1, steps // 2)})


def name(batch: Batch) -> str:
    """Returns the name of a batch, such as "20x4"."""
    return f"{batch[0]}x{batch[1]}"


def as_markdown(found: Mapping[Batch, Rows], about: str) -> str:
    """Returns a table for each score: a row for each loss, a column for each batch.

    Args:
      found: {batch: rows}.
      about: what was run.
    """
    parts = [f"# Batch size\n\n{about}\n\nPercent, mean ± standard deviation over seeds.\n"]
    for score, title in comparison_table.SCORES.items():
        parts.append(
            f"\n| {title} | {' | '.join(map(name, found))} |\n|---|{'---|' * len(found)}\n"
        )
        for of_loss in zip(*found.values(), strict=True):
            cells = [comparison_table.cell(row[score], "std") for row in of_loss]
            parts.append(f"| {' | '.join([of_loss[0]['title'], *cells])} |\n")
    return "".join(parts)


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


def _about(images: int) -> dict[str, Any]:
    arguments = ["python", "-m", "experiments.studies.batch_size", *sys.argv[1:]]
    return {
        "command": shlex.join(arguments),
        "images": images,
        "date": time.strftime("%F"),
        "hardware": measuring.machine().rpartition(",")[0],
        "commit": environment.commit() or "unknown",
    }


def _write(folder: pathlib.Path, found: Mapping[Batch, Rows], about: Mapping[str, Any]) -> str:
    text = as_markdown(
        found,
        f"    {about['command']}\n\nEach run trains on {about['images']} images. "
        f"{about['date']}, {about['hardware']}, commit {about['commit']}.",
    )
    numbers = {**about, "batches": {name(batch): rows for batch, rows in found.items()}}
    contents = {"batch_size.md": text, "batch_size.json": json.dumps(numbers, indent=1) + "\n"}
    for file, content in contents.items():
        with files.atomic_write(folder / file) as temporary:
            temporary.write_text(content)
    with files.atomic_write(folder / "batch_size.png") as temporary:
        plot(found, temporary)
    return text


def main(_: Any) -> None:
    """Runs the command."""
    values = absl_flags.FLAGS
    with command.user_errors():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        base = compare.base_options()
        out = pathlib.Path(values.out or base["workdir"])
        if values.out and not out.is_dir():
            raise ValueError(f"--out={values.out}: no such folder")
        plans = {batch: planned(base, values, batch) for batch in parse_batches(values.batches)}
        for options, terms in plans.values():
            compare.check(options, terms)
        found: dict[Batch, Rows] = {}
        failed: dict[str, str] = {}
        for batch, (options, terms) in plans.items():
            print(f"batches of {name(batch)}, {options['steps']} steps:", flush=True)
            found[batch], _, failed_here = compare.compare(options, terms)
            failed |= failed_here
        text = _write(out, found, _about(values.images))
        print(f"{text}written: {out / 'batch_size.md'}, batch_size.json and batch_size.png")
    sys.exit(1 if failed else 0)


def define_flags(flag_values: absl_flags.FlagValues = absl_flags.FLAGS) -> None:
    """Defines the flags of the command."""
    compare.define_flags(flag_values)
    flag_values.set_default("workdir", "runs/batch_size")
    absl_flags.DEFINE_list(
        "batches",
        ["20x4", "50x4", "125x4", "250x4", "500x4"],
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
