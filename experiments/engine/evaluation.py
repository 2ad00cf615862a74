"""The evaluations of a run: scores of the test images, and the best checkpoint."""

from collections.abc import Callable, Mapping
import functools
import types
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.engine import processes, query_scores, scoring, zero_shot
from experiments.engine.bad_images import BadImagesFile
from experiments.engine.checks import CheckedRun
from experiments.engine.errors import RunError
from experiments.engine.logs import MetricsLog
from experiments.engine.network_inputs import Input
from rll_jax.data.image_dataset import EncodedImageDataset
from rll_jax.networks import embedding_net
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
      zero_shot: {score: value} of the backbone's own features, before the first step of a run that
        wants them (`zero_shot.is_wanted`); otherwise none.
    """

    data: EncodedImageDataset
    levels: dict[str, np.ndarray]
    by_query: dict[str, scoring.ByQuery]
    scores: dict[str, float]
    zero_shot: Mapping[str, float] = types.MappingProxyType({})


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
        self._embed_step = self._stoppable(steps.embed_step)
        self._embed = functools.partial(
            embedding.embed_images,
            data=test_input.data,
            view=test_input.view,
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

    def _stoppable(self, step: Callable[..., Any]) -> Callable[..., dict[str, jax.Array]]:
        """Returns an embedding step over the devices that looks for a stop before each batch."""
        on_devices = self._checked.runner.embed(step)

        def embed(*arguments: Any) -> dict[str, jax.Array]:
            self._stop_if_requested()
            return on_devices(*arguments)

        return embed

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
            with_zero_shot = step == 0 and zero_shot.is_wanted(self._checked.config)
            evaluated = self._score(state, only_all, with_zero_shot)
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
        if evaluated.zero_shot:
            self._log.write(step, zero_shot.as_logged(evaluated.zero_shot))
        if self._best is not None and evaluated.scores[schedule.best] > self.best_score:
            self.best_score = evaluated.scores[schedule.best]
            self._best.save(step, self._checked.runner.to_global(state))
            # Before a checkpoint of this step counts: a resumed run would not save the best again.
            self._best.wait()
        return evaluated

    def _score(self, state: steps.TrainState, only_all: bool, with_zero_shot: bool) -> Evaluated:
        test = self._checked.splits["test"]
        # The optimiser's state and the memory are large, and not needed.
        local = self._checked.runner.to_local(state.replace(opt_state=(), memory=None))
        embed_step = self._embed_step
        if with_zero_shot:  # a second program, so that the others stay what they were
            embed_step = self._stoppable(functools.partial(steps.embed_step, pooled=True))
        data, levels = scoring.embed_readable(
            functools.partial(self._embed, local, embed=embed_step),
            test,
            functools.partial(self._bad_images.add, test),
        )
        pooled = levels.pop(embedding_net.POOLED, None)
        ks = self._checked.config.data.entry.ks
        by_query = scoring.score_levels(
            levels, data, ks, only_all=only_all, on_progress=self._stop_if_requested
        )
        scores = list(scoring.make_table(by_query, data, ks).values())[-1]
        before = {} if pooled is None else self._score_zero_shot(pooled, data)
        return Evaluated(data, levels, by_query, scores, before)

    def _score_zero_shot(self, features: np.ndarray, data: EncodedImageDataset) -> dict[str, float]:
        """Scores the backbone's own features, and keeps the scores of each query in the workdir."""
        ks = self._checked.config.data.entry.ks
        try:
            by_query = scoring.score_levels(
                {embedding_net.POOLED: features}, data, ks, on_progress=self._stop_if_requested
            )
        except ValueError as error:
            raise RunError(
                f"the pooled features of --backbone={self._checked.config.network.backbone} "
                f"before the first step: {error}; --zero_shot=False trains without their score"
            ) from error
        if processes.is_first():
            scores = query_scores.collect(by_query[embedding_net.POOLED], data)
            query_scores.write(self._checked.workdir, scores, zero_shot.FILE)
        return scoring.make_table(by_query, data, ks)[embedding_net.POOLED]
