"""One experiment from its options to its report; the loop reads top to bottom."""

from collections.abc import Iterator
import contextlib
import functools
import signal
import sys
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np
import tqdm

from experiments.engine import (
    checks,
    command,
    dry_run,
    errors,
    flags,
    logs,
    network_inputs,
    optimizer,
    phases,
    processes,
    resume,
    run_parts,
    signals,
    step_metrics,
    summary,
    workdir,
)
from experiments.engine.bad_images import BadImagesFile
from experiments.engine.checks import CheckedRun
from experiments.engine.config import Config
from experiments.engine.errors import RunError
from experiments.engine.evaluation import Evaluated, Evaluator
from experiments.engine.logs import MetricsLog
from rll_jax.data import images, pipeline
from rll_jax.training import checkpoint


def main(_: Any) -> None:
    """Runs the experiment of the flags. A user's mistake ends in one line and exit code 2."""
    with command.user_errors():
        config = flags.config_from_flags()
    explained = resume.explain_abort if config.processes.multihost else contextlib.nullcontext
    with explained():
        _run(config)


def _run(config: Config) -> None:
    if config.processes.multihost:  # ends at once: the other processes would wait for this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with command.user_errors():
        processes.join(config.processes)
        checked = checks.check_run(config)
    with _run_errors():
        if config.runtime.dry_run:
            dry_run.print_costs(checked)
        else:
            train(checked)


@contextlib.contextmanager
def _run_errors() -> Iterator[None]:
    """Ends the program with one line where a run cannot go on, and with the exit code for it."""
    try:
        word = "interrupted: the same command resumes from the last checkpoint"
        with errors.without_echoes(), command.stops(word):
            yield
    except (RunError, images.BadImageError, OSError) as error:
        sys.exit(command.print_error(error))
    except jax.errors.JaxRuntimeError as error:
        lost = ("UNAVAILABLE", "DEADLINE", "ABORTED", "Gloo", "Connection", "coordination")
        if jax.process_count() == 1 or not any(word in str(error) for word in lost):
            raise
        reason = str(error).splitlines()[0][:300]
        print(f"error: another process of this run has gone: {reason}", file=sys.stderr, flush=True)
        sys.exit(signals.RUN_AGAIN)


def train(checked: CheckedRun) -> None:
    """Trains from the last checkpoint to the end, and leaves a report."""
    with contextlib.ExitStack() as stack:
        workdir.claim(stack, checked)
        evaluated = TrainingRun(checked, stack).run()
    if processes.is_first():
        summary.finish(checked, evaluated)
    multihost_utils.sync_global_devices("done")


class TrainingRun:
    """A run between its last checkpoint and its end."""

    def __init__(self, checked: CheckedRun, stack: contextlib.ExitStack) -> None:
        """Restores the last checkpoint and opens what the run writes.

        Args:
          checked: the run, whose workdir is claimed.
          stack: closes what is opened here.
        """
        config, folder = checked.config, checked.workdir
        self._checked, self._config = checked, config
        skipped = checked.skipped_images if processes.is_first() else []
        self._bad_images = BadImagesFile(
            folder / "bad_images.txt", config.runtime.max_bad_images, skipped
        )
        workdir.cache_compiled_programs(checked)
        with phases.told("making the network"):
            fresh = run_parts.fresh_state(checked)
        with phases.told("reading the last checkpoint"):
            restored = resume.restore(folder, checked.runner, fresh)
        self._start = restored.step
        if self._start:
            self._say(f"resuming {folder} at step {self._start} of {config.schedule.steps}")
        try:
            self._state, self._inputs = network_inputs.make_inputs(
                config, checked.splits, checked.runner, restored.state
            )
            self._log = stack.enter_context(MetricsLog(folder, self._start))
        except ValueError as error:
            raise RunError(error) from error
        self._saved = stack.enter_context(
            checkpoint.Checkpoints(folder / "checkpoints", keep=config.runtime.keep)
        )
        best = None
        if config.schedule.best:
            best = stack.enter_context(checkpoint.Checkpoints(folder / "best", keep=1))
        self._log.write_text("options", config.as_flagfile())
        if processes.is_first():
            self._log.write_text("environment", (folder / "environment.json").read_text())
        self._stop_requested = stack.enter_context(resume.stop_requests(config.runtime.log_every))
        self._evaluator = Evaluator(
            checked,
            self._inputs["test"],
            bad_images=self._bad_images,
            log=self._log,
            best=best,
            best_score=restored.best_score,
            stop_requested=self._stop_requested,
        )
        labels = checked.splits["train"].labels
        self._train_step = checked.runner.train(run_parts.make_train_step(config, labels))
        self._metrics = step_metrics.StepMetrics(
            config.runtime,
            optimizer.learning_rate(config.optimizer, config.schedule.steps),
            checked.sampler.batch_size,
            self._start,
            longest_streak=int(np.asarray(self._state.skipped)[1]),
        )

    def run(self) -> Evaluated:
        """Trains to the last step; returns the evaluation of that step."""
        schedule = self._config.schedule
        with self._progress_bar() as self._progress:
            if self._start % schedule.eval_every == 0 and self._start < schedule.steps:
                self._evaluate_before(self._start)
            evaluated = None
            batches = pipeline.prefetch(self._batches(), self._checked.runner.shard)
            for step in range(self._start + 1, schedule.steps + 1):
                with self._metrics.waiting():
                    batch = next(batches)
                self._take_step(step, batch)
                evaluated = self._after_step(step)
            if evaluated is None:  # the run had ended before: the report needs embeddings
                self._say("this run has ended: evaluating it again for the report")
                evaluated = self._evaluate_or_stop(schedule.steps)
        return evaluated

    def _progress_bar(self) -> tqdm.tqdm:
        return tqdm.tqdm(
            total=self._config.schedule.steps,
            initial=self._start,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10,
            disable=not processes.is_first(),
        )

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        on_bad = functools.partial(self._bad_images.add, self._checked.splits["train"])
        return run_parts.train_batches(self._checked, self._inputs["train"], self._start, on_bad)

    def _take_step(self, step: int, batch: Any) -> None:
        """Updates the state by one batch, and logs the metrics of every --log_every-th step."""
        schedule, runtime = self._config.schedule, self._config.runtime
        profiled = runtime.profiled
        if profiled and step == profiled.start:
            jax.profiler.start_trace(str(self._checked.workdir / "profile"))
        if step == self._start + 1:
            self._progress.set_postfix_str("compiling the train step")
        self._state, measured = self._train_step(self._state, batch)
        last_profiled = min(profiled.stop - 1, schedule.steps)
        if self._start < profiled.start <= step == last_profiled:
            jax.block_until_ready(self._state)
            jax.profiler.stop_trace()
        if step % runtime.log_every == 0 or step == schedule.steps:
            values = self._metrics.values(step, measured, self._state.skipped)
            self._log.write(step, values, {"device_mib": logs.device_mib()})
            self._metrics.check_finite(step, values, self._state.skipped, self._saved)
            text = f"loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s"
            self._progress.set_postfix_str(text, refresh=False)
        self._progress.update()

    def _after_step(self, step: int) -> Evaluated | None:
        """Evaluates and saves the state where it is time, and ends a run that is told to stop."""
        last = step == self._config.schedule.steps
        stopping = not last and self._stop_requested(step)
        evaluated = None
        if (step % self._config.schedule.eval_every == 0 or last) and not stopping:
            evaluated = self._evaluate(step)
            stopping = evaluated is None
            self._metrics.restart(step)
        if step % self._config.runtime.checkpoint_every == 0 or last or stopping:
            best_score = {"best_score": self._evaluator.best_score}
            self._saved.save(step, self._checked.runner.to_global(self._state), best_score)
        if stopping:
            self._end_early(step)
        return evaluated

    def _evaluate(self, step: int) -> Evaluated | None:
        evaluated = self._evaluator.evaluate(step, self._state)
        if evaluated is not None and processes.is_first():
            self._progress.write(f"step {step}: {summary.scores_in_a_line(evaluated.scores)}")
            if evaluated.zero_shot:
                line = summary.scores_in_a_line(evaluated.zero_shot)
                self._progress.write(f"zero_shot: {line}")
        return evaluated

    def _evaluate_or_stop(self, step: int) -> Evaluated:
        evaluated = self._evaluate(step)
        if evaluated is None:
            self._end_early(step)
        return evaluated

    def _evaluate_before(self, step: int) -> None:
        """Evaluates before the first step, unless the log has the scores."""
        if not self._log.has_scores(step):
            self._evaluate_or_stop(step)
            self._metrics.restart(step)

    def _end_early(self, step: int) -> NoReturn:
        """Ends a run that was told to stop, after its last checkpoint is on disk."""
        self._saved.wait()
        self._say(
            f"told to stop: saved step {step} of {self._config.schedule.steps}; the same command "
            "resumes",
            file=sys.stderr,
        )
        sys.exit(signals.RUN_AGAIN)

    def _say(self, text: str, **options: Any) -> None:
        if processes.is_first():
            print(text, flush=True, **options)
