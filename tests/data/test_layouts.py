"""The benchmarks in the layouts that people have: the same images, classes and splits in each."""

import csv
import functools
import importlib
import shutil

import pytest

from rll_jax.data import _matlab_annotations, benchmarks
from tests.helpers.benchmark_trees import MAKE, jpeg, make_cars, make_cub, make_inshop, make_sop

make_devkit = functools.partial(make_cars, devkit=True)
SOP, CUB = "Stanford_Online_Products", "CUB_200_2011"
BIRDS, MODELS = "{:03d}.Some_Bird", "Maker Model {:03d} Sedan 2012"


def move(*pairs):
    """Moves "a" to "b" for each "a > b"; "a >" removes it."""

    def apply(root):
        for pair in pairs:
            old, new = (text.strip() for text in pair.split(">"))
            if not new:
                shutil.rmtree(root / old) if (root / old).is_dir() else (root / old).unlink()
                continue
            shutil.move(root / old, root / ".moved")
            (root / new).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(root / ".moved", root / new)

    return apply


def spell(folder, change):
    """Renames all images below a folder by their paths from it."""

    def apply(root):
        for path in sorted((root / folder).rglob("*.[jJ]*")):
            new = root / folder / change(path.relative_to(root / folder).as_posix())
            new.parent.mkdir(parents=True, exist_ok=True)
            path.rename(new)

    return apply


def frame(name, file, change=lambda path: path):
    """Writes the images as a table of open-metric-learning, and removes the authors' metadata."""

    def apply(root):
        listing = benchmarks.read_listing(name, root)
        with (root / file).open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["", "label", "path", "split", "is_query", "is_gallery"])
            for i, row in enumerate(listing.rows):
                roles = {"query": (True, False), "gallery": (False, True), "test": (True, True)}
                query, gallery = roles.get(row.split, ("", ""))
                split = "train" if row.split == "train" else "validation"
                writer.writerow([i, row.label, change(row.path), split, query, gallery])
        for path in [*root.rglob("*.txt"), *root.rglob("*.mat")]:
            path.unlink()

    return apply


def classes(name, names, to, parts=("",)):
    """Leaves folders of the classes alone, with every second image in the second of the parts."""

    def apply(root):
        listing = benchmarks.read_listing(name, root)
        for i, row in enumerate(listing.rows):
            folder = root / "new" / to / parts[i % len(parts)] / names.format(row.label + 1)
            folder.mkdir(parents=True, exist_ok=True)
            (listing.root / row.path).rename(folder / f"{i:05d}.jpg")
        for path in root.iterdir():
            if path.name != "new":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def all_of(*changes):
    return lambda root: [change(root) for change in changes]


def stray(folder, file, text):
    def apply(root):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / file).write_text(text)

    return apply


def masks(root):
    """CUB's segmentations: a folder for each class here too."""
    for path in sorted((root / "new/cub/images").iterdir()):
        (root / "new/a_first/segmentations" / path.name).mkdir(parents=True)
        (root / "new/a_first/segmentations" / path.name / "1.png").write_bytes(jpeg(0))


SOP_TEXTS = [
    f"{SOP}/Ebay_{s}.txt > online_products/Info_Files/Ebay_{s}.txt" for s in ("train", "test")
]
LOWER = [f"{SOP}/Ebay_{s}.txt > {SOP}/ebay_{s}.txt" for s in ("train", "test")]
CUB_TEXTS = [f"{CUB}/{file} > {file}" for file in ("images.txt", "image_class_labels.txt")]
TEST_LABELS = "cars_test_annos_withlabels.mat"
NESTED = [
    "cars_train > cars_train/cars_train",
    "cars_test > cars_test/cars_test",
    "devkit > car_devkit/devkit",
    f"{TEST_LABELS} > cars_test_annos_withlabels (1).mat",
]
HEADER = "image_id class_id super_class_id path"
LIST = "Eval/list_eval_partition.txt"
LAYOUTS = {
    "sop, Revisiting_DML": (make_sop, move(*SOP_TEXTS, f"{SOP} > online_products/images")),
    "sop, twice nested": (make_sop, move(f"{SOP} > {SOP}/{SOP}")),
    "sop, lower names": (make_sop, all_of(move(*LOWER), spell(SOP, str.lower))),
    "sop, stray list": (make_sop, all_of(
        stray("a_first", "Ebay_train.txt", f"{HEADER}\n1 1 1 x/y.JPG\n"),
        stray("b_next", "Ebay_train.txt", "torn"),
    )),
    "sop, stray pair": (make_sop, all_of(
        stray("a_first", "Ebay_train.txt", f"{HEADER}\n1 1 1 x/y.JPG\n"),
        stray("a_first", "Ebay_test.txt", f"{HEADER}\n2 2 1 x/z.JPG\n"),
    )),
    "sop, open-metric-learning": (make_sop, frame("sop", f"{SOP}/df.csv")),
    "cub, Kaggle": (make_cub, move(f"{CUB} > archive/{CUB}")),
    "cub, lists above": (make_cub, move(*CUB_TEXTS)),
    "cub, lists apart": (make_cub, move(*(f"{x}" .replace("> ", "> lists/") for x in CUB_TEXTS))),
    "cub, images/images": (make_cub, move(f"{CUB}/images > {CUB}/images/images")),
    "cub, another name": (make_cub, move(f"{CUB}/images > {CUB}/Birds")),
    "cub, capital": (make_cub, move(f"{CUB}/images > {CUB}/Images")),
    "cub, open-metric-learning": (make_cub, frame("cub", f"{CUB}/df.csv")),
    "cub, absolute": (make_cub, frame("cub", "df.csv", lambda path: f"{CUB}/{path}")),
    "cub, Revisiting_DML": (make_cub, classes("cub", BIRDS, "cub200/images")),
    "cub, classes alone": (make_cub, classes("cub", BIRDS, "")),
    "cub, train and test": (make_cub, classes("cub", BIRDS, "x", ("train", "test"))),
    "cub, segmentations": (make_cub, all_of(classes("cub", BIRDS, "cub/images"), masks)),
    "cars, torchvision": (make_devkit, move(*(f"{x} > stanford_cars/{x}" for x in (
        "devkit", "cars_train", "cars_test", TEST_LABELS
    )))),
    "cars, Kaggle": (make_devkit, move(*NESTED)),
    "cars, two of Kaggle": (make_devkit, move(
        "cars_train > a/cars_train/cars_train", "cars_test > a/cars_test/cars_test",
        "devkit > a-meta/devkit", f"{TEST_LABELS} > a-meta/{TEST_LABELS}",
    )),
    "cars, both lists": (make_devkit, all_of(
        lambda root: make_cars(root / "other"), move("other/cars_annos.mat > cars_annos.mat",
                                                     "other >"), move(*NESTED),
    )),
    "cars, other images": (make_cars, all_of(
        lambda root: make_devkit(root / "a"), move("a/cars_train >", "a/cars_test >"),
    )),
    "cars, car_ims/car_ims": (make_cars, move("car_ims > car_ims/car_ims")),
    "cars, open-metric-learning": (make_devkit, all_of(frame("cars", "df.csv"), move(*NESTED[:2]))),
    "cars, Revisiting_DML": (make_cars, classes("cars", MODELS, "cars196/images")),
    "cars, Kaggle's classes": (make_cars, classes("cars", MODELS, "car_data", ("train", "test"))),
    "inshop, img/img": (make_inshop, move("Img > img", "img/img > img/img")),
    "inshop, flat": (make_inshop, move("Img/img > img", f"{LIST} > list_eval_partition.txt")),
    "inshop, img_highres": (make_inshop, move("Img/img > Img/img_highres")),
    "inshop, img_highres and not img": (make_inshop, all_of(
        move("Img/img > Img/img_highres"), lambda root: (root / "Img/img").mkdir(),
    )),
    "inshop, lower names": (make_inshop, all_of(
        spell("Img/img", str.lower), move("Img > images", f"{LIST} > eval/list_eval_partition.txt"),
    )),
    "inshop, below": (make_inshop, move("Img > inshop/Img", "Eval > inshop/Eval")),
    "inshop, open-metric-learning": (make_inshop, all_of(
        frame("inshop", "df.csv", lambda path: path.replace("img/", "img_highres/")),
    )),
}  # fmt: skip


def contents(listing):
    """The images by the ranks of their classes, which tables and names of folders keep."""
    ranks = {label: i for i, label in enumerate(sorted({row.label for row in listing.rows}))}
    return sorted(
        (ranks[row.label], row.split, (listing.root / row.path).read_bytes())
        for row in listing.rows
    )


@pytest.fixture(scope="module", autouse=True)
def matlab_files_are_read_once():
    """The reader starts a process for each; the head of a file holds the time of its writing."""
    read, known = _matlab_annotations.read, {}

    def cached(data, column):
        key = data[128:], column
        if key not in known:
            known[key] = read(data, column)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_matlab_annotations, "read", cached)
        yield


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    @functools.cache
    def read(make):
        root = tmp_path_factory.mktemp("published")
        make(root)
        name = next(name for name in MAKE if name in getattr(make, "func", make).__name__)
        return contents(benchmarks.read_listing(name, root))

    return read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_dataset(layout, tmp_path, published):
    make, change = LAYOUTS[layout]
    make(tmp_path)
    change(tmp_path)
    top = tmp_path / "new" if (tmp_path / "new").exists() else tmp_path
    found = benchmarks.read_listing(layout.partition(",")[0], top)
    assert contents(found) == published(make)


def test_numbers_of_class_folders_are_the_published_labels(tmp_path):
    """A class that is missing moves no other class into the other half."""
    for number in (1, 2, 100, 101, 102, 103, 104):
        folder = tmp_path / "images" / BIRDS.format(number)
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_bytes(jpeg(number))
    rows = benchmarks.read_listing("cub", tmp_path).rows
    assert {row.label: row.split for row in rows} == {
        0: "train", 1: "train", 99: "train", 100: "test", 101: "test", 102: "test", 103: "test"
    }  # fmt: skip
    for number in (101, 102, 103, 104):
        shutil.rmtree(tmp_path / "images" / BIRDS.format(number))
    rows = benchmarks.read_listing("cub", tmp_path).rows
    assert [row.split for row in rows] == ["train", "test", "test"]


def test_other_folders_are_no_benchmark(tmp_path):
    for name in ("cats/a", "cats/b", "dogs/a", "images/cat", "images/dog"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").write_bytes(jpeg(0))
    for name, benchmark in benchmarks.BENCHMARKS.items():
        with pytest.raises(ValueError, match=f"no {benchmark.title} in .*, cats/a, cats/b") as told:
            benchmarks.read_listing(name, tmp_path)
        assert len(str(told.value)) < 700


@pytest.mark.parametrize("name", MAKE)
def test_metadata_without_images_say_where_they_were_looked_for(name, tmp_path):
    MAKE[name](tmp_path)
    for path in tmp_path.rglob("*.[jJ]*"):
        path.unlink()
    with pytest.raises(ValueError, match="none of the .* images that .* lists is there, such as"):
        benchmarks.read_listing(name, tmp_path)


def test_a_few_of_the_images_are_enough(tmp_path):
    """The others are found missing later, one by one; class folders do not replace the lists."""
    root = make_cub(tmp_path)
    kept = sorted((root / "images").rglob("*.jpg"))[17]
    for path in (root / "images").rglob("*.jpg"):
        if path != kept:
            path.unlink()
    listing = benchmarks.read_listing("cub", tmp_path)
    assert len(listing.rows) == 40 and listing.root == root
    assert [row for row in listing.rows if (root / row.path).exists()] == [listing.rows[17]]


def test_broken_lists_are_not_passed_over_for_class_folders(tmp_path):
    root = make_cub(tmp_path)
    (root / "images.txt").write_text("torn")
    with pytest.raises(ValueError, match="images.txt, line 1: expected a number and a path"):
        benchmarks.read_listing("cub", tmp_path)
    shutil.move(root / "images", tmp_path / "cub200/images")
    assert len(benchmarks.read_listing("cub", tmp_path).rows) == 40


def test_images_of_a_neighbour_are_not_taken(tmp_path):
    """Brackets are no pattern, and cars_test does not stand for cars_train."""
    make_sop(tmp_path / "sop2")
    make_sop(tmp_path / "sop[2]")
    assert benchmarks.read_listing("sop", tmp_path / "sop[2]").root == tmp_path / "sop[2]" / SOP
    make_devkit(tmp_path / "cars")
    shutil.rmtree(tmp_path / "cars/cars_train")
    listing = benchmarks.read_listing("cars", tmp_path / "cars")
    present = [row for row in listing.rows if (listing.root / row.path).exists()]
    assert len(present) == 20 and all(row.path.startswith("cars_test/") for row in present)


def test_another_dataset_beside_is_not_taken(tmp_path):
    """Folders and tables that look alike: the benchmark's own are those of its name."""
    for number in (1, 2, 257):
        for folder in ("256_objects", "birds_of_cub"):
            path = tmp_path / folder / f"{min(number, 200 if 'cub' in folder else 257):03d}.thing"
            path.mkdir(parents=True)
            (path / "1.jpg").write_bytes(jpeg(number))
    assert benchmarks.read_listing("cub", tmp_path).root == tmp_path / "birds_of_cub"
    shutil.rmtree(tmp_path / "birds_of_cub")
    with pytest.raises(ValueError, match="no CUB-200-2011 in"):
        benchmarks.read_listing("cub", tmp_path)
    for name in ("cub", "sop"):
        (tmp_path / f"the_{name}").mkdir()
        MAKE[name](tmp_path / f"the_{name}")
        frame(name, "df.csv")(tmp_path / f"the_{name}")
    assert len(benchmarks.read_listing("cub", tmp_path).rows) == 40
    assert len(benchmarks.read_listing("sop", tmp_path).rows) == 48
    with pytest.raises(ValueError, match="the_cub/df.csv: seems to be of another dataset"):
        benchmarks.read_listing("inshop", tmp_path)


def test_boxes_of_open_metric_learning(tmp_path):
    make_cub(tmp_path)
    frame("cub", "df.csv")(tmp_path)
    text = (tmp_path / "df.csv").read_text().splitlines()
    boxed = [f"{text[0]},x_1,x_2,y_1,y_2", *(f"{line},1,2,3,4" for line in text[1:])]
    (tmp_path / "df_with_bboxes.csv").write_text("\n".join(boxed))
    assert {row.box for row in benchmarks.read_listing("cub", tmp_path).rows} == {None}
    (tmp_path / "df.csv").unlink()
    assert {row.box for row in benchmarks.read_listing("cub", tmp_path).rows} == {(1, 3, 2, 4)}


def test_a_benchmark_in_an_object_store(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Store(MemoryFileSystem):
        protocol, store, pseudo_dirs = ("s3",), {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + str(path).removeprefix("s3://").strip("/")

    registry = importlib.import_module("fsspec.registry")  # fsspec.registry is its table
    monkeypatch.setitem(registry._registry, "s3", Store)
    make_cub(tmp_path)
    move(*CUB_TEXTS, f"{CUB}/images > birds/images/images")(tmp_path)
    for path in tmp_path.rglob("*.*"):
        if path.is_file():
            name = path.relative_to(tmp_path).as_posix()
            fsspec.filesystem("s3").pipe_file(f"s3://bucket/{name}", path.read_bytes())
    local, remote = (benchmarks.read_listing("cub", top) for top in (tmp_path, "s3://bucket"))
    assert remote.rows == local.rows
    assert str(remote.root) == "s3://bucket/birds/images"
