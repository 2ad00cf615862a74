"""Saving and restoring a train state; the only file that knows orbax."""

import contextlib
import os
import pathlib

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The last `keep` states of a run in a directory; saves are atomic and run behind the training.

    A save that was cut off leaves nothing that counts, and is cleared away by the next run. `close` waits for the last.
    `read_only` changes nothing there, so that a run may go on meanwhile. All processes of a run take part, with arrays over all of
    their devices. Saving raises OSError where it fails, as on a full disk, at once or by the next save or `close`.
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
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state, metadata: dict | None = None) -> None:
        """`metadata`: numbers and texts that go with the arrays, for `metadata`."""
        if step not in self._manager.all_steps():
            with _as_os_error():
                self._manager.save(
                    step, args=ocp.args.StandardSave(_arrays(state)), custom_metadata=metadata
                )

    def metadata(self, step: int) -> dict:
        return self._manager.metadata(step).custom_metadata or {}

    def restore(self, step: int, state):
        """The state saved at `step`, its arrays placed as those of `state`, whose values are not used."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(state))
        return state.replace(**self._manager.restore(step, args=ocp.args.StandardRestore(target)))

    def restore_subset(self, step: int, arrays: dict) -> dict:
        """Some of the saved state's trees by name, placed as the arrays or `jax.ShapeDtypeStruct`s given."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
        how = ocp.checkpoint_utils.construct_restore_args(target)
        return self._manager.restore(
            step, args=ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
        )

    def wait(self) -> None:
        """Until what was saved is on disk."""
        with _as_os_error():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with _as_os_error():
            self._manager.wait_until_finished()
            self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            self.close()
        except OSError:
            if kind is None:  # what is under way already says more
                raise


@contextlib.contextmanager
def _as_os_error():
    try:
        yield
    except Exception as error:  # tensorstore's and orbax's own
        raise OSError(
            f"a checkpoint cannot be saved: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error


def _arrays(state) -> dict:
    names = ("step", "params", "opt_state", "batch_stats", "skipped")
    names += tuple(name for name in ("ema", "memory") if getattr(state, name) is not None)
    return {name: getattr(state, name) for name in names}
