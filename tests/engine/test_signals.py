"""Ctrl-C and SIGTERM at any moment of a command."""

import contextlib
import gc
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments.engine import logs, signals
from rll_jax.data import array_records
from tests.helpers.commands import command
from tests.helpers.paths import ROOT

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: signals.TOLD_TO_STOP}


@pytest.fixture
def pictures(emoji, tmp_path):
    for number in range(4):
        (tmp_path / f"in/{number}").mkdir(parents=True)
        for i in range(3):
            encoded = emoji["test"].image_bytes(4 * number + i)
            (tmp_path / f"in/{number}/{i}.png").write_bytes(encoded)
    return tmp_path / "in"


def begin(*arguments):
    """A command that hears signals: the project's first line has run."""
    process = subprocess.Popen(
        **command(*arguments, name="prepare"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where the tests run in the background, SIGINT is ignored, and processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    status, deadline = pathlib.Path(f"/proc/{process.pid}/status"), time.time() + 60
    if not status.exists():
        process.kill()
        pytest.skip("no /proc: it cannot be seen when a process hears signals")
    while time.time() < deadline:
        caught = int(status.read_text().partition("SigCgt:")[2].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return process
        time.sleep(0.001)
    process.kill()
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_at_any_moment(number, pictures):
    """Of the imports (the first seconds), the work and the end: one word, nothing half written.

    A fast machine may have written the set within the seconds: then it is whole.
    """
    processes = []
    for after in (0.0, 0.02, 0.1, 0.3, 0.5, 1.0, 2.0, "written"):
        out = pictures.parent / f"out{after}"
        out.mkdir()
        process = begin("--dataset=folder", f"--source={pictures}", f"--data_dir={out}")
        if after == "written":
            while process.poll() is None and not (out / "prepared_folder").exists():
                time.sleep(0.001)
        else:
            time.sleep(after)
        process.send_signal(number)
        processes.append((after, out, process))
    for after, out, process in processes:
        _, told = process.communicate(timeout=100)
        left = [path.name for path in out.iterdir()]
        assert "Traceback" not in told and "ignored" not in told, (after, told)
        if process.returncode:
            ended = process.returncode, told.splitlines()[-1]
            assert ended == (CODES[number], WORDS[number]), (after, told)
        if after == "written" or process.returncode == 0 or left:
            splits = array_records.open_dataset(out / "prepared_folder", keep_index=False)
            assert [len(splits[split].labels) for split in ("train", "test")] == [6, 6], after
            assert left == ["prepared_folder"] and after, after


@contextlib.contextmanager
def handled():
    """The handlers that `raised` replaces, whatever runs the tests."""
    before = {number: signal.signal(number, lambda *_: None) for number in CODES}
    try:
        yield
        assert all(signal.getsignal(number).__name__ == "<lambda>" for number in CODES)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Ends:
    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


class Called:
    def __init__(self, number):
        self.number = number

    def __call__(self, *_):
        gc.callbacks.remove(self)
        signal.raise_signal(self.number)


KINDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: signals.ToldToStop}


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("where", ["__del__", "garbage collector", "wrapped", "cleaning up"])
def test_a_signal_is_not_lost(number, where):
    """Python drops exceptions of some callbacks, and others come of an exception."""
    with handled(), pytest.raises(KINDS[number]), signals.raised():
        if where == "__del__":
            Ends(number)
        elif where == "garbage collector":
            gc.callbacks.append(Called(number))
            gc.collect()
        elif where == "wrapped":
            try:
                signal.raise_signal(number)
            except BaseException as error:
                raise RuntimeError("a library's own error") from error
        else:
            try:
                signal.raise_signal(number)
            finally:
                raise OSError("nothing can be removed")
        time.sleep(10)


def test_a_signal_that_a_library_has_swallowed_can_be_sent_again(monkeypatch):
    monkeypatch.setattr(signals, "_TWICE", 0.01)
    with handled(), signals.raised():
        for _ in range(2):
            with pytest.raises(signals.ToldToStop):
                signal.raise_signal(signal.SIGTERM)
                time.sleep(10)
            time.sleep(0.02)


def test_an_extension_is_imported_to_its_end():
    """It would turn the exception into its own ImportError, which its importer may drop."""
    code = """
import signal, sys, time
from experiments.engine import signals
def send(event, given):
    if event == "import" and given[0] == "simplejpeg._jpeg" and given[1]:
        signal.raise_signal(signal.SIGINT)
sys.addaudithook(send)
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with signals.raised():
        import simplejpeg
        time.sleep(10)
except KeyboardInterrupt:
    print("simplejpeg._jpeg" in sys.modules)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout == "True\n" and not ended.stderr


@pytest.mark.parametrize(
    "number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_waits_for_tensorboards_queue(number, error, tmp_path, monkeypatch):
    """In the middle of it, the queue's next item would wake nobody: the run would never end."""
    before = {known: signal.signal(known, signal.default_int_handler) for known in CODES}
    try:
        with pytest.raises(error), signals.raised(), logs.MetricsLog(tmp_path, 0) as log:
            written = []
            put = log._board.add_scalar

            def interrupted(name, *values):
                signal.raise_signal(number)
                put(name, *values)
                written.append(name)

            monkeypatch.setattr(log._board, "add_scalar", interrupted)
            log.write(1, {"loss": 0.5, "recall@1": 0.25})
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
    assert written == ["loss", "recall_at_1"]
    assert '"loss": 0.5' in (tmp_path / "metrics.jsonl").read_text()
