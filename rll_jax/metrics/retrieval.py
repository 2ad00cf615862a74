"""Retrieval scores from embeddings and labels: arrays in, a dict of floats out.

The scores follow from the ranks of each query's positives, and `rll_jax.metrics._ranks` finds these
ranks with blocks of a matrix product, comparisons and counts. It does not sort the gallery.
"""

from collections.abc import Iterable, Mapping, Sequence
import itertools
import os

import jax
import numpy as np
import numpy.typing as npt

from rll_jax.metrics import _request, _scores
from rll_jax.metrics._progress import Progress

_Rows = jax.Array | np.ndarray


def retrieval_metrics(
    queries: _Rows,
    query_labels: _Rows,
    gallery: _Rows | None = None,
    gallery_labels: _Rows | None = None,
    *,
    query_ids: npt.ArrayLike | None = None,
    gallery_ids: npt.ArrayLike | None = None,
    query_groups: npt.ArrayLike | None = None,
    gallery_groups: npt.ArrayLike | None = None,
    ks: Iterable[int] = (1, 10, 100, 1000),
    block_size: int | None = None,
    progress: Progress | None = None,
    state_file: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Scores how well queries rank a gallery by cosine similarity.

    Ties count against the query: an item of another class that is exactly as similar as an item of
    the query's class is ranked before it. Similarities are compared in float64 and are equal where
    they agree to 1e-13. "mrr" is exact to 1e-6, all other scores are exact. The scores depend
    neither on the block size nor on the devices, which share the work.

    A query with more than 64 positives costs a float32 product with the gallery on the CPU. A query
    where most similarities tie, as those of a collapsed network do, costs a float64 product:
    minutes for 60,000 of them.

    **Who may answer whom.** An item never answers itself: without a gallery each query leaves
    itself out, and with `query_ids` and `gallery_ids` it leaves out the items of its own id. A
    query also leaves out the items of its own group: the same camera, sequence or product shot. An
    item that is left out is neither a positive nor a negative: it has no rank, and R does not count
    it.

    Re-identification (Zheng et al. 2015, Market-1501) leaves out less: the items of the same person
    *and* the same camera, and ranks other persons of the same camera. A group for each pair of
    person and camera says that:

        _, groups = np.unique(np.stack([labels, cameras]), axis=1, return_inverse=True)
        retrieval_metrics(queries, labels[is_query], gallery, labels[~is_query],
                          query_groups=groups[is_query], gallery_groups=groups[~is_query])

    Groups of cameras alone leave out everything that the query's camera took. Near-copies of an
    image are a group too.

    Args:
      queries: (Q, D) floating, finite, no zero vectors. They may have any length: the function
        normalises them. They may be a file's (`np.load(..., mmap_mode="r")`): of float32 or
        float64, it is read in parts.
      query_labels: (Q,) integers.
      gallery: (N, D) as the queries, or None: the queries rank each other, and each query leaves
        itself out (Song et al. 2016).
      gallery_labels: (N,) integers. A gallery needs them.
      query_ids: (Q,) integers or text: which item each query is. With a gallery, it needs
        `gallery_ids` too. None: the queries are other items than the gallery's.
      gallery_ids: (N,) as `query_ids`.
      query_groups: (Q,) integers or text. With a gallery, it needs `gallery_groups` too. None: no
        groups.
      gallery_groups: (N,) as `query_groups`.
      ks: the K of Recall@K, at least one. A K larger than the gallery asks for all of it.
      block_size: the rows and columns of a block of similarities, from 1 to 32768, rounded up to
        a multiple of 64. None means 1024. Each device needs memory for one block and two copies of
        the embeddings. The process needs about 80 bytes for each query and each item of the
        largest class, of which at most 64 count.
      progress: called about twice a second with what is done (a stage's name), how much of it,
        and of how much. Ctrl-C is heard as often.
      state_file: a file that keeps the counts so far, about every minute and when the function is
        interrupted. The same call with the same file goes on from there. It is removed at the end.
        None: no file.

    Returns:
      The scores, each in [0, 1] and a mean over the queries that have a match in the gallery. A
      match is an item of the query's class that the query does not leave out, and R is their
      number.
      "recall@K", for each K: the share of queries with a match among the K nearest.
      "r_precision": the share of the R nearest items that are of the query's class.
      "map@r": the mean over the ranks 1 to R of the precision at that rank, taken as 0 where the
      item is of another class. (Both: Musgrave et al. 2020, "A Metric Learning Reality Check".)
      "mrr": the mean of 1 / (rank of the nearest match).
      And "queries_without_match": the number of queries without a match in the gallery. They have
      no part in the scores.

    Raises:
      ValueError: lengths or dimensions differ, rows are not finite or zero (the message says
        which), the gallery is empty, no query has a match, only one of two arguments that go
        together is there, or a K or block_size is out of range. Also where all queries are in the
        gallery, as bit-equal rows of their class, and neither ids nor groups are given: each would
        answer itself. (Rows that most queries share are no copies: a collapsed network has such.)
        Also where `state_file` is of another call.
      TypeError: embeddings are not floating, labels are not integers, ids or groups are neither
        integers nor text, or no type holds those of both queries and gallery.
    """
    by_query = scores_by_query(
        queries,
        query_labels,
        gallery,
        gallery_labels,
        query_ids=query_ids,
        gallery_ids=gallery_ids,
        query_groups=query_groups,
        gallery_groups=gallery_groups,
        ks=(ks := tuple(ks)),
        block_size=block_size,
        progress=progress,
        state_file=state_file,
    )
    return mean_scores(by_query, len(queries), ks=ks)


def scores_by_query(
    queries: _Rows,
    query_labels: _Rows,
    gallery: _Rows | None = None,
    gallery_labels: _Rows | None = None,
    *,
    query_ids: npt.ArrayLike | None = None,
    gallery_ids: npt.ArrayLike | None = None,
    query_groups: npt.ArrayLike | None = None,
    gallery_groups: npt.ArrayLike | None = None,
    ks: Iterable[int] = (1,),
    block_size: int | None = None,
    progress: Progress | None = None,
    state_file: str | os.PathLike[str] | None = None,
) -> dict[str, np.ndarray]:
    """Returns the values whose means `retrieval_metrics` returns, one for each query.

    Arguments and errors are those of `retrieval_metrics`.

    Returns:
      Arrays over the M queries that have a match in the gallery. "query": (M,) their rows in
      `queries`. "first_rank": (M,) the rank of the nearest match, from 1; its reciprocal is exact
      to 1e-6, and whether it is at most K is exact for each K of `ks`. "r_precision" and
      "average_precision": (M,), the mean of the latter is "map@r".
    """
    by_levels = level_scores_by_query(
        {"": queries},
        query_labels,
        None if gallery is None else {"": gallery},
        gallery_labels,
        query_ids=query_ids,
        gallery_ids=gallery_ids,
        query_groups=query_groups,
        gallery_groups=gallery_groups,
        ks=ks,
        block_size=block_size,
        progress=progress,
        state_file=state_file,
    )
    return by_levels[""]


def level_scores_by_query(
    queries: Mapping[str, _Rows],
    query_labels: _Rows,
    gallery: Mapping[str, _Rows] | None = None,
    gallery_labels: _Rows | None = None,
    *,
    combinations: Iterable[Sequence[str]] | None = None,
    query_ids: npt.ArrayLike | None = None,
    gallery_ids: npt.ArrayLike | None = None,
    query_groups: npt.ArrayLike | None = None,
    gallery_groups: npt.ArrayLike | None = None,
    ks: Iterable[int] = (1,),
    block_size: int | None = None,
    progress: Progress | None = None,
    state_file: str | os.PathLike[str] | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Scores combinations of several embeddings of the same items, in one pass over each.

    Each level is an embedding. A combination is the concatenation of its levels, each normalised:
    the cosine of two concatenations is the mean of their levels' cosines. So the levels' own
    products rank all combinations: three products for the seven combinations of three levels, where
    one after the other takes twelve of the same size. The ranks are those of the concatenations in
    float64, with the guarantees of `retrieval_metrics`.

    Args:
      queries: {level: (Q, D)}; D may differ from level to level.
      query_labels: (Q,) integers.
      gallery: {level: (N, D)} with the levels of `queries`, or None.
      gallery_labels: (N,) integers.
      combinations: the levels of each. None: each level, each pair, and so on to all levels.
      query_ids: this and the others as in `retrieval_metrics`.
      gallery_ids: as above.
      query_groups: as above.
      gallery_groups: as above.
      ks: as above.
      block_size: as above. A device needs memory for a block of each level.
      progress: as above.
      state_file: as above.

    Returns:
      {"L": ..., "L,M": ...}: what `scores_by_query` returns, for each combination, named by its
      levels with commas between.

    Raises:
      ValueError: as `retrieval_metrics`; there is no level, the gallery has others, or a
        combination is empty, has a level twice, or one that is not there.
      TypeError: as `retrieval_metrics`.
    """
    if combinations is None:
        sizes = range(1, len(queries) + 1)
        combinations = [some for n in sizes for some in itertools.combinations(queries, n)]
    request = _request.checked(
        _request.Given(queries, query_labels, query_ids, query_groups, "query"),
        _request.Given(gallery, gallery_labels, gallery_ids, gallery_groups, "gallery"),
        [tuple(some) for some in combinations],
        tuple(ks),
        block_size,
    )
    rows, scores = _request.score(request, progress, state_file)
    return {
        ",".join(names): {"query": rows} | part._asdict()
        for names, part in zip(request.names, scores, strict=True)
    }


def mean_scores(
    by_query: Mapping[str, np.ndarray],
    num_queries: int,
    *,
    ks: Iterable[int] = (1, 10, 100, 1000),
) -> dict[str, float]:
    """Returns the scores of `retrieval_metrics` from those of each query.

    Args:
      by_query: of `scores_by_query`, with the same `ks`.
      num_queries: Q, the number of all queries.
      ks: the K of Recall@K.
    """
    scores = {name: float(values.mean()) for name, values in _scores.by_name(by_query, ks).items()}
    return scores | {"queries_without_match": num_queries - len(by_query["first_rank"])}
