"""The four benchmarks in the layouts that people have: the class and the split of each image.

Stanford Online Products (Song et al. 2016), CUB-200-2011 (Wah et al. 2011), CARS196 (Krause et al.
2013) and In-shop Clothes Retrieval (Liu et al. 2016), with the splits of Ranked List Loss. Read are
the authors' metadata, tables of open-metric-learning, and for CUB and CARS196 folders of the
classes. The layout is the one whose images are there.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
from typing import NamedTuple

from etils import epath

from rll_jax.data import _class_folders, _layouts, _published, _tables, folders, paths
from rll_jax.data._layouts import FolderTree, FoundImages
from rll_jax.data.listings import GALLERY, QUERY, TEST, TRAIN, Listing, Row

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz")


class _Benchmark(NamedTuple):
    """What is published of a benchmark.

    Attributes:
      title: its name.
      download: how to get its files.
      files: the files that are looked for, in words.
      words: what the name of its folder may hold, in lower case.
      class_folders: what its folders of classes look like; None where such folders are no layout.
      images: the published number of images of each split.
      classes: the published number of classes of each split.
    """

    title: str
    download: str
    files: str
    words: tuple[str, ...]
    class_folders: _class_folders.ClassFolders | None
    images: dict[str, int]
    classes: dict[str, int]


_FRAME = "or a table of open-metric-learning"
BENCHMARKS = {
    "sop": _Benchmark(
        "Stanford Online Products",
        "download Stanford_Online_Products.zip (2.9 GB) by the page "
        "https://cvgl.stanford.edu/projects/lifted_struct/ or from "
        "https://drive.google.com/uc?export=download&id=1TclrpQOF_ullUP99wk_gjGN8pKvtErG8",
        f"Ebay_train.txt {_FRAME}",
        ("sop", "online"),
        None,
        {TRAIN: 59551, TEST: 60502},
        {TRAIN: 11318, TEST: 11316},
    ),
    "cub": _Benchmark(
        "CUB-200-2011",
        "download CUB_200_2011.tgz (1.1 GB) from https://data.caltech.edu/records/65de6-vp158",
        f"image_class_labels.txt, 200 folders such as 001.Black_footed_Albatross, {_FRAME}",
        ("cub",),
        _class_folders.ClassFolders(200, r"^[0-9]{3}[._ -]"),
        {TRAIN: 5864, TEST: 5924},
        {TRAIN: 100, TEST: 100},
    ),
    "cars": _Benchmark(
        "CARS196",
        "download cars_train/, cars_test/, the devkit and cars_test_annos_withlabels.mat as "
        "https://github.com/pytorch/vision/issues/7545 says (the authors' page is gone)",
        "cars_annos.mat, cars_train_annos.mat, 196 folders such as 'AM General Hummer SUV 2000', "
        f"{_FRAME}",
        ("car",),
        _class_folders.ClassFolders(196, r"(19|20)[0-9]{2}$"),
        {TRAIN: 8054, TEST: 8131},
        {TRAIN: 98, TEST: 98},
    ),
    "inshop": _Benchmark(
        "In-shop Clothes Retrieval",
        "ask for Img/img.zip and Eval/list_eval_partition.txt at "
        "https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html",
        f"list_eval_partition.txt {_FRAME}",
        ("shop", "deepfashion"),
        None,
        {TRAIN: 25882, QUERY: 14218, GALLERY: 12612},
        {TRAIN: 3997, QUERY: 3985, GALLERY: 3985},
    ),
}


class _Metadata(NamedTuple):
    """A way to read a benchmark that was found.

    Attributes:
      file: the file that tells it.
      read: reads the images.
      images: {first part of their paths: whether a folder of another name may stand for it}.
    """

    file: epath.Path
    read: Callable[[], list[Row]]
    images: Mapping[str, bool]


def read_listing(name: str, directory: paths.AnyPath) -> Listing:
    """Returns the images of a benchmark.

    Args:
      name: "sop", "cub", "cars" or "inshop".
      directory: a folder that holds the dataset's files, unpacked, or one or two folders above.

    Raises:
      ValueError: files are missing (where they were looked for, and what to download), none of the
        images is there, or metadata are broken (file and line).
    """
    tree = FolderTree(paths.to_path(directory))
    best: tuple[_Metadata, FoundImages] | None = None
    broken: list[tuple[_Metadata, ValueError]] = []
    for metadata in _find_metadata(name, tree):
        try:
            rows = metadata.read()
        except ValueError as error:
            broken.append((metadata, error))
            continue
        found = _layouts.find_images(tree, metadata.file.parent, rows, metadata.images)
        if found.present == found.sampled:
            return found.listing
        if not best or found.present * best[1].sampled > best[1].present * found.sampled:
            best = metadata, found
    if best and best[1].present:
        return best[1].listing
    if kind := BENCHMARKS[name].class_folders:
        torn = [metadata.file.parent for metadata, _ in broken]
        if listing := _class_folders.find(tree, kind, BENCHMARKS[name].words, without=torn):
            return listing
    if best:
        raise ValueError(_no_images(name, tree, *best, broken))
    if broken:
        raise ValueError("; besides, ".join(str(error)[:500] for _, error in broken[:2]))
    raise ValueError(_no_metadata(name, tree))


def _find_metadata(name: str, tree: FolderTree) -> Iterator[_Metadata]:
    """Yields each way to read the benchmark: the authors' first."""
    yield from _FINDERS[name](tree)
    images = {prefix: any_name for prefix, any_name in _IMAGES[name].items() if prefix}
    for folder in tree.near(tree.top):
        for file in sorted(tree.names(folder)):
            if file.lower().endswith((".csv", ".parquet")) and _tables.is_data_frame(folder / file):
                read = functools.partial(_read_frame, name, tree, folder / file)
                yield _Metadata(folder / file, read, {**images, "": True})


def _read_frame(name: str, tree: FolderTree, file: epath.Path) -> list[Row]:
    """Returns the images of a table of open-metric-learning, if it is of the benchmark."""
    rows = folders.read_index(file, root=tree.top)
    benchmark, folder = BENCHMARKS[name], file.parent
    is_meant = folder == tree.top or tree.is_named(file, benchmark.words)
    if not is_meant and (others := differences(name, rows)):
        raise ValueError(
            f"{file}: seems to be of another dataset ({others[0]}); give its folder if it is not"
        )
    return rows


def _find_sop(tree: FolderTree) -> Iterator[_Metadata]:
    for train in tree.find("Ebay_train.txt"):
        test = tree.beside(train, "Ebay_test.txt")
        read = functools.partial(_published.read_sop, train, test)
        yield _Metadata(train, read, _IMAGES["sop"])


def _find_cub(tree: FolderTree) -> Iterator[_Metadata]:
    for labels in tree.find("image_class_labels.txt"):
        read = functools.partial(_published.read_cub, tree.beside(labels, "images.txt"), labels)
        yield _Metadata(labels, read, _IMAGES["cub"])


def _find_cars(tree: FolderTree) -> Iterator[_Metadata]:
    for file in tree.find("cars_annos.mat"):
        read = functools.partial(_published.read_cars, [(file, "relative_im_path", "")])
        yield _Metadata(file, read, _IMAGES["cars"])
    for file in tree.find("cars_train_annos.mat"):
        yield _Metadata(file, functools.partial(_read_cars_devkit, tree, file), _IMAGES["cars"])


def _read_cars_devkit(tree: FolderTree, train: epath.Path) -> list[Row]:
    for folder in tree.around(train.parent):
        for name in sorted(tree.names(folder)):
            if name.startswith("cars_test_annos_withlabels") and name.endswith(".mat"):
                return _published.read_cars(
                    [(train, "fname", "cars_train/"), (folder / name, "fname", "cars_test/")]
                )
    raise ValueError(
        f"no cars_test_annos_withlabels.mat in {tree.top}, and the annotations of the test images "
        f"in the devkit are without labels: {BENCHMARKS['cars'].download}"
    )


def _find_inshop(tree: FolderTree) -> Iterator[_Metadata]:
    for file in tree.find("list_eval_partition.txt"):
        yield _Metadata(file, functools.partial(_published.read_inshop, file), _IMAGES["inshop"])


_FINDERS = {"sop": _find_sop, "cub": _find_cub, "cars": _find_cars, "inshop": _find_inshop}
# {first part of published paths: whether a folder of another name may stand for it}. The files of
# cars_train and cars_test have the same names.
_IMAGES = {
    "sop": {"": True},
    "cub": {"images/": True},
    "cars": {"car_ims/": False, "cars_train/": False, "cars_test/": False},
    "inshop": {"img/": True, "img_highres/": True},
}


def differences(name: str, rows: list[Row]) -> list[str]:
    """Returns a line for each split whose counts differ from the published ones."""
    benchmark, messages = BENCHMARKS[name], []
    for split, images in benchmark.images.items():
        labels = [row.label for row in rows if row.split == split]
        classes = set(labels)
        if (len(labels), len(classes)) == (images, benchmark.classes[split]):
            continue
        text = (
            f"{split} has {len(labels):,} images of {len(classes):,} classes; "
            f"published are {images:,} of {benchmark.classes[split]:,}"
        )
        if name != "inshop":  # its class numbers have gaps
            first = 0 if split == TRAIN else benchmark.classes[TRAIN]
            published = range(first, first + benchmark.classes[split])
            if absent := [str(label + 1) for label in published if label not in classes]:
                text += f"; no image of class {', '.join(absent[:5])}"
                text += ", ..." * (len(absent) > 5)
        messages.append(f"{benchmark.title}: {text}")
    return messages


def _no_images(
    name: str,
    tree: FolderTree,
    metadata: _Metadata,
    found: FoundImages,
    broken: list[tuple[_Metadata, ValueError]],
) -> str:
    """Returns the message where metadata are there and no image that they name is."""
    rows = found.listing.rows
    reason = f"; besides, {str(broken[0][1])[:300]}" if broken else ""
    return (
        f"none of the {len(rows):,} images that {metadata.file} lists is there, such as "
        f"{rows[0].path} (looked in {_some_names(tree, found.looked_in)}): are they in another "
        f"folder? Otherwise {BENCHMARKS[name].download}{reason}"
    )


def _no_metadata(name: str, tree: FolderTree) -> str:
    """Returns the message where nothing of the benchmark is there."""
    benchmark, directory = BENCHMARKS[name], tree.top
    how = f"{benchmark.download}, unpack it, and give the folder that it is in"
    archives = sorted(file for file in tree.names(directory) if file.endswith(ARCHIVES))
    if archives:
        how = (
            f"unpack {', '.join(archives[:4])} there (python -m experiments.prepare "
            f"--dataset={name} --source={directory} --unpack does); "
            f"if that is something else, {how}"
        )
    looked = f"looked for {benchmark.files} in {_some_names(tree, list(tree.near(directory)))}"
    if not directory.is_dir():
        looked = "there is no such folder"
    return f"no {benchmark.title} in {directory} ({looked}): {how}"


def _some_names(tree: FolderTree, looked_in: list[epath.Path]) -> str:
    names = [tree.relative(folder) for folder in looked_in]
    more = f" and {len(names) - 6} more folders" if len(names) > 6 else ""
    return f"{', '.join(names[:6])}{more}"
