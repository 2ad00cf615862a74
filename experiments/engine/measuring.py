"""What the benchmarks share: one process for each measurement, memory, timing, tables, the machine.

`python -m experiments.engine.measuring MODULE JSON` is internal: `in_own_process` runs it.
"""

from collections.abc import Callable, Collection, Sequence
import importlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

from absl import app, flags


def memory_mib(field: str = "VmRSS") -> float | None:
    """Returns the memory of this process in MiB.

    Args:
      field: "VmRSS" for the memory held now, "VmHWM" for the most that was held.

    Returns:
      MiB, or None on a system without /proc.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))
    except OSError:
        return None


def restart_peak_memory() -> None:
    """Makes `memory_mib("VmHWM")` count from now on. Does nothing on a system without /proc."""
    if memory_mib() is not None:
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def seconds_of(call: Callable[[], object]) -> float:
    """Calls a function and returns the wall-clock seconds that it took."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_own_process(module: str, **arguments: Any) -> dict[str, Any] | None:
    """Calls `module.measure(**arguments)` in a process of its own.

    The process imports the module, not the command's flags: arguments are all that it gets.

    Args:
      module: the full name of a module.
      **arguments: what JSON can hold.

    Returns:
      What `measure` returned, through JSON; None where a package that it needs is not installed.

    Raises:
      RuntimeError: the process failed. The message holds its stderr.
    """
    command = [sys.executable, "-m", "experiments.engine.measuring", module, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure_here(module: str, arguments: str) -> None:
    """Prints what `module.measure` returns as one line of JSON, null if a package is missing."""
    flags.FLAGS.mark_as_parsed()  # grain refuses worker processes before that
    try:
        measured = importlib.import_module(module).measure(**json.loads(arguments))
    except ModuleNotFoundError:
        measured = None
    print(json.dumps(measured))


def run_command(main: Callable[[], None]) -> None:
    """Runs a benchmark as a command, with absl's flags and no other arguments.

    A user's mistake (ValueError, OSError, a wrong flag) ends in one line on stderr and exit code 2.
    """
    # Not at the top: this loads JAX, and a process that measures another library must not hold it.
    from experiments.engine import command

    def run(_: Sequence[str]) -> None:
        with command.user_errors():
            main()

    app.run(run, flags_parser=command.parse_flags)


def integers(flag: flags.FlagHolder[list[str]], multiple_of: int = 1) -> list[int]:
    """Returns the numbers of a flag that lists them.

    Raises:
      ValueError: a number is not a positive multiple of `multiple_of`.
    """
    for text in flag.value:
        if not text.isdecimal() or int(text) < 1 or int(text) % multiple_of:
            kind = "integers from 1" if multiple_of == 1 else f"multiples of {multiple_of}"
            raise ValueError(
                f"--{flag.name}={','.join(flag.value)}: found {text!r}, expected {kind} with "
                "commas between"
            )
    return [int(text) for text in flag.value]


def choices(flag: flags.FlagHolder[list[str]], allowed: Collection[str]) -> list[str]:
    """Returns the names of a flag that lists them.

    Raises:
      ValueError: a name is none of those allowed.
    """
    for name in flag.value:
        if name not in allowed:
            raise ValueError(
                f"--{flag.name}={','.join(flag.value)}: found {name!r}, expected some of "
                f"{', '.join(allowed)}, with commas between"
            )
    return flag.value


def check_outputs(*outputs: flags.FlagHolder[str]) -> None:
    """Checks before the measurements that the files to write are absent and their folders exist.

    Raises:
      ValueError: a file exists, or its folder does not. Empty flags are not checked.
    """
    from experiments.engine import command  # see `run_command`

    for flag in outputs:
        if flag.value:
            command.check_free(flag.name, pathlib.Path(flag.value))


def tell(text: str) -> None:
    """Prints a line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_and_write(text: str, path: str) -> None:
    """Prints a table with its heading, and writes the same text into a file unless `path` is ""."""
    print(text, end="")
    if path:
        pathlib.Path(path).write_text(text, encoding="utf-8")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table in Markdown, without a newline at its end."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def machine() -> str:
    """Returns the device, the processor, jax's version and the date, for a table's heading."""
    import jax

    kind = jax.devices()[0].device_kind
    return (
        f"{kind} ({platform.machine()}, {os.cpu_count()} cores), jax {jax.__version__}, "
        f"{time.strftime('%F')}"
    )


if __name__ == "__main__":
    _measure_here(*sys.argv[1:])
