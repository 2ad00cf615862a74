"""Scores of how well K-means finds the classes: NMI, F1 and AMI."""

from typing import Any
import warnings

import jax
import numpy as np

from rll_jax.metrics import _checks, _vectors

_KMEANS_PLUS_PLUS_UP_TO = 1000  # classes
_MAX_ITERATIONS = 20


def clustering_metrics(
    embeddings: jax.Array | np.ndarray, labels: jax.Array | np.ndarray, *, seed: int = 0
) -> dict[str, float]:
    """Scores how well K-means finds the classes.

    K-means clusters the L2-normalised embeddings into as many clusters as there are classes, by at
    most 20 Lloyd iterations. The initial centres are from K-means++ for up to 1,000 classes. For
    more classes they are random rows: K-means++ alone would take longer than the iterations.
    60,502 embeddings of 512 dimensions in 11,316 classes take a minute on 2 CPU cores.

    Needs scikit-learn.

    Args:
      embeddings: (N, D) floating, finite, no zero vectors.
      labels: (N,) integers.
      seed: the seed of the initial centres. The scores depend on it.

    Returns:
      "nmi": 2 I(clusters; classes) / (H(clusters) + H(classes)), in [0, 1]; 1 where there is one
      cluster and one class.
      "f1": the F1 score, in [0, 1], of the pairs that share a cluster against the pairs that share
      a class (Song et al. 2016); 0 where there is no pair of either kind.
      "ami": the mutual information adjusted for chance (Vinh et al. 2010), at most 1; below 0
      where it is worse than chance.

    Raises:
      ValueError: as `retrieval_metrics`.
      TypeError: as `retrieval_metrics`.
      ImportError: scikit-learn is not installed.
    """
    cluster, exceptions, metrics = _import_sklearn()
    embeddings, labels = _checks.labelled_rows("embeddings", embeddings, "labels", labels)
    num_classes = len(np.unique(labels))
    kmeans = cluster.KMeans(
        num_classes,
        init="k-means++" if num_classes <= _KMEANS_PLUS_PLUS_UP_TO else "random",
        n_init=1,
        max_iter=_MAX_ITERATIONS,
        random_state=seed,
    )
    with warnings.catch_warnings():
        # It warns of fewer distinct points than clusters.
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        clusters = kmeans.fit_predict(_vectors.unit_rows(embeddings))
    confusion = metrics.pair_confusion_matrix(labels, clusters).tolist()
    (_, false_pairs), (missed_pairs, pairs) = confusion
    return {
        "nmi": float(metrics.normalized_mutual_info_score(labels, clusters)),
        "f1": 2 * pairs / max(2 * pairs + false_pairs + missed_pairs, 1),
        "ami": float(metrics.adjusted_mutual_info_score(labels, clusters)),
    }


def _import_sklearn() -> tuple[Any, Any, Any]:
    """Returns `sklearn.cluster`, `.exceptions` and `.metrics`; no other file needs scikit-learn."""
    from sklearn import cluster, exceptions, metrics  # pyright: ignore[reportMissingTypeStubs]

    return cluster, exceptions, metrics
