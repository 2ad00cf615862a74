"""What runs have left: which folders are meant, what is damaged, which runs scored the same."""

import json
import pathlib

import numpy as np
import pytest

from experiments.engine import comparison_page, config, finished_runs, query_scores
from rll_jax import metrics


def a_run(folder, *, rows=40, seed=0, images="digest", **options):
    """Writes the folder of a run that has ended."""
    folder.mkdir(parents=True)
    (folder / "flags.txt").write_text(config.from_flat(**options).as_flagfile())
    rng, labels = np.random.default_rng(seed), np.arange(rows) // 2
    by_query = metrics.scores_by_query(rng.normal(size=(rows, 3)), labels, ks=(1,))
    classes = labels[by_query["query"]]
    query_scores.write(folder, query_scores.QueryScores(by_query, classes, images))
    means = metrics.mean_scores(by_query, rows, ks=(1,))
    lines = [{"step": 1, "loss": 0.5, "images_per_second": 9.0}, {"step": 1, **means}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "data.json").write_text(json.dumps({"test": "digest"}))
    return folder


def test_folders_whose_names_have_commas_are_found(tmp_path):
    one, two = a_run(tmp_path / "a=1,levels=L,M"), a_run(tmp_path / "b")
    split = finished_runs.split_folders
    assert split(f"{one},{two}") == [one, two] and split(f"{two},{one}") == [two, one]
    assert split("x,y") == [pathlib.Path("x"), pathlib.Path("y")]
    for text in ("", f"{one},", f",{two}", f"{one},,{two}"):
        with pytest.raises(ValueError, match="expected folders with commas between"):
            split(text)
    names = [run.name for run in finished_runs.read([one, two])]
    assert names == ["a=1,levels=L,M", "b"]
    seeds = [pathlib.Path("/r/a/seed=0"), pathlib.Path("/r/b/seed=0")]
    assert finished_runs.short_names(seeds) == ["a/seed=0", "b/seed=0"]


def refused(text, *folders):
    with pytest.raises(ValueError, match=text):
        finished_runs.read(folders)


def test_what_is_no_run_is_refused(tmp_path):
    run = a_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(run)
    refused("no such folder", tmp_path / "none")
    refused("no such folder", run / "flags.txt")
    refused("holds no run", run, tmp_path / "empty")
    refused("are the same run: give it once", run, run)
    refused("are the same run: give it once", run, tmp_path / "link")
    text = (run / "metrics.jsonl").read_text()
    for line in ("no json", "[1]", '{"loss": 1}', '{"step": 1, "loss": "a"}', '{"step": null}'):
        (run / "metrics.jsonl").write_text(text + line + "\n")
        refused("metrics.jsonl, line 3: expected a JSON object of numbers", run)
    (run / "metrics.jsonl").write_text(text.splitlines()[0] + "\n" + text.splitlines()[1])
    refused("without an evaluation", run)  # the last line is cut off
    (run / "metrics.jsonl").write_bytes(b"\xff\n")
    refused("metrics.jsonl is damaged", run)
    (run / "metrics.jsonl").unlink()
    refused("without an evaluation", run)
    (run / "flags.txt").write_text("--stepz=1\n")
    (run / "metrics.jsonl").write_text(text)
    refused("flags.txt, line 1", run)


def why(one, two):
    first, run = finished_runs.read([one, two])
    return finished_runs.why_not_paired(run, first)


def test_runs_are_paired_where_they_scored_the_same_queries(tmp_path):
    one, two = a_run(tmp_path / "one"), a_run(tmp_path / "two", seed=1)
    assert not why(one, two)
    first, run = finished_runs.read([one, two])
    found = finished_runs.differences(run, first)["recall@1"]
    assert found.value == pytest.approx(run.last["recall@1"] - first.last["recall@1"])
    other = "scored other test images"
    assert other in why(one, a_run(tmp_path / "images", images="other"))
    assert other in why(one, a_run(tmp_path / "fewer", rows=38))
    old = a_run(tmp_path / "old", images="")  # of a version that kept no digest of the images
    assert not why(one, old) and not why(old, a_run(tmp_path / "older", images=""))
    (old / "data.json").write_text(json.dumps({"test": "another digest"}))
    assert other in why(one, old)


def test_scores_that_are_missing_or_damaged_are_told(tmp_path):
    one, two = a_run(tmp_path / "one"), a_run(tmp_path / "two")
    kept = two / query_scores.NAME
    whole = kept.read_bytes()
    kept.unlink()
    assert why(one, two) == (
        "two kept no scores of each query: it has not ended, or is of an earlier version"
    )
    kept.write_bytes(whole[: len(whole) // 2])
    assert "two kept scores of each query that cannot be read" in why(one, two)
    np.savez(kept, classes=np.arange(3), first_rank=np.ones(3))
    assert "that cannot be read" in why(one, two)
    columns = {name: np.ones(2) for name in ("query", "first_rank", "average_precision")}
    np.savez(kept, classes=np.arange(3), r_precision=np.ones(2), **columns)
    assert "that are damaged" in why(one, two)
    kept.write_bytes(whole)
    with (two / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "recall@1": 0.9, "map@r": 0.9, "mrr": 0.9}) + "\n")
    assert why(one, two) == "two kept scores of each query of an earlier evaluation"


def test_a_page_of_runs_that_differ_in_all(tmp_path):
    """Other images, no scores of each query, one class, damaged side files, many runs."""
    runs = [a_run(tmp_path / f"run {number}<", seed=number, margin=0.1) for number in range(10)]
    runs.append(a_run(tmp_path / "other", rows=38, dataset="cub", data_dir="x", margin=0.2))
    (runs[1] / query_scores.NAME).unlink()
    (runs[2] / "environment.json").write_text("[]")
    (runs[3] / "environment.json").write_text('{"devices": 3, "packages": [], "commit": null}')
    (runs[4] / "environment.json").write_bytes(b"\xff")
    comparison_page.write(
        tmp_path / "page.html", finished_runs.read(runs), None, "the data is gone."
    )
    page = (tmp_path / "page.html").read_text()
    assert "<title>Comparison of 11 runs" in page and "run 0&lt;" in page and "run 0<" not in page
    assert "Recall@1 of run 2&lt; against run 0&lt;: " in page
    assert "No images: the data is gone." in page
    assert "There are no intervals of run 1&lt;: it kept no scores" in page
    assert "other against run 0&lt;: there is no paired difference." in page
    assert '<th scope="row">margin</th>' in page.partition("equal options")[0]
    assert '<th scope="row">alpha</th>' in page.partition("equal options")[2]
    comparison_page.write(tmp_path / "one.html", finished_runs.read(runs[:1]), None, "")
    page = (tmp_path / "one.html").read_text()
    assert "The run run 0&lt;" in page and "Recall@1 of" not in page
    assert "Options that differ" not in page and "Queries on which" not in page
