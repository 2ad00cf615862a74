"""A table's groups and image ids, from the file to the scores."""

import json

import numpy as np
import pytest

from experiments.engine import scoring
from rll_jax import metrics
from rll_jax.data import array_records, folders, image_dataset
from rll_jax.training import embedding
from tests.helpers.commands import SMALL, run


def write_table(folder, pictures, splits, group):
    """Copies of the pictures, and a table in which `group(number, i)` names image i of a class."""
    rows = ["path,label,split,group,image_id"]
    for number, pair in enumerate(pictures):
        for i, encoded in enumerate(pair):
            (folder / f"{number}_{i}.png").write_bytes(encoded)
            name = group(number, i)
            rows.append(f"{number}_{i}.png,{number},{splits(number, i)},{name},{i % 3 or ''}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder / "table.csv"


@pytest.fixture
def encoded(emoji):
    data = emoji["test"]
    return [[data.image_bytes(4 * c + i) for i in range(4)] for c in range(12)]


@pytest.mark.parametrize("roles", [("test", "test"), ("query", "gallery")])
def test_groups_reach_the_scores_also_from_prepared_files(roles, tmp_path, encoded):
    table = write_table(
        tmp_path,
        encoded,
        lambda number, i: "train" if number < 4 else roles[i % 2],
        lambda number, i: "" if i == 3 else f"camera {(number + i) % 3}",
    )
    rows = folders.read_index(table)
    from_files = image_dataset.from_rows(tmp_path, rows)["test"]
    array_records.write_dataset(tmp_path, rows, tmp_path / "prepared")
    rng = np.random.default_rng(0)
    levels = {level: rng.normal(size=(len(from_files), 8)) for level in ("H", "L")}
    for data in (from_files, array_records.open_dataset(tmp_path / "prepared")["test"]):
        order = np.argsort(data.paths)
        data = data.take(order)
        names = {row.path: row for row in rows}
        groups = [names[path].group or path for path in data.paths]
        ids = [names[path].image_id or path for path in data.paths]
        for found, expected in ((data.groups, groups), (data.image_ids, ids)):
            same = np.array(expected)[:, None] == np.array(expected)
            np.testing.assert_array_equal(found[:, None] == found, same)
        table = scoring.make_table(scoring.score_levels(levels, data, (1, 2)), data, (1, 2))
        assert list(table) == ["L", "H", "L,H"]
        unit = np.concatenate(
            [levels[n] / np.linalg.norm(levels[n], axis=1, keepdims=True) for n in "LH"], axis=1
        )
        is_query = np.ones(len(data), bool) if roles[0] == "test" else ~data.in_gallery
        arguments = {
            "query_groups": np.array(groups)[is_query],
            "query_ids": np.array(ids)[is_query],
        }
        if roles[0] == "query":
            arguments["gallery_groups"] = np.array(groups)[~is_query]
            arguments["gallery_ids"] = np.array(ids)[~is_query]
        expected = metrics.retrieval_metrics(
            *embedding.queries_and_gallery(unit, data), ks=(1, 2), **arguments
        )
        assert table["L,H"] == pytest.approx(expected, abs=1e-12)


def test_a_run_leaves_groups_out(tmp_path, encoded):
    def options(group):
        def split(number, _):
            return "train" if number < 4 else "test"

        table = write_table(tmp_path, encoded, split, group)
        return [*SMALL, f"--data_dir={tmp_path}", f"--index={table}"]

    pairs = options(lambda number, i: f"{number} {i // 2}")
    result = run(*pairs, "--report", f"--workdir={tmp_path / 'run'}", name="folder")
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, lines) if "recall@1" in line][-1]
    assert last["queries_without_match"] == 0
    assert "95 % interval" in (tmp_path / "run/report.html").read_text()
    one_group = options(lambda number, _: f"class {number}")
    result = run(*one_group, f"--workdir={tmp_path / 'none'}", name="folder")
    told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(told) == 1 and "leave each other out" in told[0]


def test_queries_with_copies_in_the_gallery_are_scored(tmp_path, encoded):
    """A copy in another file is another image: found first, and no error."""
    rows = ["path,label,split"]
    for number, (first, second, *_) in enumerate(encoded):
        for name, picture in (("query", first), ("gallery", first), ("gallery2", second)):
            (tmp_path / f"{number}_{name}.png").write_bytes(picture)
            split = "train" if number < 4 else name.rstrip("2")
            rows.append(f"{number}_{name}.png,{number},{split}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    data = image_dataset.from_rows(tmp_path, folders.read_index(tmp_path / "table.csv"))["test"]
    _, pictures = np.unique(
        [data.image_bytes(row) for row in range(len(data))], return_inverse=True
    )
    levels = {"H": np.random.default_rng(0).normal(size=(len(data), 8))[pictures]}
    table = scoring.make_table(scoring.score_levels(levels, data, (1,)), data, (1,))
    assert table["H"]["recall@1"] == 1 and table["H"]["map@r"] < 1
