"""A comparison: what it runs, the rates it chooses, its table, and the command on a few images."""

import json
import pathlib
import statistics
import types

import numpy as np
import pytest
from scipy import stats

from experiments import compare
from experiments.engine import comparison_table, config, many_runs, query_scores
from tests.helpers.commands import TINY, refused, run

BASE = {**config.Config().flat(), "workdir": "w", "report": False, "steps": 20}


def write_scores(run, recall, step=None):
    folder = pathlib.Path(run.runtime.workdir)
    folder.mkdir(parents=True)
    lines = [
        {"step": 0, "recall@1": 0.01, "map@r": 0.01},
        {"step": step or run.schedule.steps, "recall@1": recall, "map@r": recall / 2},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_equal_terms():
    """Runs of a kind differ in loss, rate, seed and folder alone; the last see the test classes."""
    names = list(compare.ENTRIES)
    tuned = compare._runs_to_tune(BASE, names, [1e-3, 1e-2], 0.3, 10)
    compared = compare._runs_to_compare(BASE, dict.fromkeys(names, 1e-2), 5)
    assert len(tuned) == 2 * len(names) and len(compared) == 5 * len(names)
    for (name, value), one in [*tuned.items(), *compared.items()]:
        of_tuning = (name, value) in tuned
        free = {*compare.ENTRIES[name].options, "learning_rate", "seed", "workdir"} | (
            {"validation_share", "steps"} if of_tuning else set()
        )
        flat = one.flat()
        assert all(flat[name] == BASE[name] for name in config.OPTIONS if name not in free)
        assert (flat["validation_share"], flat["steps"]) == ((0.3, 10) if of_tuning else (0, 20))
    runs = [*tuned.values(), *compared.values()]
    assert len({run.runtime.workdir for run in runs}) == 7 * len(names)
    assert [seed for _, seed in compared][: len(names)] == [0] * len(names)


def test_rates_are_tried_until_the_best_is_not_at_an_end(tmp_path):
    options = types.SimpleNamespace(
        rates="1e-3,3e-3,9e-3", more_rates=2, choose_by="map@r", tuning_share=0.3, tuning_steps=0
    )
    recalls = {
        "rll": {3e-3: 0.6},  # in the middle
        "sup_con": {9e-3: 0.6, 3e-2: 0.7, 9e-2: 0.8},  # ever better
        "lifted": {1e-3: 0.6, 3e-4: 0.55},
        "n_pair": {3e-3: 0.5, 1e-3: 0.5},  # the lower of two that are alike
    }
    told = []

    def execute(runs):
        for one in runs:
            name = pathlib.Path(one.runtime.workdir).parent.name
            rate = one.optimizer.learning_rate
            if name in recalls and many_runs.scores(one) is None:
                told.append((name, rate))
                write_scores(one, recalls[name].get(rate, 0.1))

    names = [*recalls, "contrastive"]  # whose runs all fail
    chosen, tried = compare._tuned(BASE | {"workdir": str(tmp_path)}, names, options, execute)
    assert chosen == {"rll": 3e-3, "sup_con": 9e-2, "lifted": 1e-3, "n_pair": 1e-3}
    assert tried["rll"] == [1e-3, 3e-3, 9e-3] and tried["lifted"] == [1e-3, 3e-3, 9e-3, 3e-4]
    assert len(tried["sup_con"]) == 5 and len(told) == len(set(told))


def test_a_run_that_died_before_its_first_score_is_no_untrained_network(tmp_path):
    runs = [
        config.from_flat(**BASE | {"workdir": str(tmp_path / name)}) for name in ("died", "ended")
    ]
    write_scores(runs[1], 0.5)
    (tmp_path / "died").mkdir()
    (tmp_path / "died/metrics.jsonl").touch()
    assert compare._untrained(runs)["recall@1"] == 0.01
    (tmp_path / "died/metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="died/metrics.jsonl, line 1: expected a JSON object"):
        many_runs.scores(runs[0])


def test_the_table_is_of_the_runs_scores(tmp_path):
    found = {"rll": [0.50, 0.54, 0.52], "triplet_hard": [0.47, 0.52, 0.49]}
    compared = compare._runs_to_compare(
        BASE | {"workdir": str(tmp_path)}, {"rll": 1e-2, "triplet_hard": 1e-3}, 3
    )
    for (name, seed), one in compared.items():
        write_scores(one, found[name][seed])
    first, second, third = compare._rows(
        compared, {"rll": 1e-2, "triplet_hard": 1e-3}, ["rll", "triplet_hard", "lifted"]
    )
    assert first["recall@1"]["mean"] == pytest.approx(52) and first["recall@1"][
        "std"
    ] == pytest.approx(2)
    differences = [-3, -2, -3]  # by seed
    found = second["recall@1"]["difference"]
    assert found["values"] == pytest.approx(differences)
    low, high = stats.t.interval(
        0.95, 2, statistics.fmean(differences), statistics.stdev(differences) / 3**0.5
    )
    assert (found["mean"] - found["half"], found["mean"] + found["half"]) == pytest.approx(
        (low, high)
    )
    assert second["map@r"]["mean"] == pytest.approx(24.667, abs=1e-3)
    text = comparison_table.as_markdown(
        [first, second, third], "", compare._untrained([compared["rll", 0]])
    ).splitlines()
    assert (
        text[-3]
        == "| Triplet, batch-hard | 0.001 | 49.3 ± 2.5 | -2.7 ± 1.4 | 24.7 ± 1.3 | -1.3 ± 0.7 | 3 |"
    )
    assert text[-2] == "| Lifted structure | failed | - | - | - | - | 0 |"
    assert text[-1] == "| the network before its first step |  | 1.0 |  | 1.0 |  | 1 |"


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--only=rll,rlll"], "--only=rll,rlll: expected some of rll, rll_both_ends, "),
        (["--rates=0.1,fast"], "--rates=0.1,fast: expected learning rates"),
        (
            ["--margin=0.2", "--query_weighting=mass"],
            "--query_weighting is for the comparison to choose",
        ),
        (["--out=/no/such/folder"], "--out=/no/such/folder: no such folder"),
        (["--classes_per_batch=1"], "--classes_per_batch=1"),
        (["--dry_run"], "--dry_run is of one run"),
    ],
)
def test_mistakes_before_anything_is_written(arguments, text, tmp_path):
    refused(text, *arguments, f"--workdir={tmp_path / 'compare'}", name="compare")
    assert not (tmp_path / "compare").exists()


def test_another_comparison_in_the_folder_is_refused(tmp_path):
    base = BASE | {"workdir": str(tmp_path), "tuning_share": "0.3"}
    many_runs.claim_folder("compare", base, [("seeds", 3)])
    many_runs.claim_folder("compare", base | {"threads": 7}, [("seeds", 5)])
    for changed, text in (
        ({"tuning_share": "0.5"}, "--tuning_share=0.3 there, 0.5 here"),
        ({"steps": 9}, "--steps=20 there, 9 here"),
    ):
        with pytest.raises(ValueError, match=text):
            many_runs.claim_folder("compare", base | changed, [("seeds", 3)])


@pytest.mark.slow
def test_the_command_goes_on_with_more_seeds(tmp_path):
    tiny = [flag for flag in TINY if not flag.startswith(("--memory", "--steps"))]
    given = [
        *tiny,
        "--steps=4",
        "--only=rll_lmh,pml_rll,proxy_anchor",
        "--rates=1e-3,1e-2",
        "--more_rates=0",
        "--jobs=2",
        f"--workdir={tmp_path / 'compare'}",
    ]
    given = [flag.replace("resnet_tiny", "resnet_smaller") for flag in given]
    result = run(*given, "--seeds=1", name="compare")
    assert result.returncode == 0, result.stderr
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert len(before) == 6 + 3
    result = run(*given, "--seeds=2", f"--out={tmp_path}", name="compare")
    assert result.returncode == 0 and result.stdout.count("finished before") == 6 + 3, result.stderr
    assert (
        all(path.stat().st_mtime_ns == time for path, time in before.items())
        and len(list(tmp_path.rglob("metrics.jsonl"))) == 6 + 6
    )
    rows = json.loads((tmp_path / "compare.json").read_text())
    assert [row["seeds"] for row in rows] == [[0, 1]] * 3
    assert (tmp_path / "compare.md").read_text() in result.stdout and (
        tmp_path / "compare.png"
    ).stat().st_size > 10_000
    refused(
        "holds another compare (--embedding_dim=16 there, 8 here)",
        *given,
        "--embedding_dim=8",
        name="compare",
    )
    refused("--tuning_share", *given, "--tuning_share=0.5", name="compare")


def test_differences_over_classes_are_paired_by_query(tmp_path):
    """Two seeds of an entry and of the first; what a run has kept is what is read."""
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(30), 4)
    runs = []
    for number, share in enumerate((0.5, 0.6, 0.7, 0.8)):  # the first's seeds, the other's seeds
        hits = rng.random(120) < share
        by_query = {"query": np.arange(120), "first_rank": np.where(hits, 1, 2)}
        by_query |= {"r_precision": hits * 1.0, "average_precision": hits * 1.0}
        (tmp_path / str(number)).mkdir()
        query_scores.write(tmp_path / str(number), query_scores.QueryScores(by_query, classes))
        runs.append(query_scores.read(tmp_path / str(number)))
    first, other = query_scores.join(runs[:2]), query_scores.join(runs[2:])
    found = query_scores.intervals(other, (1,), first)
    means = [np.mean(run.by_query["first_rank"] == 1) for run in runs]
    assert found["recall@1"].value == pytest.approx(np.mean(means[2:]) - np.mean(means[:2]))
    scores = {
        name: {seed: {"recall@1": means[2 * i + seed], "map@r": 0.0} for seed in range(2)}
        for i, name in enumerate(("rll", "other"))
    }
    titles = {"rll": "RLL", "other": "Other"}
    rows = comparison_table.make_rows(scores, titles, dict.fromkeys(titles, 0.1), {"other": found})
    low, high = (100 * end for end in found["recall@1"][1:])
    assert f"({low:+.1f} to {high:+.1f})" in comparison_table.as_markdown(rows, "")
    with pytest.raises(ValueError, match="other classes"):
        query_scores.intervals(other, (1,), runs[0])
    assert runs[0].is_paired_with(runs[1])
    kept = runs[0]._replace(images="a")
    assert kept.is_paired_with(runs[1]) and not kept.is_paired_with(runs[1]._replace(images="b"))
    moved = {**runs[1].by_query, "query": np.arange(1, 121)}
    assert not runs[0].is_paired_with(runs[1]._replace(by_query=moved))
    (tmp_path / "0" / query_scores.NAME).write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        query_scores.read(tmp_path / "0")
