"""What must be settled before JAX starts: XLA's flags, and the memory's pages.

`experiments/__init__.py` calls `settle`, so that it holds for every command, benchmark and test.
What makes a network of bfloat16 calls `take_bfloat16_products` before it asks JAX for a device.
"""

from collections.abc import Mapping, Sequence
import importlib.metadata
import os
import pathlib
import re
import sys

from experiments.engine import jax_settings, signals
from rll_jax import _jaxlib_fault

_HUGE_PAGES = "glibc.malloc.hugetlb"
_PRODUCTS_FROM = (0, 12)  # of jaxlib; before it nothing lays bfloat16 out for them
_CPU_INFO = pathlib.Path("/proc/cpuinfo")
_KERNELS_CHOICE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def settle() -> None:
    """Turns XLA's YNNPACK fusions off, and has a command take huge pages and sound settings of JAX.

    What the user has set in XLA_FLAGS or GLIBC_TUNABLES stays. A process is started again only as
    `python -m experiments.NAME`, before anything is done, and keeps its number.
    """
    given = re.sub(rf"{_jaxlib_fault.FLAG}\S*", "", os.environ.get("XLA_FLAGS", "")).strip()
    os.environ["XLA_FLAGS"] = xla_flags(os.environ, jaxlib_version())
    if not signals.is_command():
        return
    if _takes_huge_pages():
        tunables = with_huge_pages(os.environ)
        if tunables is not None:
            environment = {**os.environ, "GLIBC_TUNABLES": tunables}
            signals.hold()
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    if not _is_measurement(sys.orig_argv):
        jax_settings.check(given)


def _is_measurement(arguments: Sequence[str]) -> bool:
    """Whether the process may be one that measures another library, and must not hold JAX."""
    return "experiments.engine.measuring" in arguments


def xla_flags(environment: Mapping[str, str], jaxlib: tuple[int, ...]) -> str:
    """Returns XLA_FLAGS with the fusions off, unless they say something about them.

    They are off in versions without the fault too: train steps are slower with them.

    Args:
      environment: the variables of the process.
      jaxlib: the version of jaxlib.
    """
    given = environment.get("XLA_FLAGS", "").strip()
    if given and not given.startswith("--"):  # the name of a file that holds the flags
        return given
    if _jaxlib_fault.FLAG in given or jaxlib >= _jaxlib_fault.FLAG_UNKNOWN_FROM:
        return given
    return f"{given} {_jaxlib_fault.FLAG}".strip()


def take_bfloat16_products(dtype: str) -> None:
    """Has XLA multiply bfloat16 by the CPU's own instructions, where a network computes in it.

    A product takes half of float32's time then. XLA reads the flags when JAX's first device starts:
    a later call changes nothing in this process. Fusions that the user has turned on stay so.

    Args:
      dtype: the network's.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    taken = flags.endswith(_jaxlib_fault.PRODUCTS)
    if dtype != "bfloat16" or taken or _jaxlib_fault.fusions_are_on(flags):
        return
    if jaxlib_version() >= _PRODUCTS_FROM and _multiplies_bfloat16():
        # Of a flag that is there twice, XLA takes the last.
        os.environ["XLA_FLAGS"] = f"{flags} {_jaxlib_fault.FLAG}{_jaxlib_fault.PRODUCTS}"


def _multiplies_bfloat16() -> bool:
    """Returns whether Linux names bfloat16 among the instructions of an x86 CPU."""
    try:
        text = _CPU_INFO.read_text(encoding="ascii", errors="replace")
    except OSError:  # another system
        return False
    return re.search(r"^flags\b.*\b(avx512_bf16|amx_bf16)\b", text, re.MULTILINE) is not None


def jaxlib_version() -> tuple[int, ...]:
    """Returns the numbers of jaxlib's version, without importing it."""
    return _jaxlib_fault.release(importlib.metadata.version("jaxlib"))


def with_huge_pages(environment: Mapping[str, str]) -> str | None:
    """Returns GLIBC_TUNABLES with huge pages, or None if they say something about them.

    A train step takes and returns gigabytes at each call. With pages of 4 KiB, each of them is
    faulted in again at every step, which takes a tenth to a fifth of the step's time.
    """
    given = environment.get("GLIBC_TUNABLES", "")
    if _HUGE_PAGES in given:
        return None
    return ":".join(filter(None, [given, f"{_HUGE_PAGES}=1"]))


def _takes_huge_pages() -> bool:
    """Returns whether the kernel gives huge pages on request, and the C library can request."""
    try:
        on_request = "[madvise]" in _KERNELS_CHOICE.read_text(encoding="ascii")
        version = re.fullmatch(r"glibc (\d+)\.(\d+)", os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (ValueError, OSError):  # another system
        return False
    return on_request and version is not None and (int(version[1]), int(version[2])) >= (2, 35)
