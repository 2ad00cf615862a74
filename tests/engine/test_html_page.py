"""The pages: tables, images, plots, and what they say where an image cannot be read."""

import base64
import hashlib
import re

from matplotlib.figure import Figure
import numpy as np
from PIL import Image
import pytest

from experiments.engine import html_page, report_images, report_plots
from rll_jax import metrics
from rll_jax.data.image_dataset import EncodedImageDataset
from rll_jax.data.images import BadImageError


def test_a_table_has_heads_and_names_its_rows():
    found = html_page.table(["<run>", "score"], [["a&b", 1.5], ["c", "+2.0 (1.0 to 3.0)"]], "all")
    assert "<caption>all</caption><thead><tr><th scope=" in found
    assert '<th scope="col">&lt;run&gt;</th><th scope="col" class="number">score</th>' in found
    assert '<th scope="row">a&amp;b</th><td class="number">1.5</td>' in found
    texts = html_page.table(["option", "value"], [["a", "1"], ["b", ""]])
    assert "number" not in texts  # a column that is not of numbers alone
    assert "<tbody></tbody>" in html_page.table(["option"], [])


def test_a_page_fetches_nothing_and_runs_its_own_script_alone():
    page = html_page.page("a <b>", "<h1>a</h1>")
    assert "<title>a &lt;b&gt;</title>" in page and "http" not in page.replace("http-equiv", "")
    script = re.search("<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
    assert f"content=\"default-src 'none'; {policy}" in page


def a_figure():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], color="black", label="a", marker="o")
    axes.legend()
    return figure


def test_plots_take_the_colours_of_the_page():
    one, two = (html_page.plot(a_figure(), alt) for alt in ("one <plot>", "two"))
    assert 'role="img" aria-label="one &lt;plot&gt;"' in one
    assert "#000000" not in one and "#ffffff" not in one and "currentColor" in one
    assert "http" not in one and "<style" not in one and "<text" in one
    ids = re.findall(r' id="([^"]*)"', one + two)
    assert ids and len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', one + two)) == set(ids)


@pytest.mark.parametrize("name", ["$x", r"a$\b$c", "_hidden", "x" * 90, "\udcff", "日本"])
def test_any_name_of_a_run_may_be_in_a_plot(name, recwarn):
    lines = [{"step": 1, "loss": 0.5}, {"step": 1, "recall@1": 0.5, "map@r": 0.4}]
    runs = {name: lines, "other": lines}
    one = report_plots.loss_curves(runs)
    shown = report_plots.score_curves(runs, "map@r")
    interval = metrics.Interval(0.5, 0.4, 0.6)
    chart = report_plots.interval_chart({"recall@1": {name: interval}}, name, difference=True)
    for text in (one, shown):
        assert "other" in text
    assert "percent" in chart and not [w for w in recwarn if "Glyph" in str(w.message)]
    if name != "\udcff":
        assert name[-3:] in one and name[-3:] in chart


def test_images_keep_their_shape_and_a_size():
    found = html_page.thumbnail(Image.new("RGB", (600, 300)), 'a "b"', "right", "class 1\n0.9")
    assert 'width="240" height="120"' in found and 'alt="same class: a &quot;b&quot;"' in found
    assert found.startswith('<figure class="right">') and "\N{CHECK MARK} class 1\n0.9" in found
    assert 'width="9" height="7"' in html_page.thumbnail(Image.new("RGBA", (9, 7)), "small")
    assert "data:image/jpeg" in html_page.photograph(Image.new("RGB", (9, 9)), "map")


@pytest.mark.parametrize("error", [OSError("gone"), BadImageError("broken")])
def test_a_sentence_stands_where_an_image_cannot_be_read(error):
    def load():
        raise error

    found = html_page.thumbnail_or_sentence(load, "a.png", "query", "class 1")
    assert "<img" not in found and "query: a.png: this image cannot be read now." in found
    assert "<figcaption>class 1</figcaption>" in found


def a_dataset(emoji, names, bad=()):
    def read(position):
        if position in bad:
            raise FileNotFoundError(position)
        return emoji["test"].image_bytes(position)

    rows = np.arange(len(names))
    return EncodedImageDataset(read, rows, rows // 2, np.array(names), np.ones(len(rows), int))


@pytest.mark.parametrize(
    "names, expected",
    [
        (["x/cat/1", "x/cat/2", "dog/1", "dog/2"], ["cat", "cat", "dog", "dog"]),
        (["p/cat.png", "q/cat.png", "p/dog.png", "q/dog.png"], ["cat", "cat", "dog", "dog"]),
        (["a/1", "a/2", "a/3", "a/4"], ["class 0", "class 0", "class 1", "class 1"]),
        (["1", "2", "3", "4"], ["class 0", "class 0", "class 1", "class 1"]),
    ],
)
def test_classes_are_named_as_their_files_are(emoji, names, expected):
    assert report_images.class_names(a_dataset(emoji, names)).tolist() == expected


def test_images_that_are_gone_are_told(emoji):
    data = a_dataset(emoji, [f"{row // 2}/{row}.png" for row in range(40)], bad=(3, 17))
    embeddings = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    by_query = metrics.scores_by_query(embeddings, data.labels)
    found = report_images.grid(data, embeddings, by_query)
    assert found.count("<figure") == 180 and "this image cannot be read now" in found
    assert found.count("<img") + found.count("cannot be read now") == 180
    nearest = re.findall(r"<figure class=\"(?:right|wrong)\".*?</figure>", found, re.DOTALL)
    assert len(nearest) == 160 and all("similarity " in one for one in nearest)
    mapped = report_images.embedding_map(data, embeddings)
    assert "<img" in mapped and "2 images cannot be read now" in mapped
    gone = report_images.embedding_map(a_dataset(emoji, data.paths, range(40)), embeddings)
    assert "<img" not in gone and "No map: its images cannot be read now." in gone
