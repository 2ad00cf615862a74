"""Eight devices on any machine, before JAX starts, and the real data that some sessions have beside the project."""
import os
import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def emoji():
    from rll_jax import prepared

    return prepared.open_prepared(ROOT / "experiments/data/emoji", keep_index=False)
