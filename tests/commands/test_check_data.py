"""check_data as a user gives it, and evaluate by the groups that it writes."""

import csv
import io
import json
import types

import numpy as np
from PIL import Image
import pytest

from experiments.engine import copies_page, copy_groups
from rll_jax.data import copies, folders, image_dataset
from rll_jax.data.listings import Row
from tests.helpers.benchmark_trees import jpeg, make_cub, make_inshop
from tests.helpers.commands import SMALL, browse, refused, run

SIZE = (240, 160)


def again(encoded, *, quality=60, scale=2, kind="JPEG"):
    """The picture, smaller and encoded again."""
    image, out = Image.open(io.BytesIO(encoded)), io.BytesIO()
    image.resize((SIZE[0] // scale, SIZE[1] // scale)).save(out, kind, quality=quality)
    return out.getvalue()


def write(root, pictures):
    for name, encoded in pictures.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)


def one_colour(colour):
    out = io.BytesIO()
    Image.new("L", (50, 50), colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def tree(tmp_path):
    """Six classes of three pictures each, and copies of some."""
    pictures = {
        f"{'train' if c < 3 else 'test'}/{'abcdef'[c]}/{i}.jpg": jpeg(10 * c + i, SIZE)
        for c in range(6)
        for i in range(3)
    }
    root = tmp_path / "pictures"
    write(root, pictures)
    write(
        root,
        {
            "test/d/same as a 0.jpg": pictures["train/a/0.jpg"],
            "test/e/near b 0.jpg": again(pictures["train/b/0.jpg"]),
            "test/f/same as d 1.jpg": pictures["test/d/1.jpg"],
            "train/c/near 0.png": again(pictures["train/c/0.jpg"], kind="PNG"),
            "train/c/near 0 too.jpg": again(pictures["train/c/0.jpg"], scale=4),
            "train/a/white.png": one_colour(255),
            "test/d/white.png": one_colour(255),
            "test/d/grey.png": one_colour(99),
            "test/e/<b>&black.png": one_colour(0),
            "test/f/broken.jpg": pictures["test/f/0.jpg"][:300],
            "test/f/empty.jpg": b"",
            "test/f/notes.txt": b"no picture",
        },
    )
    return root


def check(*arguments, code=0):
    result = run(*arguments, name="check_data")
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    return result.stdout.splitlines()


def counts(lines, kind):
    (line,) = [line for line in lines if line.startswith(f"{kind}  ")]
    return [int(cell) for cell in line.removeprefix(kind).split()]


def test_what_is_in_a_tree_and_what_is_in_it_twice(tree, tmp_path):
    before = sorted(tree.rglob("*"))
    out, groups = tmp_path / "page.html", tmp_path / "groups.csv"
    lines = check(f"--data_dir={tree}", f"--out={out}", f"--groups_out={groups}", code=3)
    assert lines[1:6] == [
        "train: 12 images of 3 classes; images per class: 3 to 5, median 4",
        "test: 15 images of 3 classes; images per class: 4 to 6, median 5",
        "pixels: 60 x 40 to 240 x 160, median 240 x 160; "
        + next(line for line in lines if line.startswith("pixels")).partition("; ")[2],
        "formats: JPEG RGB 22, PNG L 4, PNG RGB 1",
        "of one colour: 4, such as train/a/white.png",
    ]
    (unreadable,) = [line for line in lines if line.startswith("cannot be read: 2: ")]
    assert "broken.jpg" in unreadable and "test/f/empty.jpg: missing or empty" in unreadable
    assert counts(lines, "same bytes") == [4, 2, 0]  # the white pictures among them
    assert counts(lines, "near by hash") == [2, 0, 3]
    assert "groups of copies: 5 with 11 images, the largest with 3" in lines
    assert "test images with a copy in train: 3 of 15" in lines
    with groups.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 29 and {row["split"] for row in rows} == {"train", "test"}
    named = {}
    for row in rows:
        if row["group"]:
            named.setdefault(row["group"], set()).add(row["path"])
    assert {"test/d/same as a 0.jpg", "train/a/0.jpg"} in named.values() and len(named) == 5
    assert sorted(tree.rglob("*")) == before
    text = out.read_text()
    assert "test/e/&lt;b&gt;" not in text and "cannot decode" in text
    shown, console = browse(out, tmp_path / "profile")
    pairs = 3 + 1 + 2  # between splits, between classes, within a class
    assert shown == 2 * pairs and not console


def test_a_clean_dataset_ends_with_0_and_one_with_a_broken_image_with_1(tree, tmp_path):
    clean = tmp_path / "clean"
    for path in tree.glob("*/*/?.jpg"):
        write(clean, {path.relative_to(tree): path.read_bytes()})
    lines = check(f"--data_dir={clean}", f"--out={tmp_path / '1.html'}")
    assert counts(lines, "same bytes") == counts(lines, "near by hash") == [0, 0, 0]
    assert (tmp_path / "1.html").read_text().count("None found.") == 3
    (clean / "train/a/broken.jpg").write_bytes(jpeg(0)[:300])
    check(f"--data_dir={clean}", f"--out={tmp_path / '2.html'}", code=1)


def test_near_says_how_near(tree, tmp_path):
    given = [f"--data_dir={tree}", "--near=0"]
    lines = check(*given, f"--out={tmp_path / '1.html'}", code=3)
    assert counts(lines, "same bytes") == [4, 2, 0] and counts(lines, "near by hash")[0] < 2


def test_the_page_of_its_own_name_overwrites_nothing(tmp_path, monkeypatch):
    from experiments import check_data

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("check_data.html", "check_data_2.html"):
        path = check_data._free_page()
        assert path.name == name and not path.exists()
        path.touch()


@pytest.mark.parametrize("boxed", [False, True])
def test_groups_of_boxes_and_of_mixed_roles_are_read_again(boxed, tmp_path):
    """The table of groups holds what the images had: `evaluate --groups` and --index read it."""
    root = tmp_path / "pictures"
    write(root, {f"{c}/{i}.jpg": jpeg(10 * c + i, SIZE) for c in range(4) for i in range(2)})
    box = ["x_1,y_1,x_2,y_2", "5,5,100,90", "90,20,200,150"]
    lines = ["path,label,split,is_query,is_gallery" + (f",{box[0]}" if boxed else "")]
    for c in range(4):
        role = "train,," if c < 2 else "test,True,True" if c == 2 else "test,True,False"
        for i in range(2):
            for number in (1, 2) if boxed else (1,):
                each = f",{box[number]}" if boxed else ""
                lines.append(f"{c}/{i}.jpg,{c},{role}{each}")
    lines[-1] = lines[-1].replace("True,False", "False,True")
    (tmp_path / "index.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "groups.csv"
    given = f"--data_dir={root}", f"--index={tmp_path / 'index.csv'}"
    page = f"--out={tmp_path / 'page.html'}"
    check("--dataset=folder", *given, page, f"--groups_out={out}")
    rows, before = folders.read_index(out), folders.read_index(tmp_path / "index.csv")
    assert sorted(row._replace(group="") for row in rows) == sorted(before)
    assert copy_groups.read(str(out)).keys() == {row.name for row in before}


def test_a_table_without_groups_or_a_name_that_no_table_holds(tmp_path):
    table = tmp_path / "no groups.csv"
    table.write_text("path,label\na/1.jpg,a\nb/1.jpg,b\n")
    with pytest.raises(ValueError, match="no column group"):
        copy_groups.read(str(table))
    root = tmp_path / "pictures"
    write(root, {f"{c}/{i}\n.jpg": jpeg(i, SIZE) for c in "ab" for i in range(2)})
    groups = f"--groups_out={tmp_path / 'groups.csv'}"
    refused("cannot stand in a table", f"--data_dir={root}", groups, name="check_data")


def test_benchmarks_are_read_where_they_lie(tmp_path):
    root = make_cub(tmp_path)  # the images of a class are the same bytes
    lines = check("--dataset=cub", f"--data_dir={tmp_path}", f"--out={tmp_path / '1.html'}")
    assert counts(lines, "same bytes") == [0, 0, 40] and not list(tmp_path.glob("prepared*"))
    (root / "images/003.Some_Bird/Some_Bird_0000_3.jpg").unlink()
    check("--dataset=cub", f"--data_dir={root}", f"--out={tmp_path / '2.html'}", code=1)
    (tmp_path / "inshop").mkdir()
    make_inshop(tmp_path / "inshop")
    given = ["--dataset=inshop", f"--data_dir={tmp_path / 'inshop'}"]
    groups = tmp_path / "groups.csv"
    result = run(
        *given, f"--out={tmp_path / '3.html'}", f"--groups_out={groups}", name="check_data"
    )
    assert result.returncode in (0, 3), result.stderr
    assert "query: " in result.stdout and "gallery: " in result.stdout
    assert {"query", "gallery"} < {row["split"] for row in csv.DictReader(groups.open())}


def test_prepared_files_are_read(tree, tmp_path):
    for name in ("broken.jpg", "empty.jpg"):
        (tree / "test/f" / name).unlink()
    given = ["--dataset=folder", f"--source={tree}", f"--data_dir={tmp_path / 'out'}"]
    assert run(*given, name="prepare").returncode == 0
    data_dir = f"--data_dir={tmp_path / 'out/prepared_folder'}"
    lines = check(data_dir, f"--out={tmp_path / '1.html'}", code=3)
    assert counts(lines, "same bytes") == [4, 2, 0] and counts(lines, "near by hash") == [2, 0, 3]


def test_mistakes(tree, tmp_path):
    def wrong(text, *arguments):
        refused(text, *arguments, name="check_data")

    own, there = f"--data_dir={tree}", tmp_path / "there.html"
    there.write_text("mine")
    wrong("no such folder", f"--data_dir={tmp_path / 'no'}")
    wrong("--data_dir is needed")
    wrong("expected emoji, sop", own, "--dataset=birds")
    wrong("exists: choose another name", own, f"--out={there}")
    wrong("exists: choose another name", own, f"--groups_out={there}")
    wrong("ends in .csv", own, f"--groups_out={tmp_path / 'groups.txt'}")
    wrong("are both", own, *(f"--{n}={tmp_path / 'a.csv'}" for n in ("groups_out", "out")))
    wrong("no folder", own, f"--out={tmp_path / 'no/page.html'}")
    wrong("expected 0 to 100", own, "--near=101")
    wrong("expected a cosine", own, "--near_similarity=0")
    wrong("holds no run", own, f"--workdir={tmp_path}")
    for path in tree.rglob("*.*"):
        path.write_bytes(b"bad")
    (tree / "test/f/notes.txt").unlink()
    wrong("none of the 29 images can be read", own, f"--out={tmp_path / '1.html'}")
    assert there.read_text() == "mine"


def test_a_network_that_tells_nothing_apart_is_left_out(tree, monkeypatch):
    from experiments import check_data

    rows = [Row(f"train/a/{i}.jpg", 0, "train") for i in range(3)]
    data = image_dataset.from_rows(tree, rows)["train"]
    items = copies.Items(data.labels, np.zeros(3, bool), np.arange(3))
    embeddings = np.array([[1, 0], [1, 0], [0, 1]], np.float32)

    def embed(data, *, on_bad, progress):
        on_bad(1)
        return {"H": embeddings}

    trained = types.SimpleNamespace(embed=embed)
    found = check_data.near_by_embeddings(trained, data, 0.9, items)
    assert (found.partners == -1).all()  # what cannot be read is near nothing
    embeddings[:] = [1, 0]
    assert (check_data.near_by_embeddings(trained, data, 0.9, items).groups == [0, 1, 0]).all()
    monkeypatch.setattr(check_data, "_MOST_PAIRS", 0.1)
    assert "raise --near_similarity" in check_data.near_by_embeddings(trained, data, 0.9, items)


def test_a_picture_that_is_gone_is_a_sentence(tree, tmp_path):
    rows = [Row("train/a/0.jpg", 0, "train"), Row("test/d/<gone>.jpg", 1, "test")]
    data = image_dataset.all_as_test(image_dataset.from_rows(tree, rows))["test"]
    found, _ = copies.find(
        np.ones((2, 4)),
        4,
        copies.Items(data.labels, np.array([False, True]), np.zeros(2, int)),
    )
    kinds = [copies_page.Kind("same bytes", found, lambda _: "")]
    path = tmp_path / "page.html"
    copies_page.write(path, "Title", [], data, np.array(["train", "test"]), kinds, [])
    page = path.read_text()
    assert page.count("<img") == 1 and "&lt;gone&gt;.jpg: this image cannot be read now" in page


def test_a_recall_that_copies_saturate_falls_when_they_are_left_out(tmp_path):
    """A class has a picture, two copies of it, and a picture that has nothing in common."""
    pictures = {}
    for c in range(24):
        folder = f"{'train' if c < 8 else 'test'}/{c}"
        first = jpeg(2 * c, SIZE)
        pictures[f"{folder}/0.jpg"], pictures[f"{folder}/1.jpg"] = first, jpeg(2 * c + 1, SIZE)
        pictures[f"{folder}/2.jpg"] = again(first, quality=90, scale=1)
        pictures[f"{folder}/3.jpg"] = again(first, quality=80)
    root, groups = tmp_path / "pictures", tmp_path / "groups.csv"
    write(root, pictures)
    data, workdir = f"--data_dir={root}", f"--workdir={tmp_path / 'run'}"
    steps = [flag for flag in SMALL if not flag.startswith("--steps")]
    given = [*steps, "--steps=1", "--augment=affine", data, workdir]
    assert run(*given, name="folder").returncode == 0
    out = [f"--out={tmp_path / '1.html'}", f"--groups_out={groups}"]
    lines = check(data, workdir, "--near_similarity=0.9999", *out)
    assert counts(lines, "near by hash") == [0, 0, 72] and "near by embeddings" in "".join(lines)

    def recall(name, *flags):
        path = tmp_path / name
        result = run(workdir, "--noclustering", f"--out={path}", *flags, name="evaluate")
        assert result.returncode == 0, result.stderr
        return list(json.loads(path.read_text())["scores"].values())[-1]["recall@1"]

    saturated, honest = recall("all.json"), recall("groups.json", f"--groups={groups}")
    assert saturated >= 0.7 and honest <= 0.3
    listed = recall("index.json", data, "--dataset=folder", f"--index={groups}")
    assert listed == honest
    refused(
        "--baseline and --groups",
        workdir,
        f"--groups={groups}",
        workdir.replace("workdir", "baseline"),
        name="evaluate",
    )
    refused("no such file", workdir, f"--groups={tmp_path / 'no.csv'}", name="evaluate")
    text = groups.read_text()
    groups.write_text("".join(line for line in text.splitlines(True) if "test/9/1" not in line))
    refused("lists 63 of the 64 images", workdir, f"--groups={groups}", name="evaluate")
