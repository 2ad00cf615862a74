"""The page of the results against the records that it quotes."""

import re

import pytest

from tests.helpers.paths import ROOT

RESULTS = ROOT / "experiments/results"
TEXT = (RESULTS / "README.md").read_text()


def table(text, first_cell):
    """The head of the table that starts with this cell, and its rows by their first cell."""
    lines = text[text.index(f"\n| {first_cell} |") :].strip().splitlines()
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    head, _, *rows = rows
    return head, {row[0]: row for row in rows}


def section(title):
    return re.search(rf"\n## {title}\n(.*?)(?=\n## |\Z)", TEXT, re.DOTALL)[1]


@pytest.mark.parametrize(
    "title, record, columns, first_cell, num_rows",
    [
        # The places of the page's columns in the record: Recall@1, differences, MAP@R.
        ("The emoji comparison", "emoji_compare.md", [2, 3, 4], "loss", 15),
        ("The emoji comparison", "emoji_compare_long.md", [2, 3, 4], "loss, 600 steps", 6),
        ("The grocery comparison", "grocery_compare.md", [2, 4, 5], "loss", 13),
        ("The CUB comparison", "cub_compare.md", [2, 3, 4, 5], "loss", 11),
    ],
)
def test_rows_of_a_comparison_are_those_of_its_record(title, record, columns, first_cell, num_rows):
    _, rows = table(section(title), first_cell)
    _, recorded = table((RESULTS / record).read_text(), "loss")
    assert len(rows) == num_rows
    for name, (_, *cells) in rows.items():
        # The record has intervals over classes too, in brackets.
        assert cells == [recorded[name][column].partition(" (")[0] for column in columns]


def test_the_batch_size_is_that_of_its_record():
    _, rows = table(section("The batch size"), "Recall@1")
    _, recorded = table((RESULTS / "emoji_batch_size.md").read_text(), "Recall@1")
    assert rows == recorded and len(rows) == 3


@pytest.mark.parametrize(
    "record, first_cell, num_rows",
    [
        ("gradient_question.md", "embeddings", 5),
        ("cub_gradient_question.md", "embeddings of CUB", 2),
    ],
)
def test_quotes_of_the_gradient_question_are_rounded_from_its_record(record, first_cell, num_rows):
    text = section("The gradient question").partition(f"\n| {first_cell} |")[2].partition("\n\n")[0]
    head, recorded = table((RESULTS / record).read_text(), "embeddings")
    dimension, pulled = head.index("effective dimension"), head.index("T = 10")
    shares = {}
    for row in recorded.values():
        pairs, norm = re.fullmatch(r"([\d.]+) \(([\d.]+)\)", row[pulled]).groups()
        shares[round(float(row[dimension]))] = (round(float(pairs)), round(float(norm)))
    quoted = re.findall(r"\| (\d+) \| (\d+) %(?:, with (\d+) % of)?", text)
    assert len(quoted) == num_rows
    for at, pairs, norm in quoted:
        assert shares[int(at)][0] == int(pairs) and norm in ("", str(shares[int(at)][1]))


def test_links_lead_to_files_and_sections():
    targets = re.findall(r"\]\((?!http)([^)]+)\)", TEXT)
    sections = re.findall(r"^## (.*)$", TEXT, re.M)
    anchors = {"#" + re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in sections}
    assert targets
    for target in targets:
        assert target in anchors or (RESULTS / target).is_file(), target


def test_commands_name_files_that_are_there():
    named = re.findall(r"experiments/flagfiles/\w+\.flags", TEXT)
    named += [f"experiments/flagfiles/{name}" for name in re.findall(r"`(\w+\.flags)`", TEXT)]
    assert named and all((ROOT / name).is_file() for name in named)
