"""How a run is carried out: folders, threads, checkpoints, limits. A resumed run may change all."""

import dataclasses
import re
from typing import ClassVar

from experiments.engine.options import Section, option


@dataclasses.dataclass(frozen=True)
class RuntimeOptions(Section):
    """What a run reads, writes and tolerates; none of it changes the result."""

    title: ClassVar[str] = "Runtime"
    free_on_resume: ClassVar[bool] = True

    data_dir: str = option(
        "",
        "The folder of the dataset: its published files, its ArrayRecord files, or a folder of "
        "images. Empty: the emoji that come with the project.",
        main=True,
    )
    workdir: str = option(
        "runs/run",
        "The folder that the run writes to. A folder that holds the same run is resumed.",
        main=True,
    )
    threads: int = option(
        2, "The number of threads in each process that read and augment images.", low=1
    )
    worker_processes: int = option(
        0,
        "The number of processes besides this one that read and augment images. 0: threads alone.",
        low=0,
    )
    checkpoint_every: int = option(
        100, "The number of steps between checkpoints. The last step is saved too.", low=1
    )
    keep: int = option(2, "The number of checkpoints to keep.", low=1)
    log_every: int = option(10, "The number of steps between lines of metrics.jsonl.", low=1)
    report: bool = option(True, "Write report.html at the end of the run.", main=True)
    zero_shot: bool = option(
        True,
        "Score the features of the backbone itself before the first step too, without heads but "
        "pooled as --pooling=max or avg+max says, and say at the end what training brought beyond "
        "them. Runs without --pretrained or --init_from have no such score.",
    )
    verify_images: str = option(
        "quick",
        "What to check before the first step: that image files exist and are not empty, or also "
        "that all of them decode.",
        choices=("quick", "full"),
    )
    max_bad_images: int = option(
        100,
        "The number of images that may turn out bad during the run. Others of their class replace "
        "them in training; the scores skip them.",
        low=0,
    )
    max_bad_steps: int = option(
        10,
        "The number of steps in a row that may be skipped because something was not finite.",
        low=1,
    )
    compilation_cache: bool = option(
        True, "Keep compiled programs in the workdir, so that a resumed run starts faster."
    )
    profile_steps: str = option(
        "", "A:B writes a JAX profile of steps A to B - 1 into the workdir. Empty: no profile."
    )
    dry_run: bool = option(
        False,
        "Build and compile everything, print what a step takes, leave --workdir alone, and stop.",
    )

    def check(self) -> None:
        """See `Section.check`."""
        if self.profile_steps:
            match = re.fullmatch(r"(\d+):(\d+)", self.profile_steps)
            if not match or not 0 < int(match[1]) < int(match[2]):
                raise ValueError(
                    f"--profile_steps={self.profile_steps}: expected A:B with A below B, such as "
                    "10:15"
                )

    @property
    def profiled(self) -> range:
        """The steps of --profile_steps."""
        first, _, stop = self.profile_steps.partition(":")
        return range(int(first), int(stop)) if self.profile_steps else range(0)
