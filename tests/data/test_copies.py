"""Pairs, groups and hashes of copies, against brute force and re-encoded pictures."""

import io

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image, ImageEnhance
import pytest
from scipy import sparse

from rll_jax.data import copies
from tests.helpers.paths import ROOT

CUB = ROOT.parent / "shared/data/cub_200_2011/CUB_200_2011/images"


def brute_force(rows, at_least, labels, is_test, contents):
    """(partners, groups) of equal contents, and of others, by loops over all pairs."""
    found = []
    for same in (True, False):
        partners = np.full((3, len(rows)), -1)
        products = rows.astype(int) @ rows.astype(int).T
        near = (products >= at_least) & ((contents[:, None] == contents) == same)
        np.fill_diagonal(near, False)
        for i, j in np.argwhere(near):
            relation = copies.CLASS if labels[i] == labels[j] else copies.CLASSES
            relation = copies.SPLITS if is_test[i] != is_test[j] else relation
            now = partners[relation, i]
            if now < 0 or products[i, j] > products[i, now]:
                partners[relation, i] = j
        _, numbers = sparse.csgraph.connected_components(near)
        found.append((partners, np.array([np.argmax(numbers == n) for n in numbers])))
    return found


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 6), st.integers(1, 50))
@settings(max_examples=40, deadline=None)
def test_find_is_brute_force(seed, size, bits, block):
    rng = np.random.default_rng(seed)
    contents = rng.integers(0, max(size // 2, 1), size)
    rows = rng.choice(np.array([-1, 1], np.int8), (size, 8))[contents]
    is_test = rng.random(size) < 0.5
    labels = rng.integers(0, 3, size) + 10 * is_test
    items = copies.Items(labels, is_test, contents)
    found = copies.find(rows, 8 - 2 * bits, items, block=block)
    for kind, (partners, groups) in zip(
        found, brute_force(rows, 8 - 2 * bits, *items), strict=True
    ):
        np.testing.assert_array_equal(kind.partners, partners)
        np.testing.assert_array_equal(kind.groups, groups)
        has = partners >= 0
        products = np.einsum("rnd,nd->rn", rows.astype(int)[partners], rows.astype(int))
        np.testing.assert_array_equal(kind.similarities[has], products[has])
        assert np.isneginf(kind.similarities[~has]).all()


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 70), st.floats(0.3, 1))
@settings(max_examples=25, deadline=None)
def test_pairs_of_embeddings_are_all_found_once(seed, size, block, at_least):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(size, 4)).astype(np.float32)[rng.integers(0, size, size)]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    parts = list(copies.near_pairs(rows, at_least, block=block))
    assert all(len(part.first) <= block**2 for part in parts)
    pairs = [pair for part in parts for pair in zip(part.first, part.second, strict=True)]
    exact = rows.astype(np.float64) @ rows.astype(np.float64).T
    sure = set(map(tuple, np.argwhere(np.triu(exact >= at_least, 1))))
    perhaps = set(map(tuple, np.argwhere(np.triu(exact >= at_least - 3e-6, 1))))
    assert len(pairs) == len(set(pairs)) and sure <= set(pairs) <= perhaps


def test_groups_chain_and_join():
    rows = np.tril(np.full((4, 8), -2, np.int8), -1) + np.int8(1)  # one bit more in each
    found = copies.find(
        rows,
        6,
        copies.Items(np.zeros(4, int), np.zeros(4, bool), np.arange(4)),
    )[1]
    assert found.groups.tolist() == [0, 0, 0, 0]
    assert found.partners[copies.CLASS].tolist() == [1, 0, 1, 2]
    joined = copies.join_groups(np.array([0, 1, 1, 3, 4]), np.array([0, 1, 2, 2, 4]))
    assert joined.tolist() == [0, 1, 1, 1, 4]


def test_a_thousand_copies_of_one_image_are_linked_and_not_paired():
    number = 3000
    found = copies.find(
        np.ones((number, 256), np.int8),
        256,
        copies.Items(np.arange(number) % 2, np.arange(number) % 2 == 1, np.zeros(number, int)),
    )[0]
    assert (found.groups == 0).all()
    assert (found.partners[copies.SPLITS] == (np.arange(number) + 1) % 2).all()
    assert (found.partners[copies.CLASSES] == -1).all()


def encoded(image, kind="JPEG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return Image.open(io.BytesIO(out.getvalue())).convert("RGB")


def smaller(image, by):
    return image.resize((image.width // by, image.height // by), Image.Resampling.BICUBIC)


@pytest.mark.skipif(not CUB.is_dir(), reason="no photographs of CUB-200-2011 here")
def test_hashes_of_photographs_survive_encoding_and_tell_others_apart():
    photographs = [
        Image.open(path).convert("RGB") for path in sorted(CUB.glob("*/*1.jpg"))[:300:10]
    ]
    hashes = np.stack([copies.perceptual_hash(image) for image in photographs]).astype(int)
    for change in (
        lambda image: encoded(image, quality=30),
        lambda image: encoded(smaller(image, 2), quality=80),
        lambda image: encoded(smaller(image, 4), "PNG"),
        lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.2)),
    ):
        made = [change(image) for image in photographs]
        changed = np.stack([copies.perceptual_hash(image) for image in made])
        both = np.concatenate([hashes, changed])
        colours = np.stack([copies.mean_colours(image) for image in (*photographs, *made)])
        number, same = len(both), np.zeros(len(both), int)
        items = copies.Items(same, same > 0, np.arange(number))
        found = copies.find(both, copies.similarity_at(40), items, colours=colours)[1]
        np.testing.assert_array_equal(found.groups, np.arange(number) % len(photographs))
        bits = (copies.HASH_BITS - hashes @ changed.astype(int).T) // 2
        assert np.diag(bits).max() <= 40 < bits[~np.eye(len(bits), dtype=bool)].min()


def test_colours_tell_apart_what_a_hash_does_not():
    heart = np.zeros((64, 64), np.float32)
    heart[16:40, 8:56] = 1
    shades = [(220, 40, 40), (40, 40, 220), (225, 60, 40), (220, 40, 40)]
    drawn = [
        Image.fromarray((255 - heart[..., None] * (255 - np.array(shade))).astype(np.uint8))
        for shade in shades
    ]
    hashes = np.stack([copies.perceptual_hash(image) for image in drawn])
    colours = np.stack([copies.mean_colours(image) for image in drawn])
    items = copies.Items(np.zeros(4, int), np.zeros(4, bool), np.array([0, 1, 2, 0]))
    at_least = copies.similarity_at(40)
    assert copies.find(hashes, at_least, items)[1].groups.tolist() == [0, 0, 0, 0]
    exact, near = copies.find(hashes, at_least, items, colours=colours)
    assert exact.groups.tolist() == [0, 1, 2, 0] and near.groups.tolist() == [0, 1, 0, 0]


def test_similarities_and_bits():
    assert copies.similarity_at(0) == 256 and copies.similarity_at(40) == 176
    assert [copies.bits_at(copies.similarity_at(bits)) for bits in (0, 1, 40, 256)] == [
        0,
        1,
        40,
        256,
    ]


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (10, 200, 30)])
def test_an_image_of_one_colour_has_no_hash(colour):
    assert copies.perceptual_hash(Image.new("RGB", (50, 40), colour)) is None
    assert copies.perceptual_hash(encoded(Image.new("RGB", (50, 40), colour), quality=50)) is None
