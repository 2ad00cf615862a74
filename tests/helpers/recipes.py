"""The recipes of the flagfiles, as options of a run."""

from absl import flags

from experiments.engine import flags as engine_flags
from experiments.engine.config import Config
from tests.helpers.paths import ROOT

FLAGFILES = ROOT / "experiments/flagfiles"


def recipe(name: str) -> Config:
    """The options that a flagfile gives, by its name without .flags."""
    values = flags.FlagValues()
    flags.DEFINE_string("flagfile", "", "", flag_values=values)
    engine_flags.define(flag_values=values)
    path = FLAGFILES / f"{name}.flags"
    values(["experiment", *values.read_flags_from_files([f"--flagfile={path}"])])
    return engine_flags.config_from_flags(values)
