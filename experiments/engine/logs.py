"""What a run writes on its way: metrics.jsonl and TensorBoard events."""

from collections.abc import Mapping
import json
import pathlib
import resource
from typing import Any, TextIO

import jax
import numpy as np

from experiments.engine import processes, signals
from experiments.engine.bad_images import whole_lines
from rll_jax.data import files


class MetricsLog:
    """metrics.jsonl and TensorBoard events, which the first process writes.

    Lines that an interrupted run wrote after its last checkpoint are removed: the resumed run
    writes them again.

    Attributes:
      kept: the parsed lines up to the checkpoint.
    """

    def __init__(self, workdir: pathlib.Path, start: int) -> None:
        """Opens the log of a run that begins or resumes after step `start`.

        Raises:
          ValueError: as `read_lines`, where the run resumes.
        """
        path = workdir / "metrics.jsonl"
        lines = read_lines(path) if start else []
        self.kept = [line for line in lines if line["step"] <= start]
        self._written = {(entry["step"], "recall@1" in entry) for entry in self.kept}
        self._file: TextIO | None = None
        self._board: Any = None
        if processes.is_first():
            with files.atomic_write(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in self.kept))
            self._file = path.open("a")
            import tensorboardX  # a second to import

            self._board = tensorboardX.SummaryWriter(
                str((workdir / "tensorboard").absolute()), purge_step=start + 1
            )

    def has_scores(self, step: int) -> bool:
        """Whether the kept lines have the scores of a step."""
        return any(line["step"] == step and "recall@1" in line for line in self.kept)

    def write(
        self, step: int, values: Mapping[str, Any], board_only: Mapping[str, float] | None = None
    ) -> None:
        """Writes the values of a step, unless an earlier part of the run has written them.

        Args:
          step: the step.
          values: {name: number, or an array of counts between 0 and 2}. metrics.jsonl gets the
            finite numbers; TensorBoard gets all numbers, and the counts as histograms.
          board_only: numbers for TensorBoard alone.

        Raises:
          OSError: TensorBoard's events cannot be written.
        """
        if self._file is None or (step, "recall@1" in values) in self._written:
            return
        if not self._board_is_alive():
            folder = self._board.logdir
            raise OSError(f"TensorBoard's events cannot be written: is the disk full? ({folder})")
        numbers = {name: value for name, value in values.items() if np.ndim(value) == 0}
        finite = {name: value for name, value in numbers.items() if np.isfinite(value)}
        with files.errors_of(self._file.name):
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
        with signals.deferred():
            for name, value in {**numbers, **(board_only or {})}.items():
                # TensorBoard's names have no @.
                self._board.add_scalar(name.replace("@", "_at_"), value, step)
            for name in values.keys() - numbers.keys():
                self._add_histogram(name, np.asarray(values[name], float), step)

    def _add_histogram(self, name: str, counts: np.ndarray, step: int) -> None:
        edges = np.linspace(0, 2, len(counts) + 1)
        centres = (edges[1:] + edges[:-1]) / 2
        self._board.add_histogram_raw(
            name,
            min=0,
            max=2,
            num=counts.sum(),
            sum=(counts * centres).sum(),
            sum_squares=(counts * centres**2).sum(),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def write_text(self, name: str, text: str) -> None:
        """Writes a text for TensorBoard."""
        if self._board is not None:
            text = text.encode(errors="backslashreplace").decode()
            with signals.deferred():
                self._board.add_text(name, f"```\n{text}\n```", 0)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None:
            return
        try:
            with files.errors_of(self._file.name):
                self._file.close()
            if self._board_is_alive():
                with files.errors_of(self._board.logdir):
                    self._board.close()
        except OSError:
            if kind is None:  # an error that is on its way says more
                raise

    def _board_is_alive(self) -> bool:
        """Whether TensorBoard's thread lives.

        A thread that failed to write is dead, and everything given to it then waits for ever.
        """
        writer = self._board.file_writer
        worker = getattr(writer.event_writer, "_worker", None) if writer else None
        return worker is None or worker.is_alive()


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a metrics.jsonl, or none where there is no such file.

    Raises:
      ValueError: a line is no JSON object with a step; the message names the line.
    """
    lines = []
    try:
        texts = whole_lines(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if (
            not isinstance(line, dict)
            or not isinstance(line.get("step"), int)
            or not all(isinstance(value, (int, float)) for value in line.values())
        ):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object of numbers, with a step"
            )
        lines.append(line)
    return lines


def device_mib() -> float:
    """Returns the most memory that the first device had in use, in MiB.

    A CPU counts the memory of the process.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return stats.get("peak_bytes_in_use", process) / 2**20
