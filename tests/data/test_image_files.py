"""The walker of folders: what it takes, what it leaves out, and links."""

import io
import os

import numpy as np
from PIL import Image
import pytest

from experiments.engine import embedding_index
from rll_jax.data import folders, image_files, images
from tests.helpers.benchmark_trees import jpeg

ENDINGS = ["jpg", "JPG", "jfif", "jpe", "png", "webp", "bmp", "gif", "tif", "avif", "jp2"]
ENDINGS += ["ppm", "pgm", "tga", "PCX", "ico", "sgi", "qoi", "icns"]
SYSTEM = [".ipynb_checkpoints", "@eaDir", ".thumbnails", "__MACOSX", "$RECYCLE.BIN", "lost+found"]
SYSTEM += ["System Volume Information", ".git", "@Recycle", "#recycle", "@Recently-Snapshot"]
SYSTEM += ["Network Trash Folder", "@sharebin"]


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(len(path.name)) if data is None else data)


def encoded(ending):
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    kind = {"jfif": "JPEG", "jpe": "JPEG", "jpg": "JPEG", "jp2": "JPEG2000", "pgm": "PPM"}
    kind |= {"tif": "TIFF", "ppm": "PPM"}
    Image.fromarray(pixels).save(out, kind.get(ending.lower(), ending.upper()))
    return out.getvalue()


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_the_decoder_reads_is_in_whatever_its_name(ending, tmp_path):
    data = encoded(ending)
    images.decode(data, ending)
    names = [f"a.{ending}"]
    if ending != "tga":  # it has no signature
        names += ["b", "c.dat", "d.7"]
    for name in names:
        put(tmp_path / name, data)
    assert image_files.find(tmp_path) == (names, {})


def test_what_is_left_out_is_counted(tmp_path):
    """At every depth, the same for training and for embedding."""
    for folder in ("", "a", "b/deep/er", "c"):
        put(tmp_path / folder / "0.jpg")
        for name in SYSTEM:
            put(tmp_path / folder / name / "0.jpg")
        for name in ("._0.jpg", ".hidden.png", "Thumbs.db", "thumbs.DB", "desktop.ini", "0.jpg~"):
            put(tmp_path / folder / name)
        put(tmp_path / folder / "notes.txt", b"P3 is no picture")
        put(tmp_path / folder / "labels.mat", b"\0" * 500)
        put(tmp_path / folder / "empty", b"")
    put(tmp_path / "b/damaged.png", encoded("png")[:60])  # in: told of as a bad image
    os.mkfifo(tmp_path / "a/pipe")
    os.mkfifo(tmp_path / "a/pipe.jpg")
    found = image_files.find(tmp_path)
    inside = ["a/0.jpg", "b/damaged.png", "b/deep/er/0.jpg", "c/0.jpg"]
    assert found.names == ["0.jpg", *inside]
    assert found.left_out == {
        "hidden or of the system": 4 * (len(SYSTEM) + 6),
        "not images that can be read (.mat, .txt, no ending)": 12,
        "broken links, or no files": 2,
    }
    assert image_files.describe(found.left_out).startswith("left out: 2 broken links, or no files")
    told = []
    rows = folders.class_folders(tmp_path, on_left_out=told.append)
    assert [row.path for row in rows] == inside
    assert told == [{**found.left_out, "images in no class's folder": 1}]
    assert embedding_index.image_names(tmp_path) == found.names


def test_links_are_followed_once(tmp_path):
    root, store = tmp_path / "root", tmp_path / "store"
    for path in ("a/0.jpg", "a/1.jpg", "z/real/2.jpg"):
        put(root / path)
    put(store / "linked class/3.jpg")
    put(store / "4")
    links = {
        "linked": store / "linked class",
        "again": store / "linked class",  # the first by name is in
        "a/round": root,
        "a/up": root / "a",
        "b": root / "z/real",  # reached without a link too: in there
        "c/x.jpg": store / "4",
        "c/y.jpg": store / "4",
        "c/z.jpg": root / "a/0.jpg",
        "c/gone.jpg": store / "gone.jpg",  # in: told of as a missing image
        "c/gone": store / "gone",
        "c/itself": root / "c/itself",
    }
    (root / "c").mkdir()
    for name, target in links.items():
        (root / name).symlink_to(target)
    (store / "linked class/back").symlink_to(root)
    found = image_files.find(root)
    assert found.names == [
        *("a/0.jpg", "a/1.jpg", "again/3.jpg", "c/gone.jpg", "c/x.jpg", "z/real/2.jpg")
    ]
    assert found.left_out == {"linked to twice": 7, "broken links, or no files": 2}
    (tmp_path / "link to root").symlink_to(root)
    assert image_files.find(tmp_path / "link to root") == found


def test_names_of_any_letters_and_a_folder_that_cannot_be_read(tmp_path):
    names = ["[0-9]*/a?.jpg", "back\\slash~/~.jpg", "class~/{x}.jpg", os.fsdecode(b"\xff/\xfe.jpg")]
    for name in names:
        put(tmp_path / name)
    assert image_files.find(tmp_path).names == sorted(names)
    assert [row.path for row in folders.class_folders(tmp_path)] == sorted(names)
    with pytest.raises(OSError, match="nowhere"):
        image_files.find(tmp_path / "nowhere")
