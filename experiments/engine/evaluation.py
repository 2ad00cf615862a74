"""The evaluations of a run: scores of the test images, and the best checkpoint."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.engine import processes, scoring
from experiments.engine.bad_images import BadImagesFile
from experiments.engine.checks import CheckedRun
from experiments.engine.errors import RunError
from experiments.engine.logs import MetricsLog
from experiments.engine.network_inputs import Input
from rll_jax.data.image_dataset import EncodedImageDataset
from rll_jax.training import checkpoint, embedding, steps


class _StopRequested(Exception):
    """SIGTERM came in the middle of an evaluation."""


class Evaluated(NamedTuple):
    """An evaluation.

    Attributes:
      data: the test images that could be read.
      levels: {level: (N, D)} their embeddings.
      by_query: {levels: {score: one value for each query}}, all levels concatenated last. After
        the last step the first process has each level and each pair too.
      scores: {score: value} of all levels concatenated.
    """

    data: EncodedImageDataset
    levels: dict[str, np.ndarray]
    by_query: dict[str, scoring.ByQuery]
    scores: dict[str, float]


class Evaluator:
    """Evaluates a run's states on its test images.

    Attributes:
      best_score: the best --best score so far, or -1.
    """

    def __init__(
        self,
        checked: CheckedRun,
        test_input: Input,
        *,
        bad_images: BadImagesFile,
        log: MetricsLog,
        best: checkpoint.Checkpoints | None,
        best_score: float,
        stop_requested: Callable[[int], bool],
    ) -> None:
        """Prepares the evaluations of a run.

        Args:
          checked: the run.
          test_input: what the network gets of the test images.
          bad_images: the file that lists images which cannot be read.
          log: where scores are written.
          best: the folder of the best checkpoint, or None.
          best_score: the best score before this process.
          stop_requested: whether the run was told to stop.
        """
        name = checked.config.schedule.best
        logged = [line[name] for line in log.kept if name in line]
        self.best_score = max([best_score, *logged])
        self._checked, self._bad_images, self._log = checked, bad_images, log
        self._best, self._stop_requested = best, stop_requested
        self._embed_step = checked.runner.embed(steps.embed_step)
        self._embed = functools.partial(
            embedding.embed_images,
            data=test_input.data,
            view=test_input.view,
            embed=self._embed_batch,
            runner=checked.runner,
            batch_size=checked.config.schedule.eval_batch_size,
            threads=checked.config.runtime.threads,
            processes=checked.config.runtime.worker_processes,
            progress="embedding the test images" if processes.is_first() else "",
        )

    def _stop_if_requested(self) -> None:
        # An evaluation may take longer than a machine is left to the run. Several processes end it
        # together instead.
        if jax.process_count() == 1 and self._stop_requested(0):
            raise _StopRequested

    def _embed_batch(self, *arguments: Any) -> dict[str, jax.Array]:
        self._stop_if_requested()
        return self._embed_step(*arguments)

    def evaluate(self, step: int, state: steps.TrainState) -> Evaluated | None:
        """Scores the test images, logs the scores, and saves the state if it is the best.

        Returns:
          The evaluation, or None where the run was told to stop.

        Raises:
          RunError: nothing can be scored.
        """
        schedule = self._checked.config.schedule
        try:
            # What the report shows at the end comes from the same pass.
            only_all = step < schedule.steps or not processes.is_first()
            evaluated = self._score(state, only_all)
        except _StopRequested:
            return None
        except RunError:
            raise
        except ValueError as error:
            raise RunError(
                f"step {step}: {error}; where embeddings are not finite or all zero, lower "
                "--learning_rate"
            ) from error
        if schedule.best and schedule.best not in evaluated.scores:
            raise RunError(f"--best={schedule.best}: expected one of {', '.join(evaluated.scores)}")
        self._log.write(step, evaluated.scores)
        if self._best is not None and evaluated.scores[schedule.best] > self.best_score:
            self.best_score = evaluated.scores[schedule.best]
            self._best.save(step, self._checked.runner.to_global(state))
            # Before a checkpoint of this step counts: a resumed run would not save the best again.
            self._best.wait()
        return evaluated

    def _score(self, state: steps.TrainState, only_all: bool) -> Evaluated:
        test = self._checked.splits["test"]
        # The optimiser's state and the memory are large, and not needed.
        local = self._checked.runner.to_local(state.replace(opt_state=(), memory=None))
        data, levels = scoring.embed_readable(
            functools.partial(self._embed, local),
            test,
            functools.partial(self._bad_images.add, test),
        )
        ks = self._checked.config.data.entry.ks
        by_query = scoring.score_levels(
            levels, data, ks, only_all=only_all, on_progress=self._stop_if_requested
        )
        scores = list(scoring.make_table(by_query, data, ks).values())[-1]
        return Evaluated(data, levels, by_query, scores)
