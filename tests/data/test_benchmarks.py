"""The benchmarks' published layouts: read, or refused by file and line. Archives stay inside."""

import functools
import gzip
import io
import os
import tarfile
import zipfile

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from rll_jax.data import archives, benchmarks, listings
from tests.helpers.benchmark_trees import (
    MAKE,
    annotations,
    jpeg,
    make_cars,
    make_cub,
    make_inshop,
    make_sop,
)


def split_dataset(listing):
    rows = listing.rows
    return {
        split: {row.label for row in rows if row.split == split}
        for split in sorted({row.split for row in rows})
    }


@pytest.mark.parametrize(
    "make, name, expected",
    [
        (make_sop, "sop", {"train": set(range(6)), "test": set(range(6, 12))}),
        (make_cub, "cub", {"train": {0, 1, 2, 98, 99}, "test": {100, 101, 197, 198, 199}}),
        (make_cars, "cars", {"train": {0, 1, 2, 96, 97}, "test": {98, 99, 193, 194, 195}}),
        (
            functools.partial(make_cars, devkit=True),
            "cars",
            {"train": {0, 1, 2, 96, 97}, "test": {98, 99, 193, 194, 195}},
        ),
        (
            make_inshop,
            "inshop",
            {"train": {0, 1, 2, 3}, "query": {4, 5, 6, 7}, "gallery": {4, 5, 6, 7}},
        ),
    ],
)
def test_published_layouts(make, name, expected, tmp_path):
    make(tmp_path)
    listing = benchmarks.read_listing(name, tmp_path)
    assert split_dataset(listing) == expected and len(listing.rows) == 4 * len(
        set.union(*expected.values())
    )
    for row in listing.rows:  # a class's pictures are its own in these trees
        assert (listing.root / row.path).read_bytes() == jpeg(row.label + 1)


def test_the_folder_above_or_the_very_folder(tmp_path):
    root = make_cub(tmp_path / "data" / "birds")
    for directory in (tmp_path / "data", tmp_path / "data" / "birds", root):
        assert benchmarks.read_listing("cub", directory).root == root


def test_published_counts_are_compared(tmp_path):
    make_cub(tmp_path)
    train, test = benchmarks.differences("cub", benchmarks.read_listing("cub", tmp_path).rows)
    assert train == (
        "CUB-200-2011: train has 20 images of 5 classes; published are 5,864 of 100; "
        "no image of class 4, 5, 6, 7, 8, ..."
    )
    assert "published are 5,924 of 100; no image of class 103, 104" in test
    whole = [
        listings.Row(f"{c}/{i}", c, "train" if c < 100 else "test")
        for c in range(200)
        for i in range(58)
    ]
    sizes = {"train": 5864, "test": 5924}
    extra = [
        listings.Row(f"x/{s}{i}", 0 if s == "train" else 150, s)
        for s in sizes
        for i in range(sizes[s] - 5800)
    ]
    assert benchmarks.differences("cub", whole + extra) == []


@pytest.mark.parametrize("name", MAKE)
def test_missing_says_what_to_download(name, tmp_path):
    with pytest.raises(
        ValueError,
        match=rf"no {benchmarks.BENCHMARKS[name].title} in .*(download|ask for) .*https://",
    ):
        benchmarks.read_listing(name, tmp_path)
    (tmp_path / "x.tgz").write_bytes(b"")
    with pytest.raises(
        ValueError, match=f"unpack x.tgz there .*experiments.prepare --dataset={name} .*--unpack"
    ):
        benchmarks.read_listing(name, tmp_path)


@pytest.mark.parametrize(
    "line, text",
    [
        ("1 2 x.jpg", "Ebay_test.txt, line 3"),
        ("9 9 1 ../../x.jpg", "a path inside the dataset"),
        ("9 9 1 /etc/passwd", "a path inside the dataset"),
        ("9 9 1 chair_final\\x.jpg", "a path inside the dataset"),
        ("9 0 1 a.jpg", "line 3: expected three numbers"),
        ("9 ٣ 1 a.jpg", "line 3: expected three numbers"),
        (f"9 {'9' * 5000} 1 a.jpg", "line 3: expected three numbers"),
        ("9 9 1 chair_final/112_0.JPG", "line .*listed twice"),
        ("9 9 1 \udcff.jpg", "line 3: not UTF-8"),
        (
            "9 1 1 new.jpg",
            "Ebay_test.txt, line 3: class 1 is in test here, but was in train before",
        ),
        ("28 7 2 new.jpg", "Ebay_test.txt, line 3: image 28 is listed twice"),
    ],
)
def test_sop_bad_line(tmp_path, line, text):
    index = make_sop(tmp_path) / "Ebay_test.txt"
    lines = index.read_text().split("\n")
    index.write_bytes("\n".join(lines[:2] + [line] + lines[2:]).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=text):
        benchmarks.read_listing("sop", tmp_path)


def test_bom_blank_lines_and_endings_do_no_harm(tmp_path):
    root = make_cub(tmp_path)
    before = benchmarks.read_listing("cub", tmp_path)
    for name in ("images.txt", "image_class_labels.txt"):
        text = (root / name).read_text()
        (root / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode())
    assert benchmarks.read_listing("cub", tmp_path) == before


@pytest.mark.parametrize(
    "file, change, text",
    [
        (
            "image_class_labels.txt",
            lambda t: t.replace("1 1\n", "1 201\n", 1),
            "image_class_labels.txt, line 1: image 1 is of class 201, expected 1 to 200",
        ),
        (
            "image_class_labels.txt",
            lambda t: t.replace("7 2\n", "", 1),
            r"image_class_labels.txt has no line for 1 images, such as \[7\]",
        ),
        (
            "image_class_labels.txt",
            lambda t: t + "99 3\n",
            r"images.txt has no line for 1 images, such as \[99\]",
        ),
        ("image_class_labels.txt", lambda t: t + "3 3\n", "line 41: image 3 is listed twice"),
        (
            "images.txt",
            lambda t: t.replace("001.Some", "../001.Some", 1),
            "images.txt, line 1: expected a number and a path inside",
        ),
        ("images.txt", lambda t: "", "images.txt lists no image"),
        (
            "images.txt",
            lambda t: t.replace("_0001_1.jpg", "_0000_1.jpg", 1),
            "images.txt, line 2: images/001.* is listed twice",
        ),
    ],
)
def test_cub_broken(tmp_path, file, change, text):
    path = make_cub(tmp_path) / file
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=text):
        benchmarks.read_listing("cub", tmp_path)


def test_cars_broken(tmp_path):
    make_cars(tmp_path)
    file = tmp_path / "cars_annos.mat"
    for paths, labels, text in (
        (["car_ims/1.jpg", "../2.jpg"], [1, 2], "annotation 2: expected a path inside the dataset"),
        (["car_ims/1.jpg", "car_ims/2.jpg"], [1, 197], "annotation 2: .* a class 1 to 196"),
        (["car_ims/1.jpg", "car_ims/1.jpg"], [1, 1], "annotation 2: car_ims/1.jpg is listed twice"),
    ):
        annotations(file, relative_im_path=paths, **{"class": labels})
        with pytest.raises(ValueError, match=text):
            benchmarks.read_listing("cars", tmp_path)
    annotations(file, fname=["a"], **{"class": [1]})
    with pytest.raises(
        ValueError,
        match="cars_annos.mat: expected MATLAB annotations with the columns relative_im_path and "
        "class",
    ):
        benchmarks.read_listing("cars", tmp_path)


def test_cars_devkit_without_test_labels(tmp_path):
    make_cars(tmp_path, devkit=True)
    (tmp_path / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(ValueError, match="no cars_test_annos_withlabels.mat in .*without labels"):
        benchmarks.read_listing("cars", tmp_path)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda t: t.replace("32\n", "33\n", 1), "line 1: says 33 images, 32 are listed"),
        (lambda t: t.replace("32\n", "", 1), "expected a number of images and then the header"),
        (lambda t: t.replace("query", "probe", 1), "train, query or gallery, found"),
        (
            lambda t: t.replace(" id_00000001 ", " shirt ", 1),
            "line 3: expected .* an item such as id_00000002",
        ),
        (
            lambda t: t.replace("img/WOMEN", "/img/WOMEN", 1),
            "line 3: expected a path inside the dataset",
        ),
        (
            lambda t: t.replace(" id_00000001 ", " id_00000008 ", 1),
            "line .*: class 8 is in query here, but was in train before",
        ),
        (lambda t: "", "line 1: expected a number of images"),
    ],
)
def test_inshop_broken(tmp_path, change, text):
    path = make_inshop(tmp_path) / "Eval/list_eval_partition.txt"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=text):
        benchmarks.read_listing("inshop", tmp_path)


FILES = {
    "sop": "Stanford_Online_Products/Ebay_train.txt",
    "cub": "CUB_200_2011/images.txt",
    "cub ": "CUB_200_2011/image_class_labels.txt",
    "cars": "cars_annos.mat",
    "inshop": "Eval/list_eval_partition.txt",
}


@pytest.mark.parametrize("key", FILES)
def test_fuzzed_metadata_is_refused_or_right(key, tmp_path):
    """Bytes changed, cut out or put in: a ValueError that names the file, or a valid listing."""
    name = key.strip()
    MAKE[name](tmp_path)
    file = tmp_path / FILES[key]
    whole = file.read_bytes()
    at = st.integers(0, len(whole) - 1)
    pieces = st.sampled_from(
        [
            b"\0",
            b"\xff",
            b"\r",
            b"\n\n",
            b"../",
            b"/",
            b" ",
            b"-1",
            b"9" * 30,
            b"\xef\xbb\xbf",
            b'"',
            b"\xe2\x80\xa8",
        ]
    )
    change = st.tuples(
        at, st.integers(0, 40), st.one_of(st.just(b""), pieces, st.binary(max_size=8))
    )

    @settings(
        max_examples=12 if name == "cars" else 80,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(st.lists(change, min_size=1, max_size=4))
    def check(changes):
        data = whole
        for start, length, piece in changes:
            data = data[:start] + piece + data[start + length :]
        file.write_bytes(data)
        try:
            listing = benchmarks.read_listing(name, tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error) and len(str(error)) < 1500
        else:
            for row in listing.rows:
                target = os.path.abspath(listing.root / row.path)
                assert (
                    target.startswith(str(tmp_path))
                    and row.split in listings.SPLITS
                    and 0 <= row.label < 10**9
                )

    check()


def pack(path, members):
    """A .zip or .tgz of {name: bytes}; None makes a symbolic link to /etc."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in members.items():
                info = zipfile.ZipInfo(name)
                info.external_attr = (0o120777 if data is None else 0o100644) << 16
                file.writestr(info, b"/etc" if data is None else data)
        return path
    with tarfile.open(path, "w:gz") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data or b"")
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc"
            file.addfile(info, io.BytesIO(data or b""))
    return path


@pytest.mark.parametrize("kind", ["x.zip", "x.tgz"])
def test_unpack(kind, tmp_path):
    archive = pack(tmp_path / kind, {"set/a.txt": b"a", "set/b/c.txt": b"c", "top.txt": b"t"})
    assert archives.unpack(archive, tmp_path) == [tmp_path / "set", tmp_path / "top.txt"]
    assert (tmp_path / "set/b/c.txt").read_bytes() == b"c"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "top.txt", kind]
    (tmp_path / "top.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        archives.unpack(archive, tmp_path)
    assert (tmp_path / "top.txt").read_text() == "mine"


def test_unpack_replaces_no_link_to_nowhere(tmp_path):
    (tmp_path / "top.txt").symlink_to("gone")
    with pytest.raises(ValueError, match="is there already"):
        archives.unpack(pack(tmp_path / "x.tgz", {"top.txt": b"t"}), tmp_path)
    assert (tmp_path / "top.txt").is_symlink()


@pytest.mark.parametrize("kind", ["x.zip", "x.tgz"])
@pytest.mark.parametrize(
    "name, data",
    [
        ("../out.txt", b"x"),
        ("/tmp/rll_out.txt", b"x"),
        ("set/../../out.txt", b"x"),
        ("set/link", None),
    ],
)
def test_unpack_stays_inside(kind, name, data, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    archive = pack(tmp_path / kind, {"set/a.txt": b"a", name: data})
    with pytest.raises(ValueError, match="is a link or leads out of the folder"):
        archives.unpack(archive, target)
    assert not list(target.iterdir()) and sorted(p.name for p in tmp_path.iterdir()) == [
        "target",
        kind,
    ]


@pytest.mark.parametrize("kind", ["x.zip", "x.tgz"])
def test_unpack_damaged(kind, tmp_path):
    noise = np.random.default_rng(0).bytes(50_000)
    archive = pack(tmp_path / kind, {"set/a.txt": noise})
    data = bytearray(archive.read_bytes())
    data[20_000:20_100] = bytes(100)
    for damaged in (bytes(data), bytes(data[: len(data) // 2]), b"", b"nothing of the kind"):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=kind):
            archives.unpack(archive, tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [kind]


@pytest.mark.parametrize(
    "data, told",
    [
        (b"PK\x03\x04" + b"0" * 99, "it is a .zip that is damaged"),
        (
            gzip.compress(b"path,label", mtime=0),
            "it is compressed by gzip, and there is no .tar in it",
        ),
        (b"7z\xbc\xaf\x27\x1c" + b"0" * 99, "it is a .7z"),
        (b"(\xb5/\xfd" + b"0" * 99, "it is compressed by zstd"),
        (b"\n<!DOCTYPE html><html>Quota exceeded", "it is a web page"),
        (b"", "it is empty"),
    ],
)
def test_what_is_no_archive_says_what_it_is(data, told, tmp_path):
    (tmp_path / "x.tgz").write_bytes(data)
    with pytest.raises(ValueError, match=rf"x.tgz: expected a .zip or .tar archive.*{told}"):
        archives.unpack(tmp_path / "x.tgz", tmp_path)
