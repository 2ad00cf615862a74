"""The notebook runs from top to bottom, and what it shows is what its cells make."""

import os
import re

import pytest

from tests.helpers.paths import ROOT

nbformat = pytest.importorskip(
    "nbformat", reason="needs nbclient and ipykernel: pip install -r requirements-dev.txt"
)
TOUR = ROOT / "experiments/studies/tour.ipynb"
NUMBER = re.compile(r"-?\d+\.?\d*")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.fixture(scope="module")
def committed():
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    return code_cells(notebook)


def test_was_run_whole_and_in_order(committed):
    assert [cell.execution_count for cell in committed] == list(range(1, len(committed) + 1))
    for cell in committed:
        kinds = {output.get("name", output.output_type) for output in cell.outputs}
        assert kinds <= {"stdout", "display_data"}  # no error, no warning, no repr
        assert ("plt.show()" in cell.source) == (pictures(cell) == 1)
        assert ("print(" in cell.source) == bool(text(cell))
    assert sum(map(pictures, committed)) >= 8
    assert TOUR.stat().st_size < 1.5e6


def test_shows_that_training_helps(committed):
    before, after = (
        re.search(rf"^{when} +([\d.]+)", "".join(map(text, committed)), re.MULTILINE)
        for when in ("before", "after")
    )
    assert float(after[1]) > 1.5 * float(before[1])


@pytest.mark.slow
def test_its_cells_make_what_it_shows(committed):
    """The whole notebook in three training steps: what does not depend on them is as committed."""
    pytest.importorskip("ipykernel", reason="pip install -r requirements-dev.txt")
    nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")
    notebook = nbformat.read(TOUR, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(TOUR.parent)}},
    )
    quick = {"STEPS": "3", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    client.execute(env=os.environ | quick)
    made = code_cells(notebook)
    assert [pictures(cell) for cell in made] == [pictures(cell) for cell in committed]
    same = 0
    for cell, shown in zip(made, committed, strict=True):
        if re.search(r"\b(STEPS|history|after)\b", cell.source) and "batches" not in cell.source:
            continue
        assert NUMBER.sub("#", text(cell)).split() == NUMBER.sub("#", text(shown)).split()
        pairs = list(zip(NUMBER.findall(text(cell)), NUMBER.findall(text(shown)), strict=True))
        # Other devices round differently: two in the last digit are allowed.
        assert not [
            (x, y)
            for x, y in pairs
            if abs(float(x) - float(y)) > 2.5 * 10 ** -len(y.partition(".")[2]) * ("." in y)
        ]
        same += bool(pairs)
    assert same >= 12
