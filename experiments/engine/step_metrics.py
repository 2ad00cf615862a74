"""The metrics of training steps: values, rates by the clock, and streaks of skipped steps."""

from collections.abc import Iterator, Mapping
import contextlib
import time
from typing import Any

import jax
import numpy as np
import optax

from experiments.engine.errors import RunError
from experiments.engine.runtime import RuntimeOptions
from rll_jax.training import checkpoint


class StepMetrics:
    """Turns what a step measures into the values of a line of metrics.jsonl."""

    def __init__(
        self,
        options: RuntimeOptions,
        learning_rate: optax.Schedule,
        batch_size: int,
        step: int,
        *,
        longest_streak: int,
    ) -> None:
        """Starts the clock.

        Args:
          options: the run's runtime options.
          learning_rate: the learning rate as a function of the updates so far.
          batch_size: the number of images of a batch.
          step: the step that the run resumes after.
          longest_streak: the most steps skipped in a row by then.
        """
        self._options, self._learning_rate = options, learning_rate
        self._batch_size, self._longest_before = batch_size, longest_streak
        self.restart(step)

    def restart(self, step: int) -> None:
        """Starts the clock anew after a step, so that what came between does not count."""
        self._step, self._time, self._waited = step, time.monotonic(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the block's time as waiting for a batch."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    def values(
        self, step: int, measured: Mapping[str, jax.Array], skipped: jax.Array
    ) -> dict[str, Any]:
        """Returns the values of a step, with the rates since the last call.

        Args:
          step: the step.
          measured: the metrics of `steps.train_step`.
          skipped: the counters of the state.
        """
        values = {name: np.asarray(value).tolist() for name, value in measured.items()}
        total_skipped = int(np.asarray(skipped)[2])
        images = (step - self._step) * self._batch_size
        values["learning_rate"] = np.asarray(self._learning_rate(step - 1 - total_skipped)).item()
        values["images_per_second"] = images / (time.monotonic() - self._time)
        values["seconds_waiting"] = self._waited
        if total_skipped:
            values["skipped_steps"] = total_skipped
        self.restart(step)
        return values

    def check_finite(
        self,
        step: int,
        values: Mapping[str, Any],
        skipped: jax.Array,
        saved: checkpoint.Checkpoints,
    ) -> None:
        """Raises RunError where too many steps in a row were skipped.

        Args:
          step: the step.
          values: of `values`.
          skipped: the counters of the state.
          saved: the checkpoints, of which the message names the last.
        """
        streak, longest, _ = np.asarray(skipped).tolist()
        limit = self._options.max_bad_steps
        if streak < limit and longest <= max(self._longest_before, limit - 1):
            return
        saved.wait()
        when, names = f"before step {step}", ""
        if streak:
            bad = [name for name, value in values.items() if not np.isfinite(value).all()]
            when, names = f"until step {step}", f" ({', '.join(bad or ['batch statistics'])})"
        raise RunError(
            f"{max(streak, longest)} steps in a row, {when}, had something not finite{names} and "
            f"changed nothing; the last checkpoint is of step {saved.latest_step() or 0}; lower "
            "--learning_rate"
        )
