"""The benchmarks at their full size: the published counts in each layout.

CUB-200-2011 is the real one. The lists of the others are made in their published formats, with
their published counts, over links to a few tiny images.
"""

import os
import shutil

import numpy as np
import pytest

from rll_jax.data import benchmarks, folders
from tests.helpers.benchmark_trees import annotations, jpeg
from tests.helpers.paths import SHARED

CUB = SHARED / "data/cub_200_2011/CUB_200_2011"
SUPER_CLASSES = (
    "bicycle", "cabinet", "chair", "coffee_maker", "fan", "kettle", "lamp", "mug", "sofa",
    "stapler", "table", "toaster",
)  # fmt: skip


def sizes(images, classes):
    """How many images each class has: the published sums, as even as can be."""
    return [images // classes + (i < images % classes) for i in range(classes)]


class Linker:
    """Makes images as hard links; a file system allows some ten thousand to a file."""

    def __init__(self, folder):
        self._folder, self._made = folder, 0

    def __call__(self, path):
        source = self._folder / f"{self._made // 20_000}.jpg"
        if not source.exists():
            source.write_bytes(jpeg(0, (16, 16)))
        self._made += 1
        os.link(source, path)


@pytest.fixture(scope="module")
def link(tmp_path_factory):
    return Linker(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def new_root(tmp_path_factory):
    """Makes folders that are gone after the tests: pytest would keep the hundred thousands."""
    made = []
    yield lambda name: made.append(tmp_path_factory.mktemp(name)) or made[-1]
    for root in made:
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def sop(new_root, link):
    root = new_root("sop")
    for name in SUPER_CLASSES:
        (root / f"{name}_final").mkdir()
    image = label = 0
    for split, images, classes in (("train", 59551, 11318), ("test", 60502, 11316)):
        lines = ["image_id class_id super_class_id path"]
        for size in sizes(images, classes):
            label += 1
            super_class = 1 + label % len(SUPER_CLASSES)
            for i in range(size):
                image += 1
                path = f"{SUPER_CLASSES[super_class - 1]}_final/{110_000 + label}_{i}.JPG"
                link(root / path)
                lines.append(f"{image} {label} {super_class} {path}")
        (root / f"Ebay_{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def cars_labels():
    """The classes of all images: 8,054 in the first half, 8,131 in the second."""
    return np.repeat(np.arange(1, 197), sizes(8054, 98) + sizes(8131, 98))


@pytest.fixture(scope="module")
def cars(new_root, link):
    """Both of the published layouts: devkit.mat, cars_train, cars_test; cars_annos.mat, car_ims."""
    root = new_root("cars")
    labels = cars_labels()
    is_test = (
        np.arange(len(labels)) * 8041 // 16185 != np.arange(1, len(labels) + 1) * 8041 // 16185
    )
    everywhere = [f"car_ims/{i + 1:06d}.jpg" for i in range(len(labels))]
    names = {"cars_annos.mat": ("relative_im_path", everywhere, labels)}
    for split, chosen, file in (
        ("train", labels[~is_test], "devkit/cars_train_annos.mat"),
        ("test", labels[is_test], "cars_test_annos_withlabels.mat"),
    ):
        names[file] = "fname", [f"{i + 1:05d}.jpg" for i in range(len(chosen))], chosen
        (root / f"cars_{split}").mkdir()
        for name in names[file][1]:
            link(root / f"cars_{split}" / name)
    assert is_test.sum() == 8041
    (root / "car_ims").mkdir()
    for name in everywhere:
        link(root / name)
    for file, (column, files, classes) in names.items():
        annotations(root / file, **{column: files, "class": [float(c) for c in classes]})
    models = [f"Maker {c:03d} Sedan 2012" for c in range(1, 197)]
    for i, label in enumerate(labels):
        folder = root / "images" / models[label - 1]
        folder.mkdir(parents=True, exist_ok=True)
        link(folder / f"{i:06d}.jpg")
    return root


@pytest.fixture(scope="module")
def inshop(new_root, link):
    root = new_root("inshop")
    rows = []
    queries, galleries = sizes(14218, 3985), sizes(12612, 3985)
    numbers = [(size, 0, 0) for size in sizes(25882, 3997)]
    numbers += [(0, q, g) for q, g in zip(queries, galleries, strict=True)]
    for item, (train, query, gallery) in enumerate(numbers, start=1):
        folder = f"img/{('WOMEN/Dresses', 'MEN/Denim')[item % 2]}/id_{item:08d}"
        (root / folder).mkdir(parents=True)
        roles = ["train"] * train + ["query"] * query + ["gallery"] * gallery
        for i, role in enumerate(roles):
            path = f"{folder}/{i // 7 + 1:02d}_{i % 7 + 1}_front.jpg"
            link(root / path)
            rows.append(f"{path:<80} id_{item:08d} {role}")
    head = [str(len(rows)), "image_name item_id evaluation_status"]
    (root / "list_eval_partition.txt").write_text("\n".join(head + rows) + "\n")
    return root


def lay_out(folder, source, layout):
    """Makes links in a folder: {their path: what they point at in the source}."""
    for path, target in layout.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(source / target)


LISTS = ["Ebay_train.txt", "Ebay_test.txt"]
FINALS = [f"{name}_final" for name in SUPER_CLASSES]
LABELS = "cars_test_annos_withlabels.mat"
DEVKIT = "devkit/cars_train_annos.mat"
CUB_LISTS = ["images.txt", "image_class_labels.txt"]
LAYOUTS = {
    "sop, published": {f"Stanford_Online_Products/{x}": x for x in [*LISTS, *FINALS]},
    "sop, Revisiting_DML": {
        **{f"online_products/Info_Files/{x}": x for x in LISTS},
        **{f"online_products/images/{x}": x for x in FINALS},
    },
    "cars, published": {x: x for x in ("cars_annos.mat", "car_ims")},
    "cars, torchvision": {
        f"stanford_cars/{x}": x for x in (DEVKIT, LABELS, "cars_train", "cars_test")
    },
    "cars, Kaggle": {
        "cars_annos.mat": "cars_annos.mat",
        "cars_train/cars_train": "cars_train",
        "cars_test/cars_test": "cars_test",
        "car_devkit/devkit/cars_train_annos.mat": DEVKIT,
        "cars_test_annos_withlabels (1).mat": LABELS,
    },
    "cars, Revisiting_DML": {"cars196/images": "images"},
    "inshop, published": {
        "In-shop Clothes Retrieval Benchmark/Img/img": "img",
        "In-shop Clothes Retrieval Benchmark/Eval/list_eval_partition.txt": (
            "list_eval_partition.txt"
        ),
    },
    "inshop, img/img": {
        "img/img": "img", "Eval/list_eval_partition.txt": "list_eval_partition.txt"
    },
    "inshop, img_highres": {
        "img_highres": "img", "Eval/list_eval_partition.txt": "list_eval_partition.txt"
    },
    "cub, published": {"CUB_200_2011": "."},
    "cub, Kaggle": {"CUB_200_2011/CUB_200_2011": "."},
    "cub, lists apart": {"images/images": "images", **{f"lists/{x}": x for x in CUB_LISTS}},
    "cub, Revisiting_DML": {"cub200/images": "images"},
}  # fmt: skip


FAST = ("sop, Revisiting_DML", "cars, Kaggle", "inshop, img/img", "cub")  # one of each is enough


@pytest.mark.skipif(not CUB.exists(), reason=f"{CUB} is not here")
def test_the_second_half_of_a_folder_is_the_protocol():
    rows = folders.class_folders(CUB / "images", test_classes="second_half")
    assert benchmarks.differences("cub", rows) == []
    listing = benchmarks.read_listing("cub", CUB)
    published = [(row.path.removeprefix("images/"), row.label, row.split) for row in listing.rows]
    assert sorted(published) == sorted((row.path, row.label, row.split) for row in rows)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=[] if x.startswith(FAST) else [pytest.mark.slow]) for x in LAYOUTS],
)
def test_published_counts(layout, tmp_path, request):
    name = layout.partition(",")[0]
    if name == "cub" and not CUB.exists():
        pytest.skip(f"{CUB} is not here")
    source = CUB if name == "cub" else request.getfixturevalue(name)
    lay_out(tmp_path, source, LAYOUTS[layout])
    listing = benchmarks.read_listing(name, tmp_path)
    assert benchmarks.differences(name, listing.rows) == []
    assert len({row.path for row in listing.rows}) == len(listing.rows)
    if name == "cub":
        assert all(
            row.path.split("/")[-2].startswith(f"{row.label + 1:03d}.") for row in listing.rows
        )
    assert all(map(os.path.isfile, (os.path.join(listing.root, r.path) for r in listing.rows)))
