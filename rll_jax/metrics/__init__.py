"""Retrieval and clustering scores: embeddings and labels in, a dict of floats out."""

from rll_jax.metrics.clustering import clustering_metrics
from rll_jax.metrics.retrieval import nearest, retrieval_metrics, scores_by_query

__all__ = ["clustering_metrics", "nearest", "retrieval_metrics", "scores_by_query"]
