"""From image files to batches: datasets, decoding, augmentation, samplers, parallel reading.

`README.md` in this folder is the tour. Each module is imported when it is first named.
"""

import importlib
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rll_jax.data import (
        archives,
        array_records,
        benchmarks,
        cache,
        copies,
        files,
        folders,
        image_dataset,
        image_files,
        images,
        listings,
        paths,
        pipeline,
        random_streams,
        sampler,
        views,
    )

__all__ = [
    "archives",
    "array_records",
    "benchmarks",
    "cache",
    "copies",
    "files",
    "folders",
    "image_dataset",
    "image_files",
    "images",
    "listings",
    "paths",
    "pipeline",
    "random_streams",
    "sampler",
    "views",
]


def __getattr__(name: str) -> types.ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
