"""Real datasets that the developers have: Omniglot from its archives, the grocery photographs."""

import numpy as np
import pytest

from rll_jax.data import archives, folders, image_dataset, listings, sampler, views
from tests.helpers.paths import ROOT

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the developers' data are not here")


@needs_shared
def test_omniglot_from_its_archives(tmp_path):
    """Both published archives, unpacked; a table has characters, and alphabets as super classes."""
    for name in ("images_background_small1.zip", "images_background_small2.zip"):
        (tmp_path / name).write_bytes((SHARED / "omniglot" / name).read_bytes())
        archives.unpack(tmp_path / name, tmp_path / name[:-4])  # into a folder that is made for it
    rows = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*.png"))]
    lines = [
        f"{path.as_posix()},{path.parent.parent.name}/{path.parent.name},{path.parent.parent.name}"
        for path in rows
    ]
    (tmp_path / "index.csv").write_text("\n".join(["path,label,super_label", *lines]))
    sets = image_dataset.from_rows(
        tmp_path, folders.read_index(tmp_path / "index.csv", test_share=106 / 242)
    )
    train, test = sets["train"], sets["test"]
    assert (len(np.unique(train.labels)), len(np.unique(test.labels)), len(train) + len(test)) == (
        136,
        106,
        5840,
    )  # 50 characters are in both
    image_dataset.check_splits(train, test)
    assert not image_dataset.find_bad(test, full=True)
    assert train.decoded_image(0).size == (105, 105) and len(np.unique(train.super_labels)) > 5
    hard = sampler.HierarchicalSampler(train.labels, train.super_labels, 8, 4, 2)
    assert len(np.unique(train.super_labels[hard.batch(3)])) == 2


@needs_shared
def test_the_grocery_photographs_all_decode():
    lines = [
        line.split(",")
        for name in ("train", "val", "test")
        for line in (SHARED / f"grocery/{name}.txt").read_text().splitlines()
    ]
    rows = [
        listings.Row(path.strip(), int(label), "train" if int(label) < 41 else "test")
        for path, label, _ in lines
    ]
    sets = image_dataset.from_rows(SHARED / "grocery", rows)
    image_dataset.check_splits(**sets)
    assert {split: (len(data), len(np.unique(data.labels))) for split, data in sets.items()} == {
        "train": (3051, 41),
        "test": (2370, 40),
    }
    some = sets["test"].take(range(0, 2370, 7))
    assert not image_dataset.find_bad(some, full=True)
    seen = views.resize_center_crop(some.image(0), 64, 72)
    assert seen.shape == (64, 64, 3) and seen.std() > 20
