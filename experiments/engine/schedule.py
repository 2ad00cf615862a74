"""The schedule of a run: its steps, its seed, and when it is evaluated."""

import dataclasses
from typing import ClassVar

from experiments.engine.options import Section, option


@dataclasses.dataclass(frozen=True)
class ScheduleOptions(Section):
    """How long a run trains and how it is scored on the way."""

    title: ClassVar[str] = "Schedule"

    steps: int = option(1000, "The number of training steps.", low=1, main=True)
    seed: int = option(
        0,
        "The seed of the initial parameters, the batches and the augmentation.",
        low=0,
        main=True,
    )
    eval_every: int = option(
        200,
        "The number of steps between evaluations. Before the first step and after the last one "
        "the network is evaluated too.",
        low=1,
        main=True,
    )
    eval_batch_size: int = option(
        256, "The number of images embedded at a time in an evaluation.", low=1
    )
    best: str = option(
        "recall@1",
        "The score by which the best checkpoint is kept in best/. Empty: no best checkpoint.",
    )
