"""What is settled before JAX starts: by a command the environment, by the library nothing."""

import json
import os
import subprocess
import sys

import pytest

from experiments.engine import startup
from tests.helpers.paths import ROOT

OFF = "--xla_cpu_experimental_ynn_fusion_type="
PROBE = """
import os
def measure():
    return {name: os.environ.get(name) for name in ("XLA_FLAGS", "GLIBC_TUNABLES")}
"""


@pytest.mark.parametrize(
    "given, expected",
    [
        ("", OFF),
        ("--xla_a=1", f"--xla_a=1 {OFF}"),
        (f"{OFF}1 --xla_a=1", f"{OFF}1 --xla_a=1"),
        ("/a/file", "/a/file"),
    ],
)
def test_flags_of_the_user_stay(given, expected):
    assert startup.xla_flags({"XLA_FLAGS": given}, (0, 12)) == expected
    assert startup.xla_flags({"XLA_FLAGS": given}, (0, 13)) == given  # may not know the flag


@pytest.mark.parametrize(
    "given, expected",
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", None),
    ],
)
def test_tunables_of_the_user_stay(given, expected):
    assert startup.with_huge_pages({"GLIBC_TUNABLES": given}) == expected


def environment_of(tmp_path, *command, **variables):
    """The variables of a process that imports `experiments`."""
    (tmp_path / "probe.py").write_text(PROBE)
    names = ("XLA_FLAGS", "GLIBC_TUNABLES")
    given = {name: value for name, value in os.environ.items() if name not in names}
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    done = subprocess.run(
        [sys.executable, *command], env={**given, "PYTHONPATH": path, **variables},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_a_command_has_no_fusions_and_huge_pages(tmp_path):
    command = ("-m", "experiments.engine.measuring", "probe", "{}")
    found = environment_of(tmp_path, *command, XLA_FLAGS="--xla_a=1")
    assert found["XLA_FLAGS"] == f"--xla_a=1 {OFF}"
    if startup._takes_huge_pages():
        assert found["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


def test_an_import_starts_nothing_again_and_the_library_sets_nothing(tmp_path):
    show = "import json, probe; print(json.dumps(probe.measure()))"
    found = environment_of(tmp_path, "-c", f"import experiments; {show}")
    assert found == {"XLA_FLAGS": OFF, "GLIBC_TUNABLES": None}
    found = environment_of(tmp_path, "-c", f"import rll_jax.loss, rll_jax.networks; {show}")
    assert found == {"XLA_FLAGS": None, "GLIBC_TUNABLES": None}
