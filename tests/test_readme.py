"""What the README says is what happens."""

import re

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.snippets import check_snippets

TEXT = (ROOT / "README.md").read_text()


def test_snippets_print_what_they_say():
    check_snippets(TEXT)


def test_files_it_names_are_there():
    named = re.findall(r"`((?:rll_jax|experiments)/[\w/.]+)`", TEXT)
    assert named and all((ROOT / name).exists() for name in named)
    flagfiles = re.findall(r"`(\w+\.flags)`", TEXT)
    assert flagfiles and all((ROOT / "experiments/flagfiles" / name).exists() for name in flagfiles)


PAGES = [
    path
    for folder in (".", ".github", "rll_jax", "experiments")
    for path in ((ROOT / folder).glob("*.md") if folder == "." else (ROOT / folder).rglob("*.md"))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_leads_to_what_is_there(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", text)
    assert all((page.parent / link).exists() for link in links), links
    modules = re.findall(r"python -m (experiments(?:\.\w+)+)", text)
    for module in set(modules) - {"experiments.NAME", "experiments.count"}:
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_front_page_is_short():
    assert len(TEXT.splitlines()) <= 150
