"""A page to search in: the images of a folder nearest to one that you drop or click.

    python -m experiments.serve --workdir=runs/emoji --images=DIR

serves http://127.0.0.1:8000 until Ctrl-C. --workdir=A,B shows two runs side by side. The index is
that of `search`: the first use embeds the folder, and changed files are embedded as they change.
Needs `pip install starlette uvicorn`.
"""

from collections.abc import Iterator
import contextlib
import importlib.util
import os
import pathlib
import signal
import socket
import sys
import threading
from typing import Any

from absl import app, flags

from experiments.engine import command, finished_runs, phases, trained_network
from experiments.engine.search_service import SearchedRun, SearchService


def main(_: Any) -> None:
    """Runs the command."""
    options = flags.FLAGS
    with command.user_errors():
        _check_installed()
        if not 0 <= options.update_seconds <= 86400:
            raise ValueError(f"--update_seconds={options.update_seconds}: expected 0 to 86400")
        folder = pathlib.Path(options.images)
        if not folder.is_dir():
            raise ValueError(f"--images={folder}: no such folder")
        workdirs = _workdirs(options.workdir)
        with _bound(options.host, options.port) as listener:
            runs = []
            for workdir, name in zip(workdirs, finished_runs.short_names(workdirs), strict=True):
                with phases.told(f"reading the network of {workdir}", sys.stderr):
                    trained = trained_network.load(str(workdir), options.step, options.best)
                runs.append(SearchedRun(name, str(workdir), trained))
            service = SearchService(runs, folder)
            _serve(service, listener, options.host, options.update_seconds)


def _check_installed() -> None:
    missing = [name for name in ("starlette", "uvicorn") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"needs {' and '.join(missing)}: pip install starlette uvicorn")


def _workdirs(text: str) -> list[pathlib.Path]:
    """Returns the folders of one run or two; a folder may have commas in its name."""
    folders = [pathlib.Path(os.path.abspath(each)) for each in finished_runs.split_folders(text)]
    if len(folders) > 2 or len({each.resolve() for each in folders}) < len(folders):
        raise ValueError(f"--workdir={text}: expected the folder of a run, or of two: A,B")
    return folders


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Yields a socket that has the port already, so that a taken one is told before any work."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port={port}: expected 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ValueError(f"--host={host}: no address of this machine ({error})") from error
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()  # only now is the port taken
        except OSError as error:
            raise ValueError(
                f"--host={host} --port={port}: cannot listen there ({error.strerror}): choose "
                "another --port, or --port=0 for any free one"
            ) from error
        yield listener


def _serve(
    service: SearchService, listener: socket.socket, host: str, update_seconds: float
) -> None:
    """Serves until Ctrl-C or SIGTERM, and then ends the process."""
    import uvicorn  # of the extra [serve]

    from experiments.engine import search_server

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            _tell(service, host, listener.getsockname()[1])

    server = Server(
        uvicorn.Config(
            search_server.make_app(service, host),
            log_level="warning",
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
    )
    stop = threading.Event()
    follower = threading.Thread(target=service.follow, args=(update_seconds, stop), daemon=True)
    follower.start()

    def stop_serving(*_: object) -> None:
        server.should_exit = True

    # Until uvicorn has handlers of its own; it raises the signal again once it has ended.
    signal.signal(signal.SIGTERM, stop_serving)
    signal.signal(signal.SIGINT, stop_serving)
    server.run(sockets=[listener])
    stop.set()
    service.look_now()
    follower.join(timeout=2)
    sys.stdout.flush()
    if follower.is_alive():
        # It embeds changed files, which cannot be stopped halfway; what it has written is complete.
        os._exit(0)


def _tell(service: SearchService, host: str, port: int) -> None:
    snapshot = service.snapshot
    shown = f"[{host}]" if ":" in host else host
    classes = len(snapshot.collection.classes)
    print(
        f"http://{shown}:{port}  ({len(snapshot.collection.files)} images, {classes} classes; "
        "Ctrl-C ends it)",
        flush=True,
    )
    if snapshot.num_unreadable:
        print(f"{snapshot.num_unreadable} images cannot be read", file=sys.stderr, flush=True)


if __name__ == "__main__":
    trained_network.define_flags("The folder of a run, or of two runs to compare: A,B.")
    flags.DEFINE_string(
        "images", None, "The folder of images, with all folders in it.", required=True
    )
    flags.DEFINE_string(
        "host", "127.0.0.1", "The address to listen at. 0.0.0.0 shows the images to everyone near."
    )
    flags.DEFINE_integer("port", 8000, "The port to listen at; 0: any free one.")
    flags.DEFINE_float(
        "update_seconds",
        10.0,
        "Seconds between two looks for changed files; 0: only when the page asks.",
    )
    app.run(main, flags_parser=command.parse_flags)
