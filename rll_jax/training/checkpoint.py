"""Saves and restores train states. This is the only file that knows orbax."""

from collections.abc import Iterator, Mapping
import contextlib
import os
import pathlib
import types
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from rll_jax.training import steps


class Checkpoints:
    """The last checkpoints of a run in a directory.

    A save is atomic: one that was cut off does not count, and the next run removes it. Saves go on
    in the background; `wait` and `close` wait for them. All processes of a run must take part, with
    arrays over all of their devices (`devices.Runner.to_global`).

    Args:
      directory: where the checkpoints are; created unless `read_only`.
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
        self._manager = ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options)

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
          OSError: saving failed, such as on a full disk. A failure in the background is raised by
            the next `save`, `wait` or `close`.
        """
        if step in self._manager.all_steps():
            return
        with _as_os_error():
            self._manager.save(
                step,
                args=ocp.args.StandardSave(_arrays(state)),
                custom_metadata=None if metadata is None else dict(metadata),
            )

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
        with _as_os_error():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all that was saved is on disk, and ends the background work.

        Raises:
          OSError: a save failed.
        """
        with _as_os_error():
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
def _as_os_error() -> Iterator[None]:
    """Turns the errors of orbax and tensorstore, of many types, into OSError."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise OSError(f"a checkpoint cannot be saved: {reason}") from error


def _arrays(state: steps.TrainState) -> dict[str, Any]:
    """Returns the trees of arrays that make up a state, by field."""
    names = ["step", "params", "opt_state", "batch_stats", "skipped"]
    names += [name for name in ("ema", "memory") if getattr(state, name) is not None]
    return {name: getattr(state, name) for name in names}
