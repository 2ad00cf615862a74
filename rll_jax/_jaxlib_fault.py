"""Which versions of jaxlib compute wrong sums on CPUs, how to have right ones, and a warning.

From 0.10.2 on, XLA on the CPU gives a product of matrices, and the sum that follows it, to YNNPACK
as one fusion. Some of these fusions return wrong numbers in silence (jax#39103 is one kind). With
`FLAG` in XLA_FLAGS there are no such fusions, and the sums are right.

This file imports no jax, so that a program can ask it before jax starts.
"""

import functools
import importlib.metadata
import os
import re
import warnings

FLAG = "--xla_cpu_experimental_ynn_fusion_type="
# With this value YNNPACK has products alone, without what follows them. The known wrong sums are
# right with it.
PRODUCTS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"

# Each version from here on to 0.12.0.1 returns wrong sums; 0.10.1 does not. A test fails once an
# installed version is right, and the last wrong version belongs here then.
_FIRST_WITH_FAULT = (0, 10, 2)
# XLA ends a program that sets a flag which it does not know, as versions from here on may not.
FLAG_UNKNOWN_FROM = (0, 13)


def has_fault(version: str) -> bool:
    """Returns whether a version of jaxlib computes some sums wrong on CPUs.

    Args:
      version: such as "0.10.2" or "0.12.0.dev20260601". What does not begin with numbers is taken
        for a version without the fault.
    """
    return release(version) >= _FIRST_WITH_FAULT


def release(version: str) -> tuple[int, ...]:
    """Returns the numbers that a version begins with: (0, 12, 0) of "0.12.0.dev1"."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()


def fusions_are_on(xla_flags: str) -> bool:
    """Returns whether XLA makes fusions that may be wrong, which it does unless it is told not to.

    Args:
      xla_flags: the value of XLA_FLAGS. Of a flag that is there twice, XLA takes the last.
    """
    values = re.findall(rf"(?:^|\s){re.escape(FLAG)}(\S*)", xla_flags)
    return not values or values[-1].strip("'\"") not in ("", PRODUCTS)


@functools.cache
def warn_of_wrong_sums() -> None:
    """Warns, once in a process, where the installed jaxlib may compute wrong sums on this CPU.

    A later call does nothing. The first call starts jax's backend. It reads XLA_FLAGS as it is
    then, and XLA has read it when the backend started.
    """
    version = importlib.metadata.version("jaxlib")
    if not has_fault(version) or not fusions_are_on(os.environ.get("XLA_FLAGS", "")):
        return
    import jax

    if jax.default_backend() != "cpu":
        return
    warnings.warn(
        f"jaxlib {version} computes some sums wrong on CPUs: set XLA_FLAGS={FLAG} before jax "
        "starts, or install jaxlib 0.10.1",
        RuntimeWarning,
        stacklevel=3,
    )
