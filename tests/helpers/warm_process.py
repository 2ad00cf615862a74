"""Commands in forked processes of one that has imported the project: seconds saved at each start.

A forked process has an exit code, files and an environment of its own, as `python -m` has. JAX's
backend starts in the fork. Tests of signals and of starting itself use real commands.
"""

import atexit
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback

_IMPORTED = "experiments.engine.train_loop"


class WarmProcess:
    """A process that has imported the project and forks one process per command."""

    def __init__(self, environment: dict[str, str], cwd: pathlib.Path) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._here, there = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(there.fileno())],
            pass_fds=[there.fileno()],
            env=environment,
            cwd=cwd,
        )
        there.close()
        self._number = 0
        atexit.register(self.close)

    def run(
        self, module: str, arguments: list[str], environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess:
        """Runs `python -m module *arguments`; raises TimeoutExpired as `subprocess.run` does."""
        self._number += 1
        outputs = [pathlib.Path(self._folder.name, f"{self._number}.{n}") for n in ("out", "err")]
        request = {
            "module": module,
            "arguments": arguments,
            "environment": environment,
            "outputs": [str(output) for output in outputs],
        }
        self._here.sendall(json.dumps(request).encode() + b"\n")
        pid = self._number_in_line(None)
        code = None
        try:
            code = self._number_in_line(timeout)
        except TimeoutError:
            os.killpg(pid, signal.SIGKILL)
            self._number_in_line(None)
        out, err = (output.read_text(errors="replace") for output in outputs)
        for output in outputs:
            output.unlink()
        command = [module, *arguments]
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout, out, err)
        return subprocess.CompletedProcess(command, code, out, err)

    def _number_in_line(self, timeout: float | None) -> int:
        """Receives a line, byte by byte: a buffer would hide the next one from `select`."""
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self._here], [], [], timeout)[0]:
                raise TimeoutError
            received = self._here.recv(1)
            if not received:
                raise ConnectionError("the warm process has ended")
            line += received
        return int(line)

    def close(self) -> None:
        self._here.close()
        self._process.wait()
        self._folder.cleanup()


def _serve(connection: socket.socket) -> None:
    __import__(_IMPORTED)
    messages = connection.makefile("rw")
    for line in messages:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            connection.close()
            _run(**request)
        messages.write(json.dumps(pid) + "\n")
        messages.flush()
        _, status = os.waitpid(pid, 0)
        messages.write(json.dumps(os.waitstatus_to_exitcode(status)) + "\n")
        messages.flush()


def _run(
    module: str, arguments: list[str], environment: dict[str, str], outputs: list[str]
) -> None:
    """Runs a module as `python -m` does, in a forked process; does not return."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in zip((1, 2), outputs, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
    sys.argv[1:] = arguments
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    _serve(socket.socket(fileno=int(sys.argv.pop())))
