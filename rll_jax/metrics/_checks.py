"""Checks of the embeddings and labels that scores are computed from."""

import jax
import numpy as np


def labelled_rows(name, x, labels_name, labels):
    x, labels = np.asarray(x), np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{labels_name} must be integers, found {labels.dtype}")
    if x.ndim != 2 or labels.shape != x.shape[:1]:
        raise ValueError(
            f"{name} must be (N, D) and {labels_name} (N,), found {x.shape} and {labels.shape}"
        )
    return embedding_rows(name, x), labels


def embedding_rows(name, x):
    x = np.asarray(x)
    if not jax.numpy.issubdtype(x.dtype, np.floating):  # numpy's own does not know bfloat16
        raise TypeError(f"{name} must be floating, found {x.dtype}")
    if x.ndim != 2 or not x.size:
        raise ValueError(f"{name} must be (N, D) and not empty, found shape {x.shape}")
    x = (
        x
        if x.dtype.itemsize in (4, 8)
        else x.astype(np.float32 if x.dtype.itemsize < 4 else np.float64)
    )
    for what, bad in (
        ("not finite", ~np.isfinite(x).all(axis=1)),
        ("zero vectors", ~x.any(axis=1)),
    ):
        if bad.any():
            at = np.flatnonzero(bad)
            raise ValueError(
                f"{len(at)} of {len(x)} rows of {name} are {what}, the first: {at[:10].tolist()}"
            )
    return x
