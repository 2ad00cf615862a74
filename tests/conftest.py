"""Eight devices on any machine, before JAX starts, and programs that are kept from run to run."""

import os
import tempfile

import jax
import numpy as np
import pytest

from tests.helpers.commands import PICTURES
from tests.helpers.paths import ROOT

# Most of the tests' time is XLA's compiler. Commands that are killed leave damaged programs:
# theirs are kept for this run alone, and the workers of a parallel run inherit the folder.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if "PYTEST_XDIST_WORKER" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name

# A worker takes a whole file: the longest go first, so that none is left to one worker at the end.
LONGEST = (
    "resume",
    "commands",
    "datasets",
    "multihost",
    "experiments",
    "baselines",
    "train",
    "tour",
    "gradient_question",
    "steps",
)


@pytest.fixture(scope="session")
def emoji():
    from rll_jax.data import array_records

    return array_records.open_dataset(ROOT / "experiments/data/emoji", keep_index=False)


@pytest.fixture(scope="session")
def pictures(emoji):
    """The first twenty classes of the emoji as a folder."""
    data = emoji["train"]
    for row in np.flatnonzero(data.labels <= 40):
        path = PICTURES / f"class {data.labels[row]}/{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.image_bytes(row))


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
