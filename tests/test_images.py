import io
import itertools

import numpy as np
from PIL import Image
import pytest

from rll_jax import images, pipeline, sampler


def encoded(image, kind="PNG", **kwargs):
    out = io.BytesIO()
    image.save(out, kind, **kwargs)
    return out.getvalue()


def picture(size=(40, 30)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8))


def test_transparency_goes_on_white_and_modes_become_rgb():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (np.asarray(images.decode(encoded(clear), "x")) == 255).all()
    for mode, kind in (("L", "PNG"), ("CMYK", "JPEG"), ("P", "PNG"), ("1", "PNG")):
        image = images.decode(encoded(picture().convert(mode), kind), "x")
        assert image.mode == "RGB" and image.size == (40, 30)
    deep = Image.fromarray(np.full((4, 4), 0x80FF, np.uint16))
    assert (np.asarray(images.decode(encoded(deep), "x")) == 0x80).all()


def test_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert images.decode(encoded(picture(), "JPEG", exif=exif), "x").size == (30, 40)


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(picture())[:200], encoded(picture(), "JPEG")[:400]])
def test_broken_images_are_named(data):
    with pytest.raises(images.BadImageError, match="'some/path.jpg'"):
        images.decode(data, "some/path.jpg")


@pytest.mark.parametrize("augment", [images.RandomAffine(24), images.RandomResizedCrop(24)])
def test_augmentation_is_a_function_of_its_generator(augment):
    views = [augment(picture(), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert views[0].shape == (24, 24, 3) and views[0].dtype == np.uint8
    assert (views[0] == views[1]).all() and (views[0] != views[2]).any()


def test_affine_without_change_is_the_picture():
    image = picture((32, 32))
    still = images.RandomAffine(32, rotate=0, zoom=(1, 1), stretch=0, shift=0, colour=0)
    np.testing.assert_array_equal(still(image, np.random.default_rng(0)), np.asarray(image))


def test_affine_keeps_the_paper_white_and_grey_has_no_colour():
    assert (images.RandomAffine(16, colour=0.5)(Image.new("RGB", (32, 32), "white"), np.random.default_rng(3)) == 255).all()
    red = Image.new("RGB", (32, 32), "red")
    spread = [np.ptp(images.RandomAffine(8, colour=1e-4, grey=g, shift=0)(red, np.random.default_rng(1))[4, 4].astype(int)) for g in (0, 1)]
    assert spread[0] > 200 and spread[1] < 10


def test_test_view_keeps_the_centre():
    image = Image.new("RGB", (100, 50), "white")
    image.paste("black", (25, 12, 75, 38))
    assert (images.resize_center_crop(image, size=10, resize=20)[1:-1, 1:-1] == 0).all()
    assert images.resize_center_crop(image, size=20, resize=20).max() == 255


def test_crop_covers_the_whole_scale():
    flat = images.RandomResizedCrop(8, scale=(1, 1), ratio=(1, 1), flip=False)
    image = picture((8, 8))
    np.testing.assert_array_equal(flat(image, np.random.default_rng(0)), np.asarray(image))
    flipped = images.RandomResizedCrop(8, scale=(1, 1), ratio=(1, 1))
    views = {flipped(image, np.random.default_rng(s)).tobytes() for s in range(20)}
    assert views == {np.asarray(image).tobytes(), np.asarray(image)[:, ::-1].tobytes()}


def test_a_class_is_transformed_alike(emoji):
    """Each image of a class as every other of it in the batch; another step, another transformation; again the same."""
    train, transform = emoji["train"], images.ClassTransform()
    batches = sampler.ClassSampler(train.labels, 8, 4, seed=3)
    whole = lambda image, rng: images.resize_center_crop(image, 16, 16)
    plain, changed, again = (
        list(pipeline.train_batches(train, batches, whole, of_class, start=0, stop=4))
        for of_class in (None, transform, transform)
    )
    kinds = set()
    for a, b, c in zip(plain, changed, again):
        np.testing.assert_array_equal(b["image"], c["image"])
        for first in range(0, 32, 4):
            seen = []
            for x, y in zip(a["image"][first : first + 4], b["image"][first : first + 4]):
                fits = [
                    (mirror, turn, order)
                    for mirror in (1, -1) for turn in range(4) for order in itertools.permutations(range(3))
                    if np.array_equal(np.rot90(x[:, ::mirror], turn)[..., order], y)
                ]  # fmt: skip
                seen.append(set(fits))
            common = set.intersection(*seen)
            assert common
            kinds.add(min(common))
    assert len(kinds) > 5


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_range_are_refused(mode):
    data = encoded(Image.fromarray(np.zeros((8, 8), np.float32 if mode == "F" else np.int32)), "TIFF")
    with pytest.raises(images.BadImageError, match=f"odd.tiff.*mode {mode}, expected 8 or 16 bits"):
        images.decode(data, "odd.tiff")
