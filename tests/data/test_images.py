from concurrent import futures
import functools
import io
import itertools
import sys

import numpy as np
from PIL import Image
import pytest

from rll_jax.data import images, pipeline, sampler, views


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


@pytest.mark.parametrize(
    "data", [b"", b"not an image", encoded(picture())[:200], encoded(picture(), "JPEG")[:400]]
)
def test_broken_images_are_named(data):
    with pytest.raises(images.BadImageError, match="'some/path.jpg'"):
        images.decode(data, "some/path.jpg")


def test_a_program_is_no_picture(monkeypatch):
    """Pillow would start Ghostscript on it, whatever its name says."""
    from PIL import EpsImagePlugin

    def started(*_):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    with pytest.raises(images.BadImageError, match="EPS is a program, which is not run"):
        images.decode(encoded(picture(), "EPS"), "some/path.jpg")


@pytest.mark.parametrize("augment", [views.RandomAffine(24), views.RandomResizedCrop(24)])
def test_augmentation_is_a_function_of_its_generator(augment):
    views = [augment(picture(), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert views[0].shape == (24, 24, 3) and views[0].dtype == np.uint8
    assert (views[0] == views[1]).all() and (views[0] != views[2]).any()


def test_affine_without_change_is_the_picture():
    image = picture((32, 32))
    still = views.RandomAffine(32, rotate=0, zoom=(1, 1), stretch=0, shift=0, colour=0)
    np.testing.assert_array_equal(still(image, np.random.default_rng(0)), np.asarray(image))


def test_affine_keeps_the_paper_white_and_grey_has_no_colour():
    assert (
        views.RandomAffine(16, colour=0.5)(
            Image.new("RGB", (32, 32), "white"), np.random.default_rng(3)
        )
        == 255
    ).all()
    red = Image.new("RGB", (32, 32), "red")
    spread = [
        np.ptp(
            views.RandomAffine(8, colour=1e-4, grey=g, shift=0)(red, np.random.default_rng(1))[
                4, 4
            ].astype(int)
        )
        for g in (0, 1)
    ]
    assert spread[0] > 200 and spread[1] < 10


def test_test_view_keeps_the_centre():
    image = Image.new("RGB", (100, 50), "white")
    image.paste("black", (25, 12, 75, 38))
    assert (views.resize_center_crop(image, size=10, resize=20)[1:-1, 1:-1] == 0).all()
    assert views.resize_center_crop(image, size=20, resize=20).max() == 255


def test_crop_covers_the_whole_scale():
    flat = views.RandomResizedCrop(8, scale=(1, 1), ratio=(1, 1), flip=False)
    image = picture((8, 8))
    np.testing.assert_array_equal(flat(image, np.random.default_rng(0)), np.asarray(image))
    flipped = views.RandomResizedCrop(8, scale=(1, 1), ratio=(1, 1))
    seen = {flipped(image, np.random.default_rng(s)).tobytes() for s in range(20)}
    assert seen == {np.asarray(image).tobytes(), np.asarray(image)[:, ::-1].tobytes()}


def test_a_class_is_transformed_alike(emoji):
    """All images of a class in a batch are changed alike, differently in another step."""
    train, transform = emoji["train"], views.ClassTransform()
    batches = sampler.ClassSampler(train.labels, 8, 4, seed=3)

    def whole(image, rng):
        return views.resize_center_crop(image, 16, 16)

    plain, changed, again = (
        list(
            pipeline.train_batches(
                train, batches, whole, class_transform, start=0, stop=4, spread=False
            )
        )
        for class_transform in (None, transform, transform)
    )
    kinds = set()
    for a, b, c in zip(plain, changed, again, strict=True):
        np.testing.assert_array_equal(b["image"], c["image"])
        for first in range(0, 32, 4):
            seen = []
            rows = slice(first, first + 4)
            for x, y in zip(a["image"][rows], b["image"][rows], strict=True):
                fits = [
                    (mirror, turn, order)
                    for mirror in (1, -1)
                    for turn in range(4)
                    for order in itertools.permutations(range(3))
                    if np.array_equal(np.rot90(x[:, ::mirror], turn)[..., order], y)
                ]
                seen.append(set(fits))
            common = set.intersection(*seen)
            assert common
            kinds.add(min(common))
    assert len(kinds) > 5


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_range_are_refused(mode):
    data = encoded(
        Image.fromarray(np.zeros((8, 8), np.float32 if mode == "F" else np.int32)), "TIFF"
    )
    with pytest.raises(images.BadImageError, match=f"odd.tiff.*mode {mode}, expected 8 or 16 bits"):
        images.decode(data, "odd.tiff")


def photograph(size=(640, 480)):
    """Smooth as a photograph is, so that scales can be compared."""
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("shape", [(640, 480), (641, 479), (230, 900), (100, 80)])
def test_a_jpeg_at_reduced_scale_is_the_whole_one_resized(shape):
    data = encoded(photograph(shape), "JPEG", quality=92)
    whole = images.decode(data, "x")
    for box in (None, (10, 5, shape[0] * 0.8, shape[1] * 0.9), (0, 0, shape[0], shape[1])):
        for size in ((64, 64), (227, 227), (30, 90)):
            ours = np.asarray(
                images.EncodedImage(data, "x").resize(size, Image.Resampling.BILINEAR, box=box), int
            )
            theirs = np.asarray(whole.resize(size, Image.Resampling.BILINEAR, box=box), int)
            assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 3


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_box_moved_to_the_nearest_pixels_moves_by_half_of_one(mode):
    """Every pixel is near what the box gives, shifted by half a pixel of the decoded scale."""
    data = encoded(photograph((640, 480)).convert(mode), "JPEG", quality=95)
    picture, box = images.EncodedImage(data, "x"), np.array([31.3, 17.8, 500.1, 460.9])
    seen = picture.resized((200, 190), tuple(box), nearest=True).astype(int)
    shifted = [
        picture.resized((200, 190), tuple(box + [x, y, x, y])).astype(int)
        for x in (-1, 0, 1)
        for y in (-1, 0, 1)
    ]
    assert ((seen >= np.min(shifted, 0) - 4) & (seen <= np.max(shifted, 0) + 4)).mean() > 0.99
    whole = picture.resized((320, 240), nearest=True)
    np.testing.assert_array_equal(whole, picture.resized((320, 240)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_upright_at_every_scale(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph((160, 96)), "JPEG", exif=exif, quality=95)
    whole, picture = images.decode(data, "x"), images.EncodedImage(data, "x")
    assert picture.size == whole.size == ((96, 160) if orientation > 4 else (160, 96))
    for size in ((48, 80), (60, 40)):
        ours, theirs = (
            np.asarray(x.resize(size, Image.Resampling.BILINEAR), int) for x in (picture, whole)
        )
        assert np.abs(ours - theirs).mean() < 3


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_turned_tiff_is_upright_once(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph((160, 96)), "TIFF", exif=exif)
    picture = images.EncodedImage(data, "x")
    assert picture.size == picture.rgb().size == ((96, 160) if orientation == 6 else (160, 96))
    assert picture.resize((16, 16), Image.Resampling.BILINEAR).size == (16, 16)


@pytest.mark.parametrize("kwargs", [{}, {"progressive": True, "subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_whole_jpeg_is_pillows(mode, kwargs):
    data = encoded(photograph((163, 97)).convert(mode), "JPEG", quality=90, **kwargs)
    np.testing.assert_array_equal(
        images.decode(data, "x"), Image.open(io.BytesIO(data)).convert("RGB")
    )


def test_deep_grey_with_a_transparent_value_keeps_its_picture():
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900)
    data = encoded(deep, transparency=900 * 63)
    assert len(np.unique(np.asarray(images.decode(data, "x")))) > 30


def test_a_bomb_is_refused_in_threads_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = encoded(picture((40, 30)))
    with futures.ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(images.EncodedImage, data, "x") for _ in range(20)]:
            with pytest.raises(images.BadImageError, match="40 x 30 pixels are more than is safe"):
                result.result()


def windows(size, **kwargs):
    """Shares of the area, and of the width by that of the height, of 500 random windows."""
    boxes = []

    class Spy:
        width, height = size

        def resize(self, to, how, box, reducing_gap):
            boxes.append(np.array(box) / [*size, *size])
            return Image.new("RGB", to)

    for seed in range(500):
        views.RandomResizedCrop(8, **kwargs)(Spy(), np.random.default_rng(seed))
    left, top, right, bottom = np.array(boxes).T
    assert min(left.min(), top.min()) >= 0 and max(right.max(), bottom.max()) <= 1
    return (right - left) * (bottom - top), (right - left) / (bottom - top)


@pytest.mark.parametrize("size", [(64, 64), (640, 320), (100, 400)])
def test_the_random_window_is_of_the_squeezed_picture(size):
    """Scale and aspect are those of the image resized to a square first."""
    area, aspect = windows(size)
    assert 0.5 <= area.min() < 0.52 and 0.98 < area.max() <= 1
    assert 0.75 - 1e-6 <= aspect.min() < 0.77 and 1.3 < aspect.max() <= 4 / 3 + 1e-6


@pytest.mark.parametrize("size", [(64, 64), (640, 320), (100, 400)])
def test_the_random_window_has_an_aspect_of_its_own(size):
    area, shares = windows(size, scale=(0.05, 0.15), square=False)
    aspect = shares * size[0] / size[1]
    assert 0.05 <= area.min() < 0.052 and 0.148 < area.max() <= 0.15 + 1e-6
    assert 0.75 - 1e-6 <= aspect.min() < 0.77 and 1.3 < aspect.max() <= 4 / 3 + 1e-6
    assert abs(np.log(aspect).mean()) < 0.03
    area, shares = windows(size, scale=(0.9, 0.9), square=False)  # none of these aspects fits 1 : 4
    np.testing.assert_allclose(area, 0.9)
    assert shares.min() >= 0.9 - 1e-6 and shares.max() <= 1 / 0.9 + 1e-6


@pytest.mark.parametrize("size", [(90, 72), (72, 130), (180, 180)])
def test_the_test_view_of_imagenet_keeps_the_aspect(size):
    """The shorter side is resized to 72, and the centre of 64 x 64 is kept."""
    image = photograph(size)
    scale = 72 / min(size)
    sides = round(size[0] * scale), round(size[1] * scale)
    whole = image.resize(sides, Image.Resampling.BILINEAR)
    left, top = (whole.width - 64) // 2, (whole.height - 64) // 2
    expected = np.asarray(whole.crop((left, top, left + 64, top + 64)), int)
    for kind in ("JPEG", "PNG"):
        kwargs = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
        picture = images.EncodedImage(encoded(image, kind, **kwargs), "x")
        seen = views.short_side_center_crop(picture, 64, 72)
        assert np.abs(seen - expected).mean() < 2
        if kind == "PNG" and scale == 1:
            np.testing.assert_array_equal(seen, expected)


def test_the_window_of_the_2020_recipe():
    """256 s wide and 256 s r high, s in 0.5-1 and r in 3/4-4/3, both uniform, at most 255."""
    view = views.ScaledCrop(227, 256)
    rng = np.random.default_rng(0)
    left, top, width, height = np.array([view.window(rng) for _ in range(20000)]).T
    assert max(width.max(), height.max()) == 255 and min(left.min(), top.min()) == 0
    assert (left + width).max() == (top + height).max() == 256
    ratio, share = height / width, width * height / 256**2
    assert 0.74 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.35
    assert abs(ratio.mean() - (3 / 4 + 4 / 3) / 2) < 0.01  # also of windows that shrank
    assert 0.18 < share.min() < 0.2 and 0.95 < share.max() < 1
    expected = np.random.default_rng(1).uniform([0.5, 3 / 4], [1, 4 / 3], (20000, 2))
    sides = 256 * np.stack([expected[:, 0], expected.prod(axis=1)])
    sides *= np.minimum(1, 255 / sides.max(axis=0))
    for ours, theirs in ((width, sides[0]), (height, sides[1]), (share, sides.prod(0) / 256**2)):
        np.testing.assert_allclose(
            np.quantile(ours, [0.1, 0.5, 0.9]), np.quantile(theirs, [0.1, 0.5, 0.9]), rtol=0.02
        )
    assert 0.55 < share.mean() < 0.62


def test_the_2020_view_is_that_window_of_the_square_resized_twice():
    image = photograph((300, 200))
    view = views.ScaledCrop(48, 64, interpolation="bicubic")
    left, top, width, height = view.window(np.random.default_rng(3))
    square = image.resize((64, 64), Image.Resampling.BICUBIC)
    window = square.crop((left, top, left + width, top + height))
    expected = np.asarray(window.resize((48, 48), Image.Resampling.BICUBIC))
    seen = view(image, np.random.default_rng(3))
    assert any((seen == side).all() for side in (expected, expected[:, ::-1]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    "view",
    [
        functools.partial(views.resize_center_crop, size=57, resize=64),
        functools.partial(views.border_center_crop, size=57, fit=64),
        functools.partial(views.resize_center_crop, size=360, resize=400),
    ],
)
def test_bicubic_views_of_encoded_images_are_pillows(view, kind):
    """Antialiased, from the full image: also of JPEGs, which are not decoded smaller."""
    data = encoded(photograph((300, 200)), kind)
    ours = view(images.EncodedImage(data, "x"), interpolation="bicubic")
    theirs = view(images.decode(data, "x"), interpolation="bicubic")
    np.testing.assert_array_equal(ours, theirs)
    other = view(images.decode(data, "x"), interpolation="bilinear")
    assert (ours != other).any()


@pytest.mark.parametrize(
    "view", [views.ResizeCrop(24, 28, "bicubic"), views.BorderCrop(24, 28, "bicubic"),
             views.RandomResizedCrop(24, interpolation="bicubic")],
)  # fmt: skip
def test_bicubic_random_views_of_encoded_images_are_pillows(view):
    data = encoded(photograph((300, 200)), "JPEG")
    ours, theirs = (
        view(image, np.random.default_rng(5))
        for image in (images.EncodedImage(data, "x"), images.decode(data, "x"))
    )
    np.testing.assert_array_equal(ours, theirs)


def test_shrinking_for_a_cache_is_bicubic_too():
    data = encoded(photograph((300, 200)), "JPEG")
    shrunk = images.shrink(data, "x", 50, "bicubic")
    expected = images.decode(data, "x").resize((75, 50), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(shrunk), np.asarray(expected))
    assert images.shrink(data, "x", 400, "bicubic").size == (300, 200)


@pytest.mark.parametrize(
    "mode, kind, kwargs",
    [
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"subsampling": 0}),
        ("RGB", "WEBP", {}),
        ("RGBA", "PNG", {}),
        ("P", "GIF", {}),
    ],
)
def test_every_kind_is_resized_alike(mode, kind, kwargs):
    data = encoded(photograph((300, 200)).convert(mode), kind, **kwargs)
    ours, theirs = (
        np.asarray(x.resize((50, 50), Image.Resampling.BILINEAR), int)
        for x in (images.EncodedImage(data, "x"), images.decode(data, "x"))
    )
    assert ours.shape == (50, 50, 3) and np.abs(ours - theirs).mean() < 3


def test_a_truncated_jpeg_is_refused_at_every_scale():
    data = encoded(photograph(), "JPEG")
    for size in ((16, 16), (227, 227)):
        with pytest.raises(images.BadImageError, match="'x.jpg'"):
            images.EncodedImage(data[: len(data) // 2], "x.jpg").resize(
                size, Image.Resampling.BILINEAR
            )


def test_resize_crop_keeps_a_window_of_the_squeezed_picture():
    image = picture((64, 64))
    squeezed = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=2.0))
    windows = {squeezed[t : t + 28, x : x + 28].tobytes() for t in range(5) for x in range(5)}
    windows |= {
        squeezed[t : t + 28, x : x + 28][:, ::-1].tobytes() for t in range(5) for x in range(5)
    }
    seen = {views.ResizeCrop(28, 32)(image, np.random.default_rng(s)).tobytes() for s in range(200)}
    assert seen <= windows and len(seen) > 40
    np.testing.assert_array_equal(views.resize_center_crop(image, 28, 32), squeezed[2:30, 2:30])


def test_border_crop_cuts_white_and_keeps_the_shape():
    """A black rectangle of 100 x 40 on white, with 15 pixels of border, is fitted to 65 x 65."""
    page = Image.new("RGB", (400, 300), (255, 255, 255))
    page.paste((0, 0, 0), (200, 100, 300, 140))
    seen = views.border_center_crop(page, size=65, fit=65)
    drawn = (seen < 128).all(axis=2)
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    # 130 x 70 becomes 65 x 35, in the middle: the rectangle is 50 x 20 then
    assert (
        abs(len(columns) - 50) <= 1
        and abs(len(rows) - 20) <= 1
        and abs(columns[0] - 7) <= 1
        and abs(rows[0] - 22) <= 1
    )
    assert (seen[:5] == 255).all()
    faint = Image.new("RGB", (50, 50), (251, 251, 251))  # nothing drawn: left as it is
    assert (views.border_center_crop(faint, 32, 36) >= 250).all()
    cropped = views.BorderCrop(57, 65)(page, np.random.default_rng(0))
    assert cropped.shape == (57, 57, 3) and (cropped < 128).any()


@pytest.mark.parametrize("strong", [False, True])
def test_jitter_is_a_function_of_the_generator(strong):
    pytest.importorskip("albumentations", reason="albumentations is not installed")
    view = views.Jittered(views.RandomResizedCrop(32), strong)
    image = photograph()
    with futures.ThreadPoolExecutor(4) as pool:
        many = list(
            pool.map(
                lambda seed: view(image, np.random.default_rng(seed)).tobytes(), list(range(30)) * 2
            )
        )
    assert many[:30] == many[30:] and len(set(many)) > 25


def test_jitter_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    views._jitter.cache_clear()
    with pytest.raises(ValueError, match="pip install albumentations"):
        views.Jittered(views.RandomResizedCrop(8), False)
