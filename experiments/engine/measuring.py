"""What the benchmarks share: memory, the machine's name, and a process of its own for each measurement."""

import json
import os
import platform
import subprocess
import sys
import time


def memory_mib(field: str = "VmRSS") -> float | None:
    """Of this process: "VmRSS" now, "VmHWM" at most; None where there is no /proc."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))
    except OSError:
        return None


def in_own_process(module: str, *flags: str) -> dict | None:
    """The JSON on the last line that `python -m module *flags` prints; None where a package that it needs is missing.

    Raises:
      RuntimeError: it failed otherwise; its words are in the message.
    """
    command = [sys.executable, "-m", module, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    missing = done.stderr.strip().split("\n")[-1].startswith("ModuleNotFoundError")
    if done.returncode and not missing:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def machine() -> str:
    import jax

    kind = jax.devices()[0].device_kind
    return f"{kind} ({platform.machine()}, {os.cpu_count()} cores), jax {jax.__version__}, {time.strftime('%F')}"
