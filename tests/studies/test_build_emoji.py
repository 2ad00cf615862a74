"""The rules that select the emoji, and the dataset's page against its data."""

import collections
import json
import re

import numpy as np
import pytest

from experiments.data import build_emoji, emoji_drawings
from tests.helpers.commands import refused
from tests.helpers.paths import ROOT

FOLDER = ROOT / "experiments/data/emoji"


def write_packages(modules, drawn):
    """Packages in which the vendors have the drawings {vendor: {code points: (name, body)}}."""
    for vendor in emoji_drawings.VENDORS:
        package = modules / "@iconify-json" / vendor
        package.mkdir(parents=True)
        icons = {name: {"body": body} for name, body in drawn[vendor].values()}
        files = {
            "icons": {"icons": icons, "width": 64, "height": 64},
            "info": {"name": vendor, "author": {}, "license": {}},
            "package": {"version": "1"},
            "chars": {codepoints: name for codepoints, (name, _) in drawn[vendor].items()},
        }
        for name, content in files.items():
            (package / f"{name}.json").write_text(json.dumps(content))
    return [emoji_drawings.Vendor(modules, name) for name in emoji_drawings.VENDORS]


def pixels_of_body(svg):
    """Stands in for the renderer: an image for each body, and none for BLANK."""
    body = re.search(r"<g>(.*)</g>", svg)[1]
    return None if body == "BLANK" else np.frombuffer(body.encode(), np.uint8)


def test_rules(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_drawings, "render", pixels_of_body)
    drawn = {vendor: {} for vendor in emoji_drawings.VENDORS}
    for vendor in emoji_drawings.VENDORS[:5]:
        for codepoints, name in {
            "1f600": "grin",
            "1f44d-1f3fb": "thumb-light",
            "1f1e9-1f1ea": "flag-de",
            "1f9d1-200d-1f680": "person-astronaut",
            "1f469-200d-1f680": "woman-astronaut",
            "0023-fe0f-20e3": "hash",
            "1f411": "sheep",
            "1f410": "goat",
        }.items():
            drawn[vendor][codepoints] = (name, f"{vendor} {name}")
    drawn["noto"]["1f407"] = ("rabbit", "one vendor is too few")
    drawn["noto"]["1f411"] = drawn["noto"]["1f410"] = ("sheep-or-goat", "shared by two classes")
    drawn["twemoji"]["1f411"] = ("sheep", "shared by two vendors")
    drawn["openmoji"]["1f411"] = ("sheep", "shared by two vendors")
    drawn["openmoji"]["1f600"] = ("grin", "BLANK")
    selection = emoji_drawings.select(write_packages(tmp_path, drawn))
    assert {emoji: list(by_vendor) for emoji, by_vendor in selection.classes.items()} == {
        "1f600": ["noto", "twemoji", "fluent-emoji-flat", "noto-v1"],
        "1f9d1-200d-1f680": list(emoji_drawings.VENDORS[:5]),
        "23-20e3": list(emoji_drawings.VENDORS[:5]),
        "1f410": list(emoji_drawings.VENDORS[1:5]),
    }
    assert selection.names["23-20e3"] == "hash"
    assert [(count.classes, count.images) for count in selection.counts] == [
        (9, 41),
        (8, 36),
        (7, 31),
        (6, 30),
        (5, 25),
        (5, 24),
        (5, 22),
        (5, 21),
        (4, 18),
    ]


def test_names_are_looked_up_where_a_package_has_no_code_points(tmp_path):
    drawn = {vendor: {} for vendor in emoji_drawings.VENDORS}
    drawn["noto"] = {"1f430": ("rabbit-face", ""), "1f1e9-1f1ea": ("flag-for-flag-germany", "")}
    vendors = write_packages(tmp_path, drawn)
    by_name = {vendor.name: vendor for vendor in vendors}
    by_name["emojione"].icons |= {"flag-germany": {}, "unheard-of": {}, "leveret": {}}
    by_name["emojione"].other_names["leveret"] = ["Rabbit-Face"]
    by_name["fxemoji"].icons |= {"bunny": {}, "star": {}}
    drawings, unresolved = emoji_drawings.match(vendors)
    assert drawings == {
        "1f430": {"noto": "rabbit-face", "emojione": "leveret", "fxemoji": "bunny"},
        "1f1e9-1f1ea": {"noto": "flag-for-flag-germany", "emojione": "flag-germany"},
    }
    assert unresolved == 1


@pytest.mark.parametrize(
    "emoji, neutral",
    [
        ("1f468-200d-1f680", "1f9d1-200d-1f680"),
        ("1f3c3-200d-2642", "1f3c3"),
        ("1f468-200d-1f469-200d-1f466", "1f46a"),
        ("1f469-200d-2764-200d-1f48b-200d-1f468", "1f48f"),
        ("1f468-200d-2764-200d-1f468", "1f491"),
        ("1f930", "1fac4"),
    ],
)
def test_gendered_twins(emoji, neutral):
    assert emoji_drawings.is_gendered_twin(emoji, {emoji, neutral})
    assert not emoji_drawings.is_gendered_twin(emoji, {emoji})
    assert not emoji_drawings.is_gendered_twin(neutral, {emoji, neutral})


def test_the_page_has_the_counts_of_the_data(emoji):
    text = (FOLDER / "README.md").read_text()
    paths = [path for split in emoji.values() for path in split.paths]
    labels = np.concatenate([split.labels for split in emoji.values()])
    sizes = np.unique(labels, return_counts=True)[1]
    for split, data in emoji.items():
        assert f"| {split} | {len(np.unique(data.labels))} | {len(data)} |" in text
    vendors = collections.Counter(path.split("/")[0] for path in paths)
    rows = re.findall(r"^\| ([\w-]+) \| (\d+) \| `@iconify-json/\1` ", text, re.M)
    assert {vendor: int(count) for vendor, count in rows} == vendors
    assert f"There are {len(sizes)}\nclasses and {len(paths)} images" in text
    assert f"A class has {sizes.min()} to {sizes.max()} images." in text
    assert f"| at least 4 vendors again | {len(sizes)} | {len(paths)} |" in text


def test_the_page_is_written_by_the_template():
    prose = re.split(r"\{\w+\}", build_emoji.README)
    pattern = "(?s:.+?)".join(re.escape(part) for part in prose)
    assert re.fullmatch(pattern, (FOLDER / "README.md").read_text())


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([f"--out={FOLDER}"], "emoji exists: remove it or choose another folder"),
        (["--size=32"], "Unknown command line flag 'size'"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_a_mistake_takes_one_line(arguments, words):
    refused(words, *arguments, name="data.build_emoji")


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"packages missing in .*: run `npm install --prefix"):
        build_emoji.find_modules(str(tmp_path))
    (tmp_path / "icons.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot use .*icons.json .*: install its package again"):
        emoji_drawings.read_json(tmp_path / "icons.json", "icons")
