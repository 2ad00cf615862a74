"""What is settled before JAX starts: by a command the environment, by the library nothing."""

import json
import os
import subprocess
import sys

import pytest

from experiments.engine import startup
from tests.helpers.paths import ROOT

OFF = "--xla_cpu_experimental_ynn_fusion_type="
PRODUCTS = f"{OFF}LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
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


@pytest.mark.parametrize(
    "dtype, given, jaxlib, instructions, expected",
    [
        ("bfloat16", OFF, (0, 12), "avx512f avx512_bf16 amx", f"{OFF} {PRODUCTS}"),
        ("bfloat16", f"--xla_a=1 {OFF}", (0, 12, 1), "amx_bf16", f"--xla_a=1 {OFF} {PRODUCTS}"),
        ("bfloat16", f"{OFF}DOT", (0, 12), "avx512_bf16", f"{OFF}DOT"),  # the user's
        ("bfloat16", "/a/file", (0, 12), "avx512_bf16", "/a/file"),
        ("bfloat16", OFF, (0, 11, 2), "avx512_bf16", OFF),
        ("bfloat16", OFF, (0, 12), "avx512f", OFF),
        ("float32", OFF, (0, 12), "avx512_bf16", OFF),
    ],
)
def test_bfloat16_has_the_products_of_the_cpu(
    dtype, given, jaxlib, instructions, expected, monkeypatch, tmp_path
):
    (tmp_path / "cpuinfo").write_text(f"processor: 0\nflags\t\t: fpu {instructions}\nbugs: bf16\n")
    monkeypatch.setattr(startup, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(startup, "jaxlib_version", lambda: jaxlib)
    monkeypatch.setenv("XLA_FLAGS", given)
    startup.take_bfloat16_products(dtype)
    startup.take_bfloat16_products(dtype)
    assert os.environ["XLA_FLAGS"] == expected


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


@pytest.mark.parametrize(
    "variables, text",
    [
        ({"XLA_FLAGS": "--xla_foo=1"}, "XLA_FLAGS=--xla_foo=1: Unknown flag in XLA_FLAGS"),
        ({"XLA_FLAGS": "--xla_cpu_use_thunk_runtime=no way"}, "Couldn't interpret value no"),
        ({"XLA_FLAGS": "xla_foo"}, 'Could not open file "xla_foo"'),
        ({"JAX_NUMPY_RANK_PROMOTION": "bad"}, "JAX_NUMPY_RANK_PROMOTION=bad: Invalid value"),
        ({"JAX_ENABLE_X64": "maybe"}, "JAX cannot start with JAX_ENABLE_X64=maybe"),
        ({"JAX_PLATFORMS": "cuda"}, "JAX finds no devices with JAX_PLATFORMS=cuda"),
        ({"JAX_PLATFORMS": "foo"}, "'foo' is not in the list of known backends"),
        ({"JAX_NUM_CPU_DEVICES": "0"}, "JAX_NUM_CPU_DEVICES=0"),
    ],
)
def test_settings_of_jax_that_cannot_be_are_one_line(variables, text, tmp_path):
    (tmp_path / "flags.txt").write_text("--dataset=emoji\n")  # a run whose devices are looked for
    named = {name: os.environ[name] for name in os.environ if not name.startswith(("JAX", "XLA"))}
    ended = subprocess.run(
        [sys.executable, "-m", "experiments.evaluate", f"--workdir={tmp_path}"], cwd=ROOT,
        env=named | variables, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert text in ended.stderr


def test_settings_for_other_programs_are_not_taken(tmp_path):
    code = """
import json, os, sys
from experiments.engine import jax_settings
jax_settings.check("")
import jax
print(json.dumps([jax.config.jax_disable_jit, jax.config.jax_numpy_dtype_promotion]))
"""
    given = {"JAX_DISABLE_JIT": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | given | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert json.loads(ended.stdout) == [False, "standard"]
    assert [line.split()[1] for line in ended.stderr.splitlines()] == [
        "JAX_DISABLE_JIT=True",
        "JAX_NUMPY_DTYPE_PROMOTION=strict",
    ]


def test_an_import_starts_nothing_again_and_the_library_sets_nothing(tmp_path):
    show = "import json, probe; print(json.dumps(probe.measure()))"
    found = environment_of(tmp_path, "-c", f"import experiments; {show}")
    assert found == {"XLA_FLAGS": OFF, "GLIBC_TUNABLES": None}
    found = environment_of(tmp_path, "-c", f"import rll_jax.loss, rll_jax.networks; {show}")
    assert found == {"XLA_FLAGS": None, "GLIBC_TUNABLES": None}
