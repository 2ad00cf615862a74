"""The pages of report, experiments.report and search: what a user asks for, and in Chromium."""

import pathlib
import shutil

import pytest

from experiments.engine import config
from tests.helpers.browser import chromium, opened
from tests.helpers.commands import FEW, refused, run

SHORT = [flag for flag in FEW if "steps" not in flag and "every" not in flag]
SHORT += ["--steps=2", "--eval_every=1", "--checkpoint_every=2"]


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory):
    """A run, and another that starts from it."""
    root = tmp_path_factory.mktemp("pages")
    for name, given in (
        ("a", []),
        ("b", ["--report", f"--init_from={root / 'a'}", "--seed=1"]),  # the same programs
    ):
        ended = run(*SHORT, *given, "--log_every=1", f"--workdir={root / name}")
        assert ended.returncode == 0, ended.stderr
    return root


@pytest.fixture(scope="module")
def pages(runs):
    """{name: the path of a page}."""
    both = f"--workdir={runs / 'a'},{runs / 'b'}"
    compared = run(both, f"--out={runs / 'compared.html'}", name="report")
    assert compared.returncode == 0, compared.stderr
    folder = config.from_flagfile(runs / "a/flags.txt").runtime.data_dir
    query = next(pathlib.Path(folder).glob("class *"))
    asked = [f"--images={folder}", f"--query={query}", f"--out={runs / 'search.html'}"]
    searched = run(f"--workdir={runs / 'a'}", *asked, name="search")
    assert searched.returncode == 0, searched.stderr
    paths = [runs / "b/report.html", runs / "compared.html", runs / "search.html"]
    return {path.stem: path for path in paths}


def test_runs_are_compared(runs, pages):
    page = pages["compared"].read_text()
    assert "Comparison of 2 runs" in page and "Recall@1 of b against a: " in page
    assert "b: fine-tuning brought Recall@1" in page and ">images/s</th>" in page
    assert 'scope="row">seed</th><td>0</td><td>1</td>' in page
    assert "Better in b than in a</h3>" in page and "Better in a than in b</h3>" in page
    again = run(f"--workdir={runs / 'a'}", f"--workdir={runs / 'b'}", name="report")
    assert again.returncode == 0 and f"page: {runs / 'a/comparison.html'}" in again.stdout
    assert (runs / "a/comparison.html").read_text() == page


def test_images_of_a_comparison_come_from_where_they_are(runs, tmp_path):
    """A sentence where they have moved; --data_dir finds them, or is refused."""
    moved, data = tmp_path / "moved", tmp_path / "data"
    shutil.copytree(runs / "a", moved)
    options = config.from_flagfile(moved / "flags.txt")
    shutil.copytree(options.runtime.data_dir, data)
    flags = options.replace(data_dir=str(tmp_path / "gone")).as_flagfile()
    (moved / "flags.txt").write_text(flags)
    asked = [f"--workdir={moved},{runs / 'b'}", f"--out={tmp_path / 'page.html'}"]
    ended = run(*asked, name="report")
    assert ended.returncode == 0, ended.stderr
    page = (tmp_path / "page.html").read_text()
    assert "No images: " in page and "--data_dir names another folder." in page
    (tmp_path / "page.html").unlink()
    ended = run(*asked, f"--data_dir={data}", name="report")
    assert ended.returncode == 0 and "<img" in (tmp_path / "page.html").read_text(), ended.stderr
    (tmp_path / "page.html").unlink()
    for path in data.rglob("*.png"):
        path.rename(path.with_name(f"other {path.name}"))
    refused("not the test images that", *asked, f"--data_dir={data}", name="report")
    assert not (tmp_path / "page.html").exists()


def test_mistakes_get_one_line(runs, tmp_path):
    """What else is no run: tests/engine/test_finished_runs.py."""
    a, there = runs / "a", tmp_path / "there.html"
    there.write_text("years of work")
    refused("no such folder", f"--workdir={a},{tmp_path / 'none'}", name="report")
    refused("there.html exists", f"--workdir={a}", f"--out={there}", name="report")
    assert there.read_text() == "years of work"


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


SERIOUS = ("serious", "critical")


@pytest.mark.parametrize("name", ["report", "compared", "search"])
@pytest.mark.parametrize("scheme, width", [("light", 1200), ("dark", 360)])
def test_pages_are_readable_by_all(pages, browser, name, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    with opened(browser, pages[name], width=width, scheme=scheme) as page:
        for folded in page.locator("details").all():
            folded.evaluate("one => one.open = true")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        found = axe.Axe().run(page).response["violations"]
        assert not [one for one in found if one["impact"] in SERIOUS], found
        page.locator("figure button").first.click()
        found = axe.Axe().run(page).response["violations"]
        assert not [one for one in found if one["impact"] in SERIOUS], found
        grounds = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == grounds[scheme]


def test_tables_sort_by_click_and_by_keyboard(pages, browser):
    with opened(browser, pages["report"]) as page:
        table = page.locator("table", has_text="All levels, over the steps")
        names = table.locator("tbody th")
        head = table.locator("thead th", has_text="step")
        before = names.all_text_contents()
        assert before == ["zero_shot", "0", "1", "2"]
        head.locator("button").click()
        assert names.all_text_contents() == ["0", "1", "2", "zero_shot"]
        assert head.get_attribute("aria-sort") == "ascending"
        page.keyboard.press("Enter")
        assert names.all_text_contents() == ["2", "1", "0", "zero_shot"]
        assert head.get_attribute("aria-sort") == "descending"
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        assert head.get_attribute("aria-sort") is None
        scores = [
            float(text) for text in table.locator("tbody td:nth-child(2)").all_text_contents()
        ]
        assert scores == sorted(scores)
        page.keyboard.press("Space")
        page.keyboard.press("Space")
        assert names.all_text_contents() == before


def test_images_enlarge_and_escape_closes(pages, browser):
    with opened(browser, pages["report"]) as page:
        buttons, dialog = page.locator("figure button"), page.locator("dialog")
        assert buttons.count() == page.locator("figure img").count() > 100
        buttons.nth(1).focus()
        page.keyboard.press("Enter")
        assert dialog.is_visible() and "similarity" in dialog.inner_text()
        large = dialog.locator("img")
        assert large.evaluate("one => one.naturalWidth > 0 && one.clientWidth > 200")
        page.keyboard.press("ArrowRight")
        third = page.locator("figure img").nth(2)
        assert large.get_attribute("src") == third.get_attribute("src")
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        assert buttons.nth(1).evaluate("one => one === document.activeElement")
        page.locator(".figure button").click()
        assert large.evaluate("one => one.clientWidth") == 1400  # the map, in its full size
        dialog.locator("button", has_text="Close").click()
        assert not dialog.is_visible()


def test_a_page_can_fetch_nothing_and_run_nothing_else(pages, browser):
    """Its policy refuses what a name of a file could smuggle in."""
    context = browser.new_context()
    page = context.new_page()
    refusals = []
    page.on("requestfailed", lambda request: refusals.append((request.url, request.failure)))
    page.goto(pages["report"].as_uri())
    page.evaluate("""() => {
        const image = document.createElement("img"), script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.body.append(image, script);
        return new Promise((resolve) => {
            image.onerror = resolve;
            image.src = "http://127.0.0.1:9/a.png";
        });
    }""")
    assert page.evaluate("window.ran") is None
    assert refusals == [("http://127.0.0.1:9/a.png", "csp")]
    context.close()
