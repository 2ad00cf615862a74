"""JAX as the environment sets it: settings that no command can take end in one line, or are unset.

`startup.settle` calls `check` before a command loads anything else that uses JAX.
"""

from collections.abc import Mapping
import os
import re
import resource
import sys
from typing import Any, NoReturn

_USER_ERROR = 2  # as `command.USER_ERROR`, which uses JAX
# Settings that find faults in one's own program. Flax, Optax or the commands do not run with them,
# or for hours; the value is the one that a command takes instead.
_NOT_FOR_COMMANDS: dict[str, Any] = {
    "jax_disable_jit": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
    "jax_transfer_guard": "allow",
    "jax_transfer_guard_host_to_device": "allow",
    "jax_transfer_guard_device_to_host": "allow",
    "jax_transfer_guard_device_to_device": "allow",
}


def check(xla_flags: str) -> None:
    """Imports JAX, and ends the program with one line where the environment does not let it.

    Args:
      xla_flags: XLA_FLAGS as the user gave them.
    """
    try:
        import jax
    except Exception as error:  # ValueError of a setting, ImportError of a package
        _end(f"JAX cannot start{_where(os.environ)}: {error}")
    if xla_flags and (fault := _fault_of_xla_flags()):
        _end(f"XLA_FLAGS={xla_flags}: {fault}")
    for name, value in _NOT_FOR_COMMANDS.items():
        found = getattr(jax.config, name, value)
        if found not in (value, None):
            print(
                f"note: {name.upper()}={found} is for programs of your own; the commands run "
                f"with {value}",
                file=sys.stderr,
            )
            jax.config.update(name, value)


def _where(environment: Mapping[str, str]) -> str:
    """Returns the settings of JAX's that are given, for a message."""
    given = [f"{name}={value}" for name, value in environment.items() if name.startswith("JAX_")]
    return f" with {', '.join(sorted(given))}" if given else ""


def _fault_of_xla_flags() -> str:
    """Returns what XLA says about its flags where they are wrong: it ends the process that asks.

    A forked process asks. JAX is imported by now, and has started no threads.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(writer, 2)
            from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

            xla_client.CompileOptions()  # reads the flags, and starts no device
        except Exception:  # another version of JAX: the run itself will tell
            pass
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as said:
        text = said.read()
    if os.waitpid(child, 0)[1] == 0:
        return ""
    return next(iter(re.findall(r"\.cc:\d+\] (.*)", text)), "not understood by XLA")


def _end(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(_USER_ERROR)
