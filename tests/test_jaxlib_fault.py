"""The sums that some versions of jaxlib compute wrong on CPUs, and the warning of them."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

from rll_jax import loss, metrics
from rll_jax._jaxlib_fault import FLAG, PRODUCTS, fusions_are_on, has_fault, warn_of_wrong_sums
from tests.helpers.paths import ROOT

JAXLIB = importlib.metadata.version("jaxlib")
# What a user's process does, and then the smallest programs that are known to go wrong.
PROCESS = """
import json, os, warnings
before = dict(os.environ)
import jax
from rll_jax import loss, metrics
jax.config.update("jax_num_cpu_devices", 2)  # raises an error once a backend has started
assert dict(os.environ) == before

import jax.numpy as jnp
import numpy as np
rng = np.random.default_rng(0)
rows, labels = rng.normal(size=(6, 3)).astype(np.float32), np.arange(6) // 2
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    jax.jit(loss.sup_con_loss)(rows, labels)
    jax.eval_shape(loss.ranked_list_loss, rows, labels)
assert dict(os.environ) == before

def is_wrong(function, *arrays):
    right, actual = function(*arrays), jax.jit(function)(*map(jnp.asarray, arrays))
    return not np.abs(actual - right).max() < 1e-3 * np.abs(right).max()

def of_equal_columns(x):  # the gradient of a sum has such a product
    return ((x @ (0 * x[:, :1, :1] + np.ones((64, 64), np.float32))) * x).sum(axis=2)

def of_narrow_rows(x, y):  # jax#39103
    return ((x @ y.T) ** 2).sum(axis=0)

numbers = [rng.normal(size=size).astype(np.float32) for size in ((4, 64, 64), (3, 3), (40_000, 3))]
wrong = [is_wrong(of_equal_columns, numbers[0]), is_wrong(of_narrow_rows, *numbers[1:])]
print(json.dumps([[str(warning.message) for warning in caught], wrong]))
"""


def in_a_process(xla_flags):
    """The warnings of our functions, and which of the two sums are wrong."""
    environment = os.environ | {"XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [sys.executable, "-c", PROCESS], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.skipif(not has_fault(JAXLIB), reason=f"jaxlib {JAXLIB} has no fault to show")
def test_the_fault_is_there_and_one_line_warns_of_it():
    warned, wrong = in_a_process("")
    assert len(warned) == 1 and JAXLIB in warned[0] and FLAG in warned[0]
    assert "\n" not in warned[0]
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"the fault was seen on x86-64 alone, this is {platform.machine()}")
    # Where this fails, a jaxlib is right at last, and `has_fault` must end before it.
    assert wrong == [True, JAXLIB == "0.10.2"]


@pytest.mark.parametrize("value", ["", PRODUCTS])
def test_without_the_fusions_all_is_right_and_nothing_warns(value):
    xla_flags = FLAG + value if has_fault(JAXLIB) else ""
    assert in_a_process(xla_flags) == [[], [False, False]]


ROWS, LABELS = np.eye(4, dtype=np.float32), np.arange(4) // 2
USES = [
    lambda: jax.eval_shape(loss.ranked_list_loss, ROWS, LABELS),
    lambda: jax.eval_shape(loss.ranked_list_loss_of_query, ROWS[0], 0, ROWS[1:], LABELS[1:]),
    lambda: jax.eval_shape(loss.n_pair_loss, ROWS, LABELS),
    lambda: metrics.retrieval_metrics(ROWS, LABELS, ks=(1,)),
]


def is_warned_of(use, monkeypatch, version="0.10.2", xla_flags="", backend="cpu"):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    monkeypatch.setenv("XLA_FLAGS", xla_flags)  # nobody reads it any more but the warning
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    warn_of_wrong_sums.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use()
        use()
    warn_of_wrong_sums.cache_clear()
    return [f"jaxlib {version} computes" in str(warning.message) for warning in caught]


@pytest.mark.parametrize("use", USES)
def test_either_room_warns_once(use, monkeypatch):
    assert is_warned_of(use, monkeypatch) == [True]


def test_what_is_right_or_not_of_jax_is_not_warned_of(monkeypatch):
    assert is_warned_of(USES[0], monkeypatch, version="0.10.1") == []
    assert is_warned_of(USES[0], monkeypatch, xla_flags=FLAG) == []
    assert is_warned_of(USES[0], monkeypatch, backend="gpu") == []
    assert is_warned_of(lambda: metrics.nearest(ROWS, ROWS, 1), monkeypatch) == []


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.9.2", False),
        ("0.10.0", False),
        ("0.10.1", False),
        ("0.10.2", True),
        ("0.10.2.dev20260601", True),
        ("0.11.0", True),
        ("0.11.2+local", True),
        ("0.12", True),
        ("0.12.0.1", True),
        ("built here", False),
    ],
)
def test_versions_with_the_fault(version, expected):
    assert has_fault(version) == expected


@pytest.mark.parametrize(
    ("xla_flags", "expected"),
    [
        ("", True),
        ("--xla_backend_optimization_level=0", True),
        (FLAG, False),
        (f"--xla_backend_optimization_level=0 {FLAG} --xla_dump_to=x", False),
        (f'{FLAG}""', False),
        (f"{FLAG}dot", True),
        (f"{FLAG}{PRODUCTS}", False),
        (f"{FLAG}{PRODUCTS},dot", True),
        (f"{FLAG}dot {FLAG}", False),  # the last one counts
        (f"{FLAG} {FLAG}dot", True),
    ],
)
def test_flags_that_turn_the_fusions_off(xla_flags, expected):
    assert fusions_are_on(xla_flags) == expected
