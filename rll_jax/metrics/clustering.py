"""How well K-means finds the classes: NMI, F1 and AMI."""

import warnings

import numpy as np

from rll_jax.metrics import _checks, _ranks

_KMEANS_PLUS_PLUS_UP_TO = 1000


def clustering_metrics(embeddings, labels, *, seed=0) -> dict[str, float]:
    """How well K-means on the L2-normalised embeddings, with as many clusters as classes, finds the classes.

    Needs scikit-learn. K-means is its Lloyd iteration, at most 20, from K-means++ centres for up to 1,000 classes and from
    random rows above, where K-means++ alone would take longer than the iterations. The result depends on `seed`. 11,316 classes of
    60,502 x 512 take a minute on 2 CPU cores.

    Args:
      embeddings: (N, D) floating, finite, no zero vectors.
      labels: (N,) integers.
      seed: of the initial centres.

    Returns:
      "nmi": 2 I(clusters; classes) / (H(clusters) + H(classes)), 1 where both have one group. "f1": of the pairs of one
      cluster against the pairs of one class (Song et al. 2016), 0 where neither has a pair. "ami": mutual information
      adjusted for chance (Vinh et al. 2010), below 0 where it is worse than chance. The others are in [0, 1].

    Raises:
      ValueError, TypeError: as `retrieval_metrics`.
      ImportError: scikit-learn is not installed.
    """
    from sklearn import cluster, exceptions, metrics  # a dependency of this function alone

    embeddings, labels = _checks.labelled_rows("embeddings", embeddings, "labels", labels)
    classes = len(np.unique(labels))
    init = "k-means++" if classes <= _KMEANS_PLUS_PLUS_UP_TO else "random"
    kmeans = cluster.KMeans(classes, init=init, n_init=1, max_iter=20, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", exceptions.ConvergenceWarning
        )  # fewer distinct points than clusters
        clusters = kmeans.fit_predict(_ranks.unit_rows(embeddings))
    (_, false_pairs), (missed_pairs, pairs) = metrics.pair_confusion_matrix(
        labels, clusters
    ).tolist()
    return {
        "nmi": float(metrics.normalized_mutual_info_score(labels, clusters)),
        "f1": 2 * pairs / max(2 * pairs + false_pairs + missed_pairs, 1),
        "ami": float(metrics.adjusted_mutual_info_score(labels, clusters)),
    }
