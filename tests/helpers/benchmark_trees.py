"""Small trees in the layouts in which the benchmarks are published; a class has one image."""

import io

import numpy as np
from PIL import Image
from scipy import io as scipy_io


def jpeg(seed, size=(60, 40)):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), np.uint8)
    Image.fromarray(pixels).resize(size).save(out, "JPEG")
    return out.getvalue()


def _write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(seed))


def make_sop(directory, classes=12, images_per_class=4):
    """The first half of the classes trains; super classes 1 and 2 in turn."""
    root, header = directory / "Stanford_Online_Products", "image_id class_id super_class_id path"
    lines = {"train": [header], "test": [header]}
    for c in range(1, classes + 1):
        folder = "bicycle_final" if c % 2 else "chair_final"
        for i in range(images_per_class):
            path = f"{folder}/{100 + c}_{i}.JPG"
            _write_image(root / path, c)
            split = "train" if c <= classes // 2 else "test"
            lines[split].append(f"{c * images_per_class + i} {c} {1 + c % 2} {path}")
    for split, rows in lines.items():
        (root / f"Ebay_{split}.txt").write_text("\r\n".join(rows) + "\r\n")
    return root


def make_cub(directory, classes=(1, 2, 3, 99, 100, 101, 102, 198, 199, 200), images_per_class=4):
    root = directory / "CUB_200_2011"
    images, labels, tests = [], [], []
    for c in classes:
        for i in range(images_per_class):
            path = f"{c:03d}.Some_Bird/Some_Bird_{i:04d}_{c}.jpg"
            _write_image(root / "images" / path, c)
            images.append(f"{len(images) + 1} {path}")
            labels.append(f"{len(images)} {c}")
            tests.append(f"{len(images)} {i % 2}")
    (root / "images.txt").write_text("\n".join(images) + "\n")
    (root / "image_class_labels.txt").write_text("\n".join(labels) + "\n")
    (root / "train_test_split.txt").write_text("\n".join(tests) + "\n")
    (root / "classes.txt").write_text("\n".join(f"{c} {c:03d}.Some_Bird" for c in classes) + "\n")
    return root


def annotations(path, **columns):
    """A struct array as MATLAB saves it, one struct a row."""
    table = np.empty(
        (1, len(next(iter(columns.values())))), dtype=[(name, object) for name in columns]
    )
    for name, values in columns.items():
        table[name][0] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy_io.savemat(path, {"annotations": table})


def make_cars(
    directory, classes=(1, 2, 3, 97, 98, 99, 100, 194, 195, 196), images_per_class=4, devkit=False
):
    labels = [c for c in classes for _ in range(images_per_class)]
    if devkit:
        for split, half in (("train", 0), ("test", 1)):
            names = [f"{i + 1:05d}.jpg" for i in range(len(labels) // 2)]
            for name, label in zip(names, labels[half::2], strict=True):
                _write_image(directory / f"cars_{split}" / name, label)
            file = (
                "devkit/cars_train_annos.mat"
                if split == "train"
                else "cars_test_annos_withlabels.mat"
            )
            ones = [1.0] * len(names)
            annotations(
                directory / file,
                bbox_x1=ones,
                bbox_y1=ones,
                bbox_x2=ones,
                bbox_y2=ones,
                **{"class": labels[half::2]},
                fname=names,
            )
        annotations(directory / "devkit/cars_test_annos.mat", bbox_x1=ones, fname=names)
        return directory
    names = [f"car_ims/{i + 1:06d}.jpg" for i in range(len(labels))]
    for name, label in zip(names, labels, strict=True):
        _write_image(directory / name, label)
    tests = [i % 2 for i in range(len(labels))]
    annotations(
        directory / "cars_annos.mat",
        relative_im_path=names,
        bbox_x1=labels,
        **{"class": labels},
        test=tests,
    )
    return directory


def make_inshop(directory, train=4, test=4):
    rows = []
    for item in range(1, train + test + 1):
        for i in range(4):
            path = f"img/WOMEN/Dresses/id_{item:08d}/0{i}_1_front.jpg"
            _write_image(directory / "Img" / path, item)
            test_split = "query" if i == 0 else "gallery"
            rows.append(f"{path:<60} id_{item:08d} {'train' if item <= train else test_split}")
    (directory / "Eval").mkdir()
    head = [str(len(rows)), "image_name item_id evaluation_status"]
    (directory / "Eval/list_eval_partition.txt").write_text("\n".join(head + rows) + "\n")
    return directory


MAKE = {"sop": make_sop, "cub": make_cub, "cars": make_cars, "inshop": make_inshop}


def make_folders(root, classes, images=3):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(images):
            (root / name / f"{i}.JPG").write_bytes(jpeg(i))
        (root / name / "notes.txt").write_text("no image")
