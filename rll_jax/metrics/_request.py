"""What is to be scored, checked once."""

from collections.abc import Mapping, Sequence
import numbers
import os
from typing import NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from rll_jax._jaxlib_fault import warn_of_wrong_sums
from rll_jax.metrics import _checks, _counts, _problem, _ranks, _tiles
from rll_jax.metrics._problem import Side
from rll_jax.metrics._progress import Progress, Watch
from rll_jax.metrics._tiles import Combination

_BLOCK_SIZE = 1024  # products of smaller blocks take longer
_MAX_BLOCK_SIZE = 1 << 15


class Given(NamedTuple):
    """The queries, or the gallery, as the user gave them."""

    levels: Mapping[str, jax.Array | np.ndarray] | None
    labels: jax.Array | np.ndarray | None
    ids: npt.ArrayLike | None
    groups: npt.ArrayLike | None
    name: str  # "query" or "gallery"


class Request(NamedTuple):
    """What is to be scored."""

    queries: Side
    gallery: Side | None
    names: list[tuple[str, ...]]  # of the levels of each combination
    combinations: list[Combination]
    ks: tuple[int, ...]
    block_size: int


def checked(
    queries: Given,
    gallery: Given,
    names: list[tuple[str, ...]],
    ks: tuple[int, ...],
    block_size: int | None,
) -> Request:
    """Checks what the user gave; errors are those of `retrieval.level_scores_by_query`."""
    if not ks or not all(isinstance(k, numbers.Integral) and k >= 1 for k in ks):
        raise ValueError(f"ks must be integers of at least 1, found {ks}")
    if not queries.levels or not names:
        raise ValueError("there is nothing to score: expected at least one level")
    levels = list(queries.levels)
    for some in names:
        if not some or len(set(some)) < len(some) or not set(some) <= set(levels):
            raise ValueError(
                f"the combination {some} must have some of the levels {levels}, each once"
            )
    query_side = _side(queries, "queries", levels)
    gallery_side = _gallery_side(queries, gallery, query_side)
    largest = max(len(query_side.labels), 0 if gallery_side is None else len(gallery_side.labels))
    if block_size is None:
        block_size = _BLOCK_SIZE
    if not isinstance(block_size, numbers.Integral) or not 1 <= block_size <= _MAX_BLOCK_SIZE:
        raise ValueError(
            f"block_size must be an integer from 1 to {_MAX_BLOCK_SIZE}, found {block_size}"
        )
    combinations = [tuple(levels.index(level) for level in some) for some in names]
    block_size = int(min(block_size, largest))
    block_size += -block_size % _tiles.BLOCK_MULTIPLE
    return Request(query_side, gallery_side, names, combinations, ks, block_size)


def _gallery_side(queries: Given, gallery: Given, query_side: Side) -> Side | None:
    """Returns the checked gallery, or None where the queries rank each other."""
    if (gallery.levels is None) != (gallery.labels is None):
        raise ValueError("gallery and gallery_labels go together: found one without the other")
    for field in ("ids", "groups"):
        of_queries, of_gallery = getattr(queries, field), getattr(gallery, field)
        if gallery.levels is None and of_gallery is not None:
            raise ValueError(f"gallery_{field} goes with a gallery, and there is none")
        if gallery.levels is not None:
            _checks.check_both_or_none(field, of_queries, of_gallery)
    if gallery.levels is None:
        return None
    if set(gallery.levels) != set(queries.levels or {}):
        raise ValueError(
            f"queries have the levels {list(queries.levels or {})} and gallery "
            f"{list(gallery.levels)}: expected the same"
        )
    side = _side(gallery, "gallery", list(queries.levels or {}))
    for of_queries, of_gallery in zip(query_side.levels, side.levels, strict=True):
        if of_queries.shape[1] != of_gallery.shape[1]:
            raise ValueError(
                f"queries have {of_queries.shape[1]} dimensions and gallery "
                f"{of_gallery.shape[1]}: expected the same"
            )
    return side


def _side(given: Given, name: str, levels: Sequence[str]) -> Side:
    assert given.levels is not None and given.labels is not None
    checked_levels: list[np.ndarray] = []
    labels = np.empty(0)
    for level in levels:
        rows, labels = _checks.labelled_rows(
            f"{name} of level {level}" if level else name,
            given.levels[level],
            f"{given.name}_labels",
            given.labels,
        )
        checked_levels.append(rows)
    ids = _checks.codes(f"{given.name}_ids", given.ids, len(labels))
    groups = _checks.codes(f"{given.name}_groups", given.groups, len(labels))
    return Side(tuple(checked_levels), labels, ids, groups)


def _refuse_copies(queries: Side, gallery: Side | None) -> None:
    """Raises ValueError where all queries would answer themselves in the gallery."""
    known = queries.ids is not None or queries.groups is not None
    if gallery is None or known or not _are_all_in(queries, gallery):
        return
    raise ValueError(
        f"all {len(queries.labels)} queries are in the gallery, as equal rows of the same class, "
        "and would answer themselves: leave the gallery out, and the queries rank each other; or "
        "give query_ids and gallery_ids, and no item answers itself"
    )


def _are_all_in(queries: Side, gallery: Side) -> bool:
    """Whether each query is a bit-equal copy of an item of its class, and most queries differ.

    Where most queries share their rows, as after a collapse or with short codes, equal rows are no
    sign of a copy.
    """
    for of_queries, of_gallery in zip(queries.levels, gallery.levels, strict=True):
        if of_queries.dtype != of_gallery.dtype:
            return False
        if not np.isin(of_queries[:, 0], of_gallery[:, 0]).all():  # almost always
            return False
    distinct = _distinct_rows(queries)
    return 2 * len(distinct) > len(queries.labels) and distinct <= _distinct_rows(gallery)


def _distinct_rows(side: Side) -> set[tuple[int | bytes, ...]]:
    """Returns the distinct pairs of a label and the row's bytes."""
    return {
        (label, *(level[row].tobytes() for level in side.levels))
        for row, label in enumerate(side.labels.tolist())
    }


def score(
    request: Request, progress: Progress | None, state_file: str | os.PathLike[str] | None
) -> tuple[np.ndarray, list[_ranks.Scores]]:
    """Returns the rows of the queries with a match, and for each combination their scores."""
    warn_of_wrong_sums()
    problem = _problem.make_problem(request.queries, request.gallery)
    _refuse_copies(request.queries, request.gallery)
    settings = (_counts.METHOD, request.combinations, request.block_size, _counts.num_devices())
    watch = Watch(problem, settings, progress, state_file)
    rows, scores = _ranks.score(
        problem, request.combinations, request.ks, request.block_size, watch
    )
    if not len(rows):
        reason = "no query's class is in the gallery"
        if request.gallery is None:
            reason = "no class has two images"
        if request.queries.ids is not None or request.queries.groups is not None:
            reason += " that do not leave each other out"
        raise ValueError(f"{reason}: there is nothing to retrieve")
    watch.finished()
    return rows, scores
