"""Rows that are query, gallery or both: from a table's columns to the scores of each command."""

import json

import numpy as np
import pytest

from experiments.engine import scoring
from rll_jax.data import array_records, folders, image_dataset
from tests.helpers.commands import SMALL, run

BOTH, QUERY, GALLERY = "True,True", "True,False", "False,True"
# The roles of a class's four images.
CASES = {
    "all queries, some found": (BOTH, QUERY, BOTH, QUERY),
    "some both": (BOTH, QUERY, GALLERY, GALLERY),
    "all found, some queries": (BOTH, GALLERY, BOTH, GALLERY),
}


@pytest.fixture
def pictures(emoji, tmp_path):
    """Twelve classes of four pictures in a folder."""
    for number in range(12):
        for i in range(4):
            encoded = emoji["test"].image_bytes(4 * number + i)
            (tmp_path / f"{number}_{i}.png").write_bytes(encoded)
    return tmp_path


def write_table(folder, roles):
    lines = ["path,label,split,is_query,is_gallery,x_1,y_1,x_2,y_2"]
    for number in range(12):
        for i, role in enumerate(roles):
            split = "train,," if number < 4 else f"validation,{role}"
            lines.append(f"{number}_{i}.png,{number},{split},2,3,30,31")
    (folder / "df.csv").write_text("\n".join(lines) + "\n")
    return folder / "df.csv"


def ranked_by_hand(embeddings, labels, query_rows, gallery_rows):
    """{score: value}, from a sorted list for each query, without the query itself."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    first = []
    for query in query_rows:
        others = np.array([row for row in gallery_rows if row != query])
        order = others[np.argsort(-unit[others] @ unit[query])]
        right = np.flatnonzero(labels[order] == labels[query])
        if len(right):
            first.append(right[0] + 1)
    first = np.array(first)
    without = len(query_rows) - len(first)
    return {
        "recall@1": np.mean(first <= 1),
        "recall@2": np.mean(first <= 2),
        "mrr": np.mean(1 / first),
        "queries_without_match": without,
    }


@pytest.mark.parametrize("roles", CASES.values(), ids=CASES)
def test_a_query_finds_all_of_the_gallery_but_itself(roles, pictures):
    rows = folders.read_index(write_table(pictures, roles))
    array_records.write_dataset(pictures, rows, pictures / "prepared")
    prepared = array_records.open_dataset(pictures / "prepared")["test"]
    for data in (image_dataset.from_rows(pictures, rows)["test"], prepared):
        role_of = [roles[int(path.split(".")[0].split("_")[1])] for path in data.paths]
        is_query = np.array([role.startswith("True") for role in role_of])
        in_gallery = np.array([role.endswith("True") for role in role_of])
        levels = {"H": np.random.default_rng(0).normal(size=(len(data), 8))}
        found = scoring.make_table(scoring.score_levels(levels, data, (1, 2)), data, (1, 2))["H"]
        expected = ranked_by_hand(
            levels["H"], data.labels, np.flatnonzero(is_query), np.flatnonzero(in_gallery)
        )
        assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_a_query_that_could_only_find_itself_is_refused(pictures):
    rows = folders.read_index(write_table(pictures, (BOTH, QUERY, QUERY, QUERY)))
    splits = image_dataset.from_rows(pictures, rows)
    image_dataset.check_splits(**splits)
    first = splits["test"].take([i for i, p in enumerate(splits["test"].paths) if "_0." in p])
    with pytest.raises(ValueError, match="no query has an image of its class in the gallery"):
        image_dataset.check_splits(splits["train"], first)


def test_a_run_and_its_evaluation(pictures):
    """With boxes; also from prepared files."""
    table = write_table(pictures, CASES["some both"])
    prepared = run(
        *("--dataset=folder", f"--source={pictures}", f"--index={table}"), name="prepare"
    )
    assert prepared.returncode == 0, prepared.stderr
    read = {
        "files": [f"--data_dir={pictures}", f"--index={table}"],
        "prepared": [f"--data_dir={pictures / 'prepared_folder'}"],
    }
    scores = []
    for name, where in read.items():
        workdir = f"--workdir={pictures / name}"
        result = run(*SMALL, *where, "--report", workdir, name="folder")
        assert result.returncode == 0, result.stderr
        again = run(workdir, "--noclustering", name="evaluate")
        assert again.returncode == 0 and "32 test images" in again.stdout, again.stderr
        lines = (pictures / name / "metrics.jsonl").read_text().splitlines()
        scores.append([line for line in map(json.loads, lines) if "recall@1" in line][-1])
        table_of = json.loads((pictures / name / "evaluation.json").read_text())["scores"]
        assert list(table_of.values())[-1]["recall@1"] == pytest.approx(scores[-1]["recall@1"])
    assert scores[0]["recall@1"] == pytest.approx(scores[1]["recall@1"])
