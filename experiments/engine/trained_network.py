"""A trained network from a run's checkpoint: what evaluate, embed, search and export start from."""

from collections.abc import Callable
import functools
import pathlib
from typing import Any, NamedTuple, Protocol, TextIO

from absl import flags
import jax
import numpy as np
import optax

from experiments.engine import build, network, phases, startup
from experiments.engine import config as config_lib
from experiments.engine.config import Config
from rll_jax.data import files, pipeline
from rll_jax.training import checkpoint, devices, embedding, steps


class Embed(Protocol):
    """Embeds a dataset by a trained network, see `rll_jax.training.embedding.embed_images`."""

    def __call__(
        self,
        data: pipeline.Images,
        *,
        batch_size: int = ...,
        on_bad: Callable[[int], None] | None = None,
        progress: str = "",
    ) -> dict[str, np.ndarray]:
        """Returns {level: (N, D) float32}; `batch_size` is by default the run's own."""
        ...


class TrainedNetwork(NamedTuple):
    """A trained network.

    Attributes:
      config: the options of the run that trained it.
      step: the step of the checkpoint.
      embed: embeds a dataset.
      variables: {"params": ..., "batch_stats": ...}; the moving average's where the run has one.
    """

    config: Config
    step: int
    embed: Embed
    variables: dict[str, Any]


def define_flags(workdir: str = "The folder of a run.") -> None:
    """Defines the flags of every command that takes a trained network.

    Args:
      workdir: the help of --workdir.
    """
    flags.DEFINE_string("workdir", None, workdir, required=True)
    flags.DEFINE_integer("step", None, "The step of the checkpoint. By default the last one.")
    flags.DEFINE_bool("best", False, "Take the best checkpoint, by the run's own --best.")


def load_from_flags(stream: TextIO | None = None) -> TrainedNetwork:
    """Loads the network that the flags of `define_flags` name; raises as `load`.

    Args:
      stream: where to say that it takes long, see `phases.told`.
    """
    options = flags.FLAGS
    with phases.told("reading the network", stream):
        return load(options.workdir, options.step, options.best)


def load(workdir: str, step: int | None = None, best: bool = False) -> TrainedNetwork:
    """Loads the network of a run's checkpoint.

    Args:
      workdir: the run's folder.
      step: the step of the checkpoint; None for the last one.
      best: take the best checkpoint instead.

    Raises:
      ValueError: no run is there, no such checkpoint (the message lists those that are), or the
        checkpoint cannot be read.
    """
    folder = pathlib.Path(workdir)
    if not (folder / "flags.txt").is_file():
        raise ValueError(
            f"--workdir={folder} holds no run: expected a folder that an experiment wrote, with "
            "flags.txt"
        )
    config = config_lib.from_flagfile(folder / "flags.txt")
    startup.take_bfloat16_products(config.network.dtype)
    runner = devices.make_runner(config.devices.parallel)
    checkpoints = folder / ("best" if best else "checkpoints")
    step, variables = _restore(folder, checkpoints, step, config, runner)
    model = network.make_model(config.network)
    state = steps.TrainState(
        step=step,
        apply_fn=model.apply,
        tx=optax.identity(),
        opt_state=(),
        skipped=None,
        **variables,
    )
    embed = functools.partial(
        embedding.embed_images,
        runner.to_local(state),
        view=config.data.test_view(),
        embed=runner.embed(steps.embed_step),
        runner=runner,
        batch_size=config.schedule.eval_batch_size,
        threads=config.runtime.threads,
    )
    return TrainedNetwork(config, step, embed, variables)


def _restore(
    workdir: pathlib.Path,
    checkpoints: pathlib.Path,
    step: int | None,
    config: Config,
    runner: devices.Runner,
) -> tuple[int, dict[str, Any]]:
    """Returns the checkpoint's step and its variables on all devices."""
    if not checkpoints.is_dir():
        raise ValueError(
            f"--workdir={workdir} holds no checkpoint yet: let the run go on to its first"
        )
    shapes = jax.eval_shape(functools.partial(build.create_state, config))
    params = "params" if shapes.ema is None else "ema"
    wanted = {params: shapes.params, "batch_stats": shapes.batch_stats}
    with checkpoint.Checkpoints(checkpoints, read_only=True) as saved:
        all_steps = saved.all_steps()
        if not all_steps or step not in (None, *all_steps):
            missing = "yet: let the run go on to its first"
            if all_steps:
                missing = f"of step {step}: there are {', '.join(map(str, all_steps))}"
            raise ValueError(f"--workdir={workdir} holds no checkpoint {missing}")
        step = all_steps[-1] if step is None else step
        try:
            restored = runner.replicate(saved.restore_subset(step, wanted))
        except Exception as error:  # orbax, tensorstore and json have their own kinds
            raise ValueError(
                f"--workdir={workdir}: the checkpoint of step {step} cannot be read: "
                f"{files.first_line(error)}"
            ) from error
    return step, {"params": restored[params], "batch_stats": restored["batch_stats"]}
