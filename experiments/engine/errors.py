"""The error that ends a run, and the words of others' errors."""

from collections.abc import Iterator
import contextlib
import sys
import threading


class RunError(ValueError):
    """A run that cannot go on. The message is one line for the user."""


@contextlib.contextmanager
def without_echoes() -> Iterator[None]:
    """Drops what others' threads print of an error that is raised, as on a full disk.

    Of an OSError that ends the block they print until the process ends.
    """
    hook = sys.unraisablehook

    def drop_echoes(dropped: "sys.UnraisableHookArgs") -> None:
        # tensorstore's threads, for each array that was to be written when a write failed
        if "Event loop is closed" not in str(dropped.exc_value):
            hook(dropped)

    sys.unraisablehook = drop_echoes
    try:
        yield
    except OSError:  # TensorBoard's thread tries again at exit
        hook = threading.excepthook = lambda *_: None
        raise
    finally:
        sys.unraisablehook = hook
