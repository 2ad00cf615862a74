"""What a run writes on its way: metrics.jsonl, TensorBoard events, bad_images.txt, environment.json."""

import fcntl
import importlib.metadata
import json
import pathlib
import platform
import resource
import subprocess
import sys

import jax
import numpy as np
import tqdm

from experiments.engine import config as config_lib
from rll_jax.data import images

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
)


class BadRun(ValueError):
    """A run that cannot go on, told in one line."""


def locked(workdir: pathlib.Path):
    """A file that is locked until it is closed; raises BadRun where another process has it."""
    file = (workdir / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadRun(
            f"--workdir={workdir} is in use by another run: let it end, or choose another --workdir"
        )
    except OSError:  # a file system without locks
        pass
    return file


class BadImages:
    """bad_images.txt: the pictures that were left out, and those that turned out broken on the way, up to a limit."""

    def __init__(self, path: pathlib.Path, limit: int, left_out: list[str]):
        self._path, self._limit, self._known = path, limit, set(_lines(path))
        self._broken = set()
        for text in left_out:
            self._list(f"left out: {text}")

    def found(self, data, row: int) -> None:
        """Raises BadRun where there are too many."""
        if str(data.paths[row]) in self._broken:
            return
        self._broken.add(str(data.paths[row]))
        try:
            data.decoded_image(row)
            reason = f"{data.paths[row]}: could not be read for a while"
        except images.BadImageError as error:
            reason = " ".join(str(error).split())
        self._list(f"broken: {reason}")
        tqdm.tqdm.write(f"left out: {reason}", file=sys.stderr)
        if len(self._broken) > self._limit:
            raise BadRun(
                f"{len(self._broken)} pictures could not be read, more than --max_bad_images={self._limit}: see {self._path}; the last is {reason}"
            )

    def _list(self, line: str) -> None:
        if line not in self._known:
            self._known.add(line)
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")


class Log:
    """metrics.jsonl and TensorBoard events, by the first process; what an interrupted run wrote past its checkpoint is taken back.

    Attributes:
      kept: the lines up to the checkpoint, parsed.
    """

    def __init__(self, workdir: pathlib.Path, start: int):
        path = workdir / "metrics.jsonl"
        lines = [line for line in _lines(path) if start and json.loads(line)["step"] <= start]
        self.kept = [json.loads(line) for line in lines]
        self._seen = {(entry["step"], "recall@1" in entry) for entry in self.kept}
        self._file = self._board = None
        if jax.process_index() == 0:
            with config_lib.written_whole(path) as aside:
                aside.write_text("".join(line + "\n" for line in lines))
            self._file = path.open("a")
            import tensorboardX  # a second to import

            self._board = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=start + 1
            )

    def write(self, step: int, values: dict, board: dict | None = None) -> None:
        """Numbers; those that are not finite are left out of metrics.jsonl, arrays are histograms of 0 to 2.

        Histograms and the numbers of `board` are for TensorBoard alone.
        """
        if self._file is None or (step, "recall@1" in values) in self._seen:
            return
        if not self._board_lives():
            raise OSError("TensorBoard's events cannot be written: is the disk full?")
        numbers = {name: value for name, value in values.items() if np.ndim(value) == 0}
        self._file.write(
            json.dumps(
                {
                    "step": step,
                    **{name: value for name, value in numbers.items() if np.isfinite(value)},
                }
            )
            + "\n"
        )
        self._file.flush()
        for name, value in {**numbers, **(board or {})}.items():
            self._board.add_scalar(
                name.replace("@", "_at_"), value, step
            )  # TensorBoard's names have no @
        for name in values.keys() - numbers.keys():
            self._histogram(name, np.asarray(values[name], float), step)

    def _histogram(self, name, counts, step):
        edges = np.linspace(0, 2, len(counts) + 1)
        centres = (edges[1:] + edges[:-1]) / 2
        moments = dict(
            num=counts.sum(), sum=(counts * centres).sum(), sum_squares=(counts * centres**2).sum()
        )
        self._board.add_histogram_raw(
            name,
            min=0,
            max=2,
            **moments,
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def text(self, name: str, text: str) -> None:
        if self._board is not None:
            self._board.add_text(name, f"```\n{text}\n```", 0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file is not None:
            self._file.close()
            if self._board_lives():
                self._board.close()

    def _board_lives(self) -> bool:
        """Whether its thread does: one that failed to write is dead, and everything given to it then waits for ever."""
        worker = (
            getattr(self._board.file_writer.event_writer, "_worker", None)
            if self._board.file_writer
            else None
        )
        return worker is None or worker.is_alive()


def environment() -> str:
    """What ran: the command, the code's commit, versions and devices, as JSON."""
    root = pathlib.Path(__file__).parents[2]
    try:
        git = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True
        )
        commit = git.stdout.strip() if git.returncode == 0 and (root / ".git").exists() else ""
    except OSError:  # no git
        commit = ""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    found = {
        "command": sys.argv,
        "commit": commit,
        "python": platform.python_version(),
        "packages": versions,
        "processes": jax.process_count(),
        "devices": [f"{d} ({d.device_kind})" for d in jax.devices()],
    }
    return json.dumps(found, indent=1)


def device_mib() -> float:
    """The most that the first device had in use; a CPU has no count of its own but the process's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return (
        stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        / 2**20
    )


def _lines(path: pathlib.Path) -> list[str]:
    """The whole lines of a file; the last may have been cut off by a kill."""
    return path.read_text().split("\n")[:-1] if path.exists() else []
