"""The folder of a run: its lock, and the files written before the first step."""

import contextlib
import json

import jax
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from experiments.engine import checks, environment, options, processes
from experiments.engine.checks import CheckedRun
from experiments.engine.errors import RunError
from rll_jax.data import files, paths


def claim(stack: contextlib.ExitStack, checked: CheckedRun) -> None:
    """Locks the workdir until the stack closes; writes flags.txt, data.json, environment.json.

    Raises:
      RunError: another run has the workdir.
    """
    workdir = checked.workdir
    if processes.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(files.exclusive_lock(workdir / ".lock", wait=False))
        except BlockingIOError:
            raise RunError(
                f"--workdir={workdir} is in use by another run: let it end, or choose another "
                "--workdir"
            ) from None
        # The flags come first: after a kill, a folder without them would look like anything else.
        texts = {
            "flags.txt": checked.config.as_flagfile(),
            "data.json": json.dumps(checks.data_digests(checked.splits)),
            "environment.json": environment.environment(),
        }
        for name, text in texts.items():
            with files.atomic_write(workdir / name) as temporary:
                options.write_flagfile(temporary, text)
    multihost_utils.sync_global_devices("workdir")


def cache_compiled_programs(checked: CheckedRun) -> None:
    """Keeps compiled programs in the workdir, unless the environment says where."""
    chosen = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 (not in its stubs)
    folder = (checked.workdir / "compiled").absolute()
    # JAX keeps the name in a text of UTF-8.
    if checked.config.runtime.compilation_cache and not chosen and paths.is_utf8(folder):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # The first compilation of a process decides whether there is a cache.
        compilation_cache.reset_cache()
