"""Eight devices on any machine, before JAX starts, and the real data that some sessions have beside the project."""
import os
import pathlib
import tempfile

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers' too
    _COMPILED = tempfile.TemporaryDirectory()
    os.environ["RLL_TESTS_COMPILED"] = _COMPILED.name

# a worker takes a whole file: the longest go first, so that none is left to one worker at the end
LONGEST = ("survival", "commands", "sources", "multihost", "experiments", "losses_baseline", "train", "tour", "gradient_question", "step")

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def emoji():
    from rll_jax import prepared

    return prepared.open_prepared(ROOT / "experiments/data/emoji", keep_index=False)


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
