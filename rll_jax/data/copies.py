"""Copies among images: perceptual hashes, pairs of near rows, and the groups that they make.

The pairs are exact: each row is compared with each other in blocks of a matrix product, and no more
than a block of them is in memory. So that a thousand copies of one image are not a million pairs,
`find` returns the nearest copy of each image and groups.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
import tqdm

HASH_BITS = 256
# Relations of two images: one is train and one is test; of two classes of one split; of one class.
RELATIONS = SPLITS, CLASSES, CLASS = (0, 1, 2)

_SIDE = 16  # of a hash: 16 x 16 bits
_FLAT = 1.0  # levels of grey, of 255
_PARTS = 4  # of a side, whose mean colours are compared
# Levels of 255, root mean square: two fifths more light change up to about 60 and 15.
_BRIGHTNESS, _COLOUR = 64.0, 16.0
_BLOCK = 2048  # rows
_CHUNK = 1 << 16  # pairs
_NO_ROW = np.iinfo(np.int64).max
_ROUNDING = 1e-6  # of a cosine in float32


class Pairs(NamedTuple):
    """Pairs of near rows.

    Attributes:
      first: (P,) int64 rows.
      second: (P,) int64 rows, each above its `first`.
      similarities: (P,) float32 inner products.
    """

    first: np.ndarray
    second: np.ndarray
    similarities: np.ndarray

    def take(self, chosen: np.ndarray) -> "Pairs":
        """Returns some of the pairs, by a mask or by numbers."""
        return Pairs(*(column[chosen] for column in self))


class Items(NamedTuple):
    """What is known of N images.

    Attributes:
      labels: (N,) classes.
      is_test: (N,) bool.
      contents: (N,) integers, equal where two images are the same bytes. Their rows are equal then.
    """

    labels: np.ndarray
    is_test: np.ndarray
    contents: np.ndarray


class Copies(NamedTuple):
    """The copies of N images.

    Attributes:
      partners: (3, N) int64; in the row of each of `RELATIONS` the copy that is nearest to each
        image, the lowest row of equals; -1 where it has none.
      similarities: (3, N) float32 of these; -inf where there is none.
      groups: (N,) int64: images that are copies, also by way of others, have the same number, which
        is the lowest row among them.
    """

    partners: np.ndarray
    similarities: np.ndarray
    groups: np.ndarray


def perceptual_hash(image: Image.Image) -> np.ndarray | None:
    """Returns the perceptual hash of an image: (256,) int8, 1 or -1.

    It is imagehash's pHash (N. Krawetz, "Looks Like It", 2011): which of the 16 x 16 lowest
    frequencies of the grey image are above their median. Two hashes differ in (256 - their inner
    product) / 2 bits.

    Returns:
      The hash; None where the image is of one colour: the hash would tell nothing.
    """
    import imagehash  # it imports scipy and pywt

    grey = image.convert("L").resize((4 * _SIDE, 4 * _SIDE), Image.Resampling.LANCZOS)
    if np.asarray(grey).std() < _FLAT:
        return None
    bits = imagehash.phash(grey, hash_size=_SIDE).hash.reshape(-1)
    return np.where(bits, 1, -1).astype(np.int8)


def mean_colours(image: Image.Image) -> np.ndarray:
    """Returns the mean colours of 4 x 4 parts of an image: (48,) uint8, Y, Cb and Cr of each."""
    parts = image.convert("RGB").resize((_PARTS, _PARTS), Image.Resampling.BOX)
    return np.asarray(parts.convert("YCbCr")).reshape(-1)


def similarity_at(bits: int) -> int:
    """Returns the inner product of two hashes that differ in so many bits."""
    return HASH_BITS - 2 * bits


def bits_at(similarity: float) -> int:
    """Returns in how many bits two hashes of this inner product differ."""
    return round((HASH_BITS - similarity) / 2)


def near_pairs(rows: np.ndarray, at_least: float, *, block: int = _BLOCK) -> Iterator[Pairs]:
    """Yields all pairs of rows whose inner product is large, in parts.

    A progress bar is on stderr where it takes more than two seconds.

    Args:
      rows: (N, D), such as hashes, or embeddings of unit length. Products are taken in float32.
      at_least: the least inner product, to within 1e-6.
      block: the rows of a block; a part has at most block^2 pairs.
    """
    starts = range(0, len(rows), block)
    total = len(starts) * (len(starts) + 1) // 2
    with tqdm.tqdm(
        total=total, desc="comparing", unit="block", delay=2, leave=False, mininterval=1
    ) as bar:
        for start in starts:
            above = np.asarray(rows[start : start + block], np.float32)
            for other in range(start, len(rows), block):
                products = above @ np.asarray(rows[other : other + block], np.float32).T
                if other == start:
                    products[np.tril_indices(len(products))] = -np.inf
                places = np.flatnonzero(products >= at_least - _ROUNDING)
                if len(places):
                    first, second = np.divmod(places, products.shape[1])
                    yield Pairs(first + start, second + other, products.reshape(-1)[places])
                bar.update()


def find(
    rows: np.ndarray,
    at_least: float,
    items: Items,
    *,
    colours: np.ndarray | None = None,
    block: int = _BLOCK,
) -> tuple[Copies, Copies]:
    """Finds the copies among images.

    Groups chain: where a is near b and b is near c, the three are a group, however far c is from a.
    So no image has a copy out of its group.

    Args:
      rows: (N, D) hashes or embeddings, as `near_pairs` takes them.
      at_least: the least inner product of copies.
      items: what is known of the images.
      colours: (N, 48) `mean_colours`, where copies must be alike in them too, as a hash is blind
        to colours: within 64 of 255 levels in Y, and 16 in Cb and Cr, root mean square. Or None.
      block: see `near_pairs`.

    Returns:
      The copies of the same bytes, and the near ones of other bytes.
    """
    exact, near = _Found(items), _Found(items)
    for pairs in near_pairs(rows, at_least, block=block):
        if colours is not None:
            pairs = pairs.take(_alike(pairs, colours))
        same = items.contents[pairs.first] == items.contents[pairs.second]
        exact.add(pairs.take(same))
        near.add(pairs.take(~same))
    return exact.copies(), near.copies()


def join_groups(groups: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """Returns the (N,) groups of images that are in one group by any of several groupings."""
    found = groups
    for other in others:
        found = _components(np.arange(len(found)), found, np.arange(len(found)), other)
    return found


def _alike(pairs: Pairs, colours: np.ndarray) -> np.ndarray:
    """Returns (P,) bool: whether the two of a pair have the same colours, or nearly."""
    alike = np.empty(len(pairs.first), bool)
    for start in range(0, len(alike), _CHUNK):
        part = slice(start, start + _CHUNK)
        first, second = (colours[rows[part]].astype(np.float32) for rows in pairs[:2])
        squares = np.square(first - second).reshape(-1, _PARTS**2, 3)
        brightness, colour = squares[..., 0], squares[..., 1:]
        alike[part] = brightness.mean(axis=1) <= _BRIGHTNESS**2
        alike[part] &= colour.mean(axis=(1, 2)) <= _COLOUR**2
    return alike


class _Found:
    """Copies, as pairs are added."""

    def __init__(self, items: Items) -> None:
        self._labels, self._is_test = items.labels, items.is_test
        shape = (len(RELATIONS), len(items.labels))
        self._partners = np.full(shape, -1, np.int64)
        self._similarities = np.full(shape, -np.inf, np.float32)
        self._groups = np.arange(len(items.labels))

    def copies(self) -> Copies:
        return Copies(self._partners, self._similarities, self._groups)

    def add(self, pairs: Pairs) -> None:
        """Adds pairs, which are sorted by `first`."""
        first, second, _ = pairs
        if not len(first):
            return
        relations = np.where(self._labels[first] == self._labels[second], CLASS, CLASSES)
        relations[self._is_test[first] != self._is_test[second]] = SPLITS
        by_second = np.argsort(second, kind="stable")
        turned = Pairs(second, first, pairs.similarities).take(by_second)
        for relation in RELATIONS:
            self._keep_nearest(relation, pairs.take(relations == relation))
            self._keep_nearest(relation, turned.take(relations[by_second] == relation))
        apart = self._groups[first] != self._groups[second]
        if apart.any():
            everyone = np.arange(len(self._groups))
            self._groups = _components(everyone, self._groups, first[apart], second[apart])

    def _keep_nearest(self, relation: int, pairs: Pairs) -> None:
        """Keeps the nearest `second` of each `first`; the lowest row of equals."""
        if not len(pairs.first):
            return
        starts = np.flatnonzero(np.diff(pairs.first, prepend=-1))
        rows = pairs.first[starts]
        nearest = np.maximum.reduceat(pairs.similarities, starts)
        lengths = np.diff(starts, append=len(pairs.first))
        is_nearest = pairs.similarities == np.repeat(nearest, lengths)
        lowest = np.minimum.reduceat(np.where(is_nearest, pairs.second, _NO_ROW), starts)
        partners, similarities = self._partners[relation], self._similarities[relation]
        tie = (nearest == similarities[rows]) & (lowest < partners[rows])
        better = tie | (nearest > similarities[rows])
        partners[rows[better]], similarities[rows[better]] = lowest[better], nearest[better]


def _components(*ends: np.ndarray) -> np.ndarray:
    """Returns the lowest row among those that edges lead to, for each row.

    Args:
      *ends: the two ends of edges, and again: each row is the end of an edge.
    """
    from scipy import sparse  # takes half a second

    first, second = np.concatenate(ends[::2]), np.concatenate(ends[1::2])
    size = int(first.max()) + 1 if len(first) else 0
    graph = sparse.coo_array((np.ones(len(first), bool), (first, second)), shape=(size, size))
    _, numbers = sparse.csgraph.connected_components(graph, directed=False)
    _, lowest = np.unique(numbers, return_index=True)
    return lowest[numbers]
