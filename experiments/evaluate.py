"""All scores of a trained network on its test classes, for each level, each pair and the concatenation.

    python -m experiments.evaluate --workdir=runs/emoji

Prints a table and writes --out, by default evaluation.json in the workdir.
"""
import dataclasses
import json
import pathlib
import sys

from absl import app, flags

import numpy as np

from experiments import config as config_lib
from experiments import setup, sources
from experiments import trained as trained_lib
from rll_jax import evaluate, metrics


def score_table(levels: dict, data, ks, clustering: bool) -> dict[str, dict[str, float]]:
    """{"L": {"recall@1": ..., ...}, "L,M": ..., ...} from the {level: (N, D)} embeddings of a set."""
    table = {}
    for name, embeddings in evaluate.combinations(levels).items():
        table[name] = metrics.retrieval_metrics(*evaluate.by_role(embeddings, data), ks=ks)
        if clustering:
            table[name] |= metrics.clustering_metrics(embeddings, data.labels)
    return table


def embed_readable(embed, data, tell) -> tuple:
    """The images of a set that can be read, and their {level: (N, D)} embeddings; of each other `tell(data, row)`.

    Raises:
      ValueError: none can be read.
    """
    bad = set()
    levels = embed(data=data, on_bad=lambda row: bad.add(row) or tell(data, row))
    rows = np.setdiff1d(np.arange(len(data)), list(bad))
    if not len(rows):
        raise ValueError("none of the test images can be read")
    return data.take(rows), {level: e[rows] for level, e in levels.items()}


def columns(table: dict) -> list[str]:
    """The names of the scores, shares all."""
    return [name for name in next(iter(table.values())) if name != "queries_without_match"]


def _as_text(table) -> str:
    names = columns(table)
    rows = [["", *names], *([level, *(f"{100 * row[name]:.1f}" for name in names)] for level, row in table.items())]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def main(_):
    options = flags.FLAGS
    with config_lib.mistakes_in_one_line():
        out = pathlib.Path(options.out or pathlib.Path(options.workdir) / "evaluation.json")
        if options.out:
            config_lib.check_free("out", out)
        trained = trained_lib.load(options.workdir, options.step, options.best)
        config = dataclasses.replace(trained.config, data_dir=options.data_dir or trained.config.data_dir)
        splits, left_out = sources.open_usable(config)
        if not options.data_dir:
            setup.check_same_data(pathlib.Path(options.workdir), splits)
        broken = []
        data = setup.cached({"test": splits["test"]}, config)["test"]
        data, levels = embed_readable(trained.embed, data, lambda data, row: broken.append(data.paths[row]))
        for text in [*left_out, *broken]:
            print(f"left out: {text}", file=sys.stderr)
        table = score_table(levels, data, sources.find(config.dataset).ks, options.clustering)
        alone = next(iter(table.values()))["queries_without_match"]
        print(f"{options.workdir}, step {trained.step}: {len(data)} test images, in percent; {alone} alone in their class")
        print(_as_text(table))
        with config_lib.written_whole(out) as aside:
            aside.write_text(json.dumps({"step": trained.step, "scores": table}, indent=1) + "\n")
        print(f"written: {out}")


if __name__ == "__main__":
    trained_lib.define_flags()
    flags.DEFINE_string("data_dir", "", "folder of the data; by default that of the run")
    flags.DEFINE_bool("clustering", True, "K-means scores too: minutes where there are thousands of classes")
    flags.DEFINE_string("out", "", "JSON file to write; by default evaluation.json in the workdir, written anew")
    app.run(main, flags_parser=config_lib.parse_flags)
