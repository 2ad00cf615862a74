"""Saves and restores train states. This is the only file that knows orbax."""

from collections.abc import Iterator, Mapping
import contextlib
import os
import pathlib
import re
import tempfile
import types
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from rll_jax.data import files
from rll_jax.training import steps

# Names that mean the same to orbax and tensorstore as to the system: nothing that is a pattern (the
# manifest would not be written), a backslash, not UTF-8, or what epath takes for an object store.
_PLAIN = re.compile(r"/(?!(gs|s3|az|hf)(/|$))[A-Za-z0-9 ._/+=,@:-]*")
_DESCRIPTORS = pathlib.Path("/proc/self/fd")


class Checkpoints:
    """The last checkpoints of a run in a directory.

    A save is atomic: one that was cut off does not count, and the next run removes it. Saves go on
    in the background; `wait` and `close` wait for them. All processes of a run must take part, with
    arrays over all of their devices (`devices.Runner.to_global`).

    The first save is waited for and read back, so that a directory whose checkpoints cannot be
    restored is an error at once.

    Args:
      directory: where the checkpoints are, a local one of any name; created unless `read_only`.
      keep: number of checkpoints to keep; older ones are removed.
      read_only: change nothing in the directory, so that a run may write to it meanwhile.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2, read_only: bool = False):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        self._directory = pathlib.Path(directory).absolute()
        if not read_only:
            self._directory.mkdir(parents=True, exist_ok=True)
        self._stack = contextlib.ExitStack()
        self._name = self._stack.enter_context(_plain_name(self._directory))
        self._manager = ocp.CheckpointManager(self._name, options=options)
        self._reads_back = True

    def all_steps(self) -> list[int]:
        """Returns the steps with a checkpoint, in rising order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Returns the last step with a checkpoint; None without one."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: steps.TrainState, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Begins to save a state. A step that has a checkpoint already is left as it is.

        Args:
          step: the step to save as.
          state: the state. Its arrays are saved; `apply_fn` and `tx` are not.
          metadata: numbers and texts that go with the arrays, for the method `metadata`.

        Raises:
          OSError: saving failed, such as on a full disk, or the first checkpoint cannot be read
            back. A failure in the background is raised by the next `save`, `wait` or `close`.
        """
        if step in self._manager.all_steps():
            return
        with self._as_os_error("saved"):
            self._manager.save(
                step,
                args=ocp.args.StandardSave(_arrays(state)),
                custom_metadata=None if metadata is None else dict(metadata),
            )
        if self._reads_back:
            self.wait()
            with self._as_os_error("read back"):
                self._manager.item_metadata(step)  # opens the manifest and each array
            self._reads_back = False

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns the metadata saved with `step`; {} if there was none."""
        return dict(self._manager.metadata(step).custom_metadata or {})

    def restore(self, step: int, state: steps.TrainState) -> steps.TrainState:
        """Returns the state saved at `step`.

        Args:
          step: a step with a checkpoint.
          state: gives the shapes, the dtypes and the devices of the arrays. Its values are not
            used.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(state))
        return state.replace(**self._manager.restore(step, args=ocp.args.StandardRestore(target)))

    def restore_subset(self, step: int, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Returns some of the trees saved at `step`, such as the parameters alone.

        Args:
          step: a step with a checkpoint.
          arrays: {field of the state: tree of arrays or `jax.ShapeDtypeStruct`}, which give the
            shapes, the dtypes and the devices.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(arrays))
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
        return dict(self._manager.restore(step, args=args))

    def wait(self) -> None:
        """Waits until all that was saved is on disk.

        Raises:
          OSError: a save failed.
        """
        with self._as_os_error("saved"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all that was saved is on disk, and ends the background work.

        Raises:
          OSError: a save failed.
        """
        with self._stack, self._as_os_error("saved"):
            self._manager.wait_until_finished()
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError:
            if kind is None:  # an error that is on its way says more
                raise

    @contextlib.contextmanager
    def _as_os_error(self, what: str) -> Iterator[None]:
        """Turns the errors of orbax and tensorstore, of many types, into OSError."""
        try:
            yield
        except Exception as error:
            reason = files.first_line(error)
            raise OSError(
                f"a checkpoint cannot be {what} in {self._directory}: "
                f"{reason.replace(str(self._name), str(self._directory))}"
            ) from error


@contextlib.contextmanager
def _plain_name(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a name of a folder that orbax and tensorstore take as it is."""
    if _PLAIN.fullmatch(str(directory)):
        yield directory
    elif _DESCRIPTORS.is_dir():  # nothing is left behind, whatever ends the process
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield _DESCRIPTORS / str(descriptor)
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory() as folder:
            link = pathlib.Path(folder, "checkpoints")
            link.symlink_to(directory, target_is_directory=True)
            yield link


def _arrays(state: steps.TrainState) -> dict[str, Any]:
    """Returns the trees of arrays that make up a state, by field."""
    names = ["step", "params", "opt_state", "batch_stats", "skipped"]
    names += [name for name in ("ema", "memory") if getattr(state, name) is not None]
    return {name: getattr(state, name) for name in names}
