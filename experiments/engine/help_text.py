"""The text of --help: what the command is, the flags that matter first, or all flags by section."""

import inspect
import sys
import textwrap

from absl import flags

from experiments.engine import config

SECTION = "options: "  # begins the name of the absl module of an option's flag
_WIDTH = 100

Flags = list[flags.Flag]


def help_text(*, full: bool, flag_values: flags.FlagValues = flags.FLAGS) -> str:
    """Returns the help of the running command.

    Args:
      full: show all options of a run, by section; otherwise those that matter first.
      flag_values: where the flags are defined.
    """
    by_module = flag_values.flags_by_module_dict()
    sections = {
        module.removeprefix(SECTION): section
        for module, section in by_module.items()
        if module.startswith(SECTION)
    }
    options = [flag for section in sections.values() for flag in section]
    first = [flag for flag in options if config.OPTIONS[flag.name].metadata["main"]]
    about = inspect.cleandoc(sys.modules["__main__"].__doc__ or sys.argv[0])
    parts = [about]
    if own := _own_flags(flag_values):
        parts.append(_group("Flags of this command", own))
    if full or len(first) == len(options):
        parts += [_group(title, section) for title, section in sections.items()]
    else:
        parts.append(_group("The options of a run that matter first", first))
        parts.append(f"--helpfull shows all {len(options)} options of a run, by section.")
    parts.append("--flagfile=FILE reads flags from a file. Of a flag given twice the last counts.")
    return "\n\n".join(parts)


def _own_flags(flag_values: flags.FlagValues) -> Flags:
    """Returns the flags that are not options of a run."""
    return [
        flag
        for module, defined in flag_values.flags_by_module_dict().items()
        if module == sys.argv[0] or module.startswith("experiments.")
        for flag in defined
    ]


def _group(title: str, group: Flags) -> str:
    return "\n".join([f"{title}:", *(_entry(flag) for flag in group)])


def _entry(flag: flags.Flag) -> str:
    # absl appends a remark to the help of a flag that may be repeated.
    help = flag.help.partition(";\n")[0].rstrip(".") + "."
    default = "" if flag.default in (None, "", []) else f" Default: {flag.default}."
    text = textwrap.fill(f"{help}{default}", _WIDTH - 6)
    name = f"[no]{flag.name}" if flag.boolean else flag.name
    return f"  --{name}\n{textwrap.indent(text, '      ')}"
