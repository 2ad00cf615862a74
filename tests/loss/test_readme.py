"""What the loss's README says is what happens."""

import inspect
import re

import pytest

from rll_jax import loss
from tests.helpers.paths import ROOT
from tests.helpers.snippets import check_snippets

TEXT = (ROOT / "rll_jax/loss/README.md").read_text()


def test_snippets_print_what_they_say():
    check_snippets(TEXT)


@pytest.mark.parametrize(
    "function",
    [
        loss.ranked_list_loss,
        loss.ranked_list_loss_terms,
        loss.ranked_list_loss_of_query,
        loss.pml_ranked_list_loss,
    ],
)
def test_the_table_has_the_defaults_of_every_signature(function):
    (arguments,) = re.findall(r"^\| argument \|.*\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    rows = [[cell.strip(" `") for cell in row.split("|")] for row in arguments.splitlines()[1:]]
    table = {name: default for _, name, _, default, _, _ in rows}
    assert len(rows) == len(table) == 12
    shown = {
        name: repr(parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default not in (parameter.empty, None)
    }
    assert shown and shown.items() <= table.items()
    if function is loss.ranked_list_loss:
        assert shown == table


def test_every_public_function_is_named():
    names = [name for name in loss.__all__ if name[0].islower()]
    assert names and all(re.search(rf"`(loss\.)?{name}\b", TEXT) for name in names)
