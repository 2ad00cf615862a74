"""What a run leaves to its user at the end: the scores and the report."""

from collections.abc import Mapping

import numpy as np

from experiments.engine import logs, query_scores, scoring, zero_shot
from experiments.engine.checks import CheckedRun
from experiments.engine.evaluation import Evaluated
from rll_jax.networks import embedding_net


def scores_in_a_line(scores: Mapping[str, float]) -> str:
    """Returns the scores that are shares, in percent."""
    shares = (name for name in scores if name != "queries_without_match")
    return "  ".join(f"{name} {100 * scores[name]:.1f}" for name in shares)


def finish(checked: CheckedRun, evaluated: Evaluated) -> None:
    """Prints Recall@K, and writes the report where it is wanted."""
    config, data = checked.config, evaluated.data
    ks = config.data.entry.ks
    table = scoring.make_table(evaluated.by_query, data, ks)
    by_query = list(evaluated.by_query.values())[-1]
    scores = query_scores.collect(by_query, data)
    query_scores.write(checked.workdir, scores)
    gain = zero_shot.compare(config, checked.workdir, scores)
    path = checked.workdir / "report.html"
    if config.runtime.report:
        from experiments.engine import report  # more than a second to import

        print("writing the report ...", flush=True)
        report.write(
            path,
            title=f"Retrieval on unseen classes: {checked.workdir.name}",
            lines=logs.read_lines(checked.workdir / "metrics.jsonl"),
            config=config,
            test=data,
            embeddings=np.asarray(embedding_net.concatenate_levels(evaluated.levels)),
            table=table,
            scores=scores,
            gain=gain,
        )
    all_levels = list(table.values())[-1]
    recalls = "  ".join(f"Recall@{k} {100 * all_levels[f'recall@{k}']:.1f} %" for k in ks)
    classes = len(np.unique(data.labels))
    print(f"Recall@K on {classes} classes never trained on: {recalls}")
    if gain is not None:
        print(zero_shot.in_a_line(gain))
    if config.runtime.report:
        print(f"report: {path}")
