"""Bounding boxes of tables: the image is what the picture has in its box."""

import io

import numpy as np
from PIL import Image
import pytest

from rll_jax.data import array_records, cache, folders, image_dataset, images, views

SIZE = (40, 30)
BOXES = ["", "5,4,25,29", "-3,10,18,99", "20.4,0.0,39.6,30.0", "7,7,19,23", "0,0,40,30"]
CROPS = [None, (5, 4, 25, 29), (0, 10, 18, 30), (20, 0, 40, 30), (7, 7, 19, 23), None]
HEADER = "path,label,split,x_1,y_1,x_2,y_2\n"


def picture(seed, kind="PNG", orientation=1):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize(SIZE if orientation == 1 else SIZE[::-1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif.tobytes())
    return file.getvalue()


@pytest.fixture
def table(tmp_path):
    """Two classes; one picture is listed with two boxes."""
    lines = []
    for i, box in enumerate(BOXES):
        number = 1 if i == 4 else i
        name = f"{number}.{'jpg' if number % 2 else 'png'}"
        (tmp_path / name).write_bytes(picture(number, "JPEG" if number % 2 else "PNG"))
        split = "train,0" if i < 3 else "test,1"
        lines.append(f"{name},{split.split(',')[1]},{split.split(',')[0]},{box or ',,,'}")
    (tmp_path / "df.csv").write_text(HEADER + "\n".join(lines))
    return tmp_path / "df.csv"


def expected(tmp_path, i):
    number = 1 if i == 4 else i
    path = tmp_path / f"{number}.{'jpg' if number % 2 else 'png'}"
    whole = images.decode(path.read_bytes(), str(path))
    return whole if CROPS[i] is None else whole.crop(CROPS[i])


@pytest.mark.parametrize("kind", ["files", "prepared", "kept index", "memory", "disk"])
def test_images_are_their_boxes_wherever_they_are_read(kind, table):
    root = table.parent
    rows = folders.read_index(table)
    splits = image_dataset.from_rows(root, rows)
    if kind in ("prepared", "kept index"):
        array_records.write_dataset(root, rows, root / "prepared")
        splits = array_records.open_dataset(root / "prepared", keep_index=kind != "prepared")
        if kind == "kept index":
            splits = array_records.open_dataset(root / "prepared")
    if kind == "memory":
        splits = {name: cache.in_memory(data, 1000) for name, data in splits.items()}
    if kind == "disk":
        splits = {name: cache.on_disk(data, 1000, root, name) for name, data in splits.items()}
    train, test = splits["train"], splits["test"]
    assert train.paths.tolist() == ["0.png", "1.jpg [5,4,25,29]", "2.png [-3,10,18,99]"]
    for data, numbers in ((train, [0, 1, 2]), (test.take([2, 0, 1]), [5, 3, 4])):
        for row, number in enumerate(numbers):
            image = data.image(row)
            wanted = expected(root, number)
            assert image.size == wanted.size
            np.testing.assert_array_equal(np.asarray(image.rgb()), np.asarray(wanted))


@pytest.mark.parametrize("nearest", [True, False])
def test_views_see_the_box_alone(nearest, table):
    """As they see the cropped picture in a file of its own."""
    data = image_dataset.from_rows(table.parent, folders.read_index(table))["train"]
    for row in (1, 2):
        file = io.BytesIO()
        data.decoded_image(row).save(file, "PNG")
        alone = images.EncodedImage(file.getvalue(), "alone")
        for size, box in (((7, 5), None), ((9, 9), (1.5, 2, 14, 17.25)), ((60, 40), None)):
            found = data.image(row).resized(size, box, nearest=nearest)
            np.testing.assert_array_equal(found, alone.resized(size, box, nearest=nearest))
        np.testing.assert_array_equal(
            views.resize_center_crop(data.image(row), 9, 8), views.resize_center_crop(alone, 9, 8)
        )


def test_boxes_are_in_the_upright_picture(tmp_path):
    turned = images.EncodedImage(picture(0, "JPEG", orientation=6), "turned", (5, 4, 25, 29))
    whole = images.decode(picture(0, "JPEG", orientation=6), "turned")
    assert whole.size == SIZE and turned.size == (20, 25)
    np.testing.assert_array_equal(np.asarray(turned.rgb()), np.asarray(whole.crop((5, 4, 25, 29))))


@pytest.mark.parametrize(
    "box, error",
    [
        ("5,4,,29", r"has a bounding box \(x_1, y_1, y_2\), and images are read whole unless"),
        ("5,4,5,29", "x_1=5, y_1=4, x_2=5, y_2=29 has no pixels"),
        ("5,9,25,4", "has no pixels: expected x_1 < x_2 and y_1 < y_2"),
        ("-9,-9,-1,5", "has no pixels"),
        ("5,4,1e30,29", "x_2=1e30, y_2=29, expected numbers of pixels"),
        ("a,4,25,29", "x_1=a, y_1=4, x_2=25, y_2=29, expected numbers of pixels"),
        ("inf,4,25,29", "expected numbers of pixels"),
    ],
)
def test_boxes_that_cannot_be(box, error, tmp_path):
    (tmp_path / "df.csv").write_text(f"{HEADER}a.png,0,train,,,,\nb.png,1,test,{box}\n")
    with pytest.raises(ValueError, match=f"df.csv, line 3: .*{error}"):
        folders.read_index(tmp_path / "df.csv")


def test_a_box_outside_of_its_picture_is_found_before_training(table):
    table.write_text(table.read_text().replace("5,4,25,29", "40,4,45,29"))
    data = image_dataset.from_rows(table.parent, folders.read_index(table))["train"]
    (reason,) = image_dataset.find_bad(data, full=False).values()
    assert "'1.jpg [40,4,45,29]'" in reason and "none of its 40 x 30 pixels" in reason
    cached = cache.in_memory(data, 1000)
    with pytest.raises(images.BadImageError):
        cached.decoded_image(1)  # not the whole picture


def test_a_box_is_listed_once(table):
    table.write_text(f"{table.read_text()}\n1.jpg,1,test,7,7.0,19,23\n")
    with pytest.raises(ValueError, match="line 8: 1.jpg was listed in line 6 already"):
        folders.read_index(table)
