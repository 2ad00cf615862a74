"""The devices and processes that share a run."""

import dataclasses
from typing import ClassVar

import jax

from experiments.engine.options import Section, option
from rll_jax.data import files


@dataclasses.dataclass(frozen=True)
class DeviceOptions(Section):
    """How a step is spread over devices."""

    title: ClassVar[str] = "Devices"

    parallel: str = option(
        "pmap",
        "How a step runs over the devices. Both ways give the same results to rounding.",
        choices=("pmap", "shard_map"),
    )
    embed_chunk: int = option(
        0,
        "The number of a device's images in the network at a time, for batches beyond its memory; "
        "the loss still ranks the whole batch. 0: all images at once.",
        low=0,
    )


@dataclasses.dataclass(frozen=True)
class ProcessOptions(Section):
    """How the processes of one run find each other."""

    title: ClassVar[str] = "Processes"
    free_on_resume: ClassVar[bool] = True

    multihost: bool = option(
        False,
        "Run as one of several processes. TPU pods, Slurm and GKE tell a process where the others "
        "are; elsewhere give --coordinator_address, --num_processes and --process_id too.",
    )
    coordinator_address: str = option("", "With --multihost: HOST:PORT of process 0.")
    num_processes: int = option(
        0, "With --multihost: the total number of processes. 0: found automatically.", low=0
    )
    process_id: int = option(
        -1, "With --multihost: the number of this process, from 0. -1: found automatically.", low=-1
    )

    def check(self) -> None:
        """See `Section.check`."""
        given = [bool(self.coordinator_address), self.num_processes > 0, self.process_id >= 0]
        if any(given) and not (self.multihost and all(given)):
            raise ValueError(
                "--coordinator_address, --num_processes and --process_id go together, with "
                "--multihost"
            )


def join(options: ProcessOptions) -> None:
    """Joins the other processes of a run with --multihost.

    Raises:
      ValueError: the other processes cannot be reached.
    """
    if not options.multihost:
        return
    try:
        jax.distributed.initialize(
            options.coordinator_address or None,
            options.num_processes or None,
            options.process_id if options.num_processes else None,
        )
    except (RuntimeError, ValueError) as error:
        reason = files.first_line(error)
        raise ValueError(f"--multihost: cannot join the other processes: {reason}") from error


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0
