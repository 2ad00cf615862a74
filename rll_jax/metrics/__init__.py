"""Retrieval and clustering scores: embeddings and labels in, a dict of floats out."""

from rll_jax.metrics.clustering import clustering_metrics
from rll_jax.metrics.intervals import Interval, confidence_intervals
from rll_jax.metrics.nearest_items import nearest
from rll_jax.metrics.retrieval import (
    level_scores_by_query,
    mean_scores,
    retrieval_metrics,
    scores_by_query,
)

__all__ = [
    "Interval",
    "clustering_metrics",
    "confidence_intervals",
    "level_scores_by_query",
    "mean_scores",
    "nearest",
    "retrieval_metrics",
    "scores_by_query",
]
