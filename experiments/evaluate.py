"""All scores of a trained network on its test classes, for each level, each pair and the concatenation.

    python -m experiments.evaluate --workdir=runs/emoji

Prints a table and writes --out, by default evaluation.json in the workdir.
"""

import dataclasses
import json
import pathlib
import sys

from absl import app, flags

from experiments.engine import build, checks, datasets, scoring
from experiments.engine import config as config_lib


def _as_text(table) -> str:
    names = scoring.columns(table)
    rows = [
        ["", *names],
        *([level, *(f"{100 * row[name]:.1f}" for name in names)] for level, row in table.items()),
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows
    )


def main(_):
    options = flags.FLAGS
    with config_lib.mistakes_in_one_line():
        out = pathlib.Path(options.out or pathlib.Path(options.workdir) / "evaluation.json")
        if options.out:
            config_lib.check_free("out", out)
        trained = build.load(options.workdir, options.step, options.best)
        config = dataclasses.replace(
            trained.config, data_dir=options.data_dir or trained.config.data_dir
        )
        splits, left_out = datasets.open_usable(config)
        if not options.data_dir:
            checks.check_same_data(pathlib.Path(options.workdir), splits)
        broken = []
        data = checks.cached({"test": splits["test"]}, config)["test"]
        data, levels = scoring.embed_readable(
            trained.embed, data, lambda data, row: broken.append(data.paths[row])
        )
        for text in [*left_out, *broken]:
            print(f"left out: {text}", file=sys.stderr)
        table = scoring.score_table(
            levels, data, datasets.find(config.dataset).ks, options.clustering
        )
        alone = next(iter(table.values()))["queries_without_match"]
        print(
            f"{options.workdir}, step {trained.step}: {len(data)} test images, in percent; {alone} alone in their class"
        )
        print(_as_text(table))
        with config_lib.written_whole(out) as aside:
            aside.write_text(json.dumps({"step": trained.step, "scores": table}, indent=1) + "\n")
        print(f"written: {out}")


if __name__ == "__main__":
    build.define_flags()
    flags.DEFINE_string("data_dir", "", "folder of the data; by default that of the run")
    flags.DEFINE_bool(
        "clustering", True, "K-means scores too: minutes where there are thousands of classes"
    )
    flags.DEFINE_string(
        "out", "", "JSON file to write; by default evaluation.json in the workdir, written anew"
    )
    app.run(main, flags_parser=config_lib.parse_flags)
