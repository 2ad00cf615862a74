"""Eight devices on any machine, before JAX starts, and programs compiled once for all tests."""

import os
import tempfile

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

if "RLL_TESTS_COMPILED" not in os.environ:  # the workers of a parallel run inherit it
    _COMPILED = tempfile.TemporaryDirectory()
    os.environ["RLL_TESTS_COMPILED"] = _COMPILED.name

from tests.helpers.commands import PICTURES  # noqa: E402 (reads the variable above)
from tests.helpers.paths import ROOT  # noqa: E402

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
