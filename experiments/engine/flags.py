"""The flags of the commands: one for each option of a run, with the option's name."""

from typing import Any

from absl import flags

from experiments.engine import config, help_text, options
from experiments.engine.config import Config


def define(
    only: tuple[str, ...] = (), flag_values: flags.FlagValues = flags.FLAGS, **defaults: Any
) -> None:
    """Defines a flag for each option of a run.

    Args:
      only: the options to define; empty for all.
      flag_values: where to define them.
      **defaults: a command's own defaults of some options.
    """
    for name in only or config.OPTIONS:
        known = config.OPTIONS[name]
        default = defaults.get(name, known.default)
        module = f"{help_text.SECTION}{known.section.title}"
        flags.DEFINE_flag(_flag(known, default), flag_values, module_name=module)


def _flag(known: config.Option, default: Any) -> flags.Flag[Any]:
    help = known.metadata["help"]
    if choices := known.metadata["choices"]:
        help += f" One of: {', '.join(choice or '(empty)' for choice in choices)}."
    if known.kind is bool:
        return flags.BooleanFlag(known.name, default, help)
    parsers = {int: flags.IntegerParser, float: flags.FloatParser}
    parser = parsers.get(known.kind, flags.ArgumentParser)()
    value = options.to_text(default) if isinstance(default, tuple) else default
    return flags.Flag(parser, flags.ArgumentSerializer(), known.name, value, help)


def config_from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
    """Returns the config of the flags' values; options without a flag keep their defaults.

    Raises:
      ValueError: an option is out of range or two do not go together.
    """
    given = {name: flag_values[name].value for name in config.OPTIONS if name in flag_values}
    return config.from_flat(**given)
