"""Ctrl-C and SIGTERM, from a command's first import to its last word.

While a command works they are exceptions (`raised`), so that what is half written is removed.
Before and after that there is nothing to remove, and the process ends at once (`settle`): an
exception would be a traceback of whatever is imported, or lost in it. This module itself imports
fast.
"""

import atexit
from collections.abc import Callable, Iterator
import contextlib
from importlib import machinery
import os
import signal
import sys
import threading
import time
import types
from typing import Any

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
RUN_AGAIN = 75  # the exit code of a program that SIGTERM ended (EX_TEMPFAIL)
_TWICE = 1.0  # seconds in which a launcher may send SIGTERM again
TOLD_TO_STOP = "told to stop: give the same command again"


class ToldToStop(SystemExit):
    """SIGTERM came."""

    def __init__(self) -> None:
        """Has the exit code `RUN_AGAIN`."""
        super().__init__(RUN_AGAIN)


_ERRORS: dict[int, type[BaseException]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: ToldToStop,
}


def settle() -> None:
    """Has Ctrl-C and SIGTERM end a command at once, until it works and after that.

    Signals that are ignored stay so.
    """
    if not is_command():
        return
    owner = os.getpid()

    def end(number: int, _: types.FrameType | None) -> None:
        if os.getpid() == owner:  # not a forked process, whose parent tells
            with contextlib.suppress(Exception):  # the signal may have come while it was printing
                sys.stdout.flush()
            with contextlib.suppress(OSError):
                word = "interrupted" if number == signal.SIGINT else TOLD_TO_STOP
                os.write(2, f"{word}\n".encode())
        os._exit(INTERRUPTED if number == signal.SIGINT else RUN_AGAIN)

    for number in _ERRORS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)
            # Python's last moments know no handlers. This is run after all others at exit.
            atexit.register(signal.signal, number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ERRORS)


def hold() -> None:
    """Has signals wait until the process, which is started again at once, calls `settle`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ERRORS)


def is_command() -> bool:
    """Returns whether Python, started as `python -m experiments.NAME`, looks for NAME now."""
    if sys.argv[0] != "-m" or "-m" not in sys.orig_argv or not sys.executable:
        return False
    return sys.orig_argv[sys.orig_argv.index("-m") + 1].startswith("experiments.")


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raises KeyboardInterrupt or `ToldToStop` where Ctrl-C or SIGTERM comes in the block.

    They are raised even where Python drops exceptions (in `__del__` and in callbacks of the garbage
    collector), or where others come of them. Signals that are left to the system stay so.
    """
    hook, extensions = sys.unraisablehook, _num_extensions(sys._getframe())
    stopped = -_TWICE  # when SIGTERM was raised last

    def handle(number: int, frame: types.FrameType | None) -> None:
        nonlocal stopped
        if number == signal.SIGTERM and time.monotonic() < stopped + _TWICE:
            return
        if _num_extensions(frame) > extensions:  # it would turn the error into an ImportError
            _send_soon(number)
            return
        if number == signal.SIGTERM:
            stopped = time.monotonic()
        raise _ERRORS[number]

    def raise_again(dropped: "sys.UnraisableHookArgs") -> None:
        nonlocal stopped
        for number, kind in _ERRORS.items():
            if isinstance(dropped.exc_value, kind):
                stopped = -_TWICE
                _send_soon(number)
                return
        hook(dropped)

    handlers = _python_handlers()
    try:
        sys.unraisablehook = raise_again
        for number in handlers:
            signal.signal(number, handle)
        yield
    except Exception as error:
        if (behind := _stop_behind(error)) is None:
            raise
        raise behind from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Has Ctrl-C and SIGTERM wait for the block's end. It does nothing outside of the main thread.

    For calls into queues of others: an exception in the middle of `threading.Condition.notify`
    makes the next one wake nobody, and whoever closes the queue then waits for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = _python_handlers()
    try:
        for number in handlers:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


def _python_handlers() -> dict[int, Callable[[int, types.FrameType | None], Any]]:
    """Returns the handlers of Ctrl-C and SIGTERM, without those that are left to the system."""
    handlers = {number: signal.getsignal(number) for number in _ERRORS}
    return {number: handler for number, handler in handlers.items() if callable(handler)}


def _stop_behind(error: BaseException | None) -> BaseException | None:
    """Returns the KeyboardInterrupt or SystemExit of which an error has come; None without one."""
    while error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
        error = error.__cause__ or error.__context__
    return error


def _num_extensions(frame: types.FrameType | None) -> int:
    """Returns how many of the calls that lead to a frame load an extension module."""
    count = 0
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            count += isinstance(frame.f_locals.get("self"), machinery.ExtensionFileLoader)
        frame = frame.f_back
    return count


def _send_soon(number: int) -> None:
    """Sends a signal to this process in a moment."""
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
