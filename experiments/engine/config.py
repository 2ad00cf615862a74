"""The options of a run: its sections, what does not go together across them, and flags.txt."""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any, get_type_hints

from experiments.engine import options
from experiments.engine.batches import BatchOptions
from experiments.engine.datasets import DataOptions
from experiments.engine.losses import LossOptions
from experiments.engine.network import NetworkOptions
from experiments.engine.optimizer import OptimizerOptions
from experiments.engine.processes import DeviceOptions, ProcessOptions
from experiments.engine.runtime import RuntimeOptions
from experiments.engine.schedule import ScheduleOptions


@dataclasses.dataclass(frozen=True)
class Config:
    """The options of a run by section.

    The names of all options differ, so that flags, flags.txt and tables can be flat.

    Raises:
      ValueError: options of two sections do not go together; the message names the flags.
    """

    data: DataOptions = DataOptions()
    batches: BatchOptions = BatchOptions()
    loss: LossOptions = LossOptions()
    network: NetworkOptions = NetworkOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    devices: DeviceOptions = DeviceOptions()
    processes: ProcessOptions = ProcessOptions()
    runtime: RuntimeOptions = RuntimeOptions()

    def __post_init__(self) -> None:
        if self.loss.memory_size and self.data.class_augment:
            raise ValueError(
                f"--memory_size={self.loss.memory_size} and --class_augment: a class would look "
                "another way in each batch; give one of them"
            )
        if self.network.frozen_views:
            self._check_frozen_views()
        if self.data.searched_size != self.data.image_size and self.network.levels != ("H",):
            raise ValueError(
                f"--test_image_size={self.data.test_image_size} and "
                f"--levels={options.to_text(self.network.levels)}: the heads of L and M are of one "
                "size; give --levels=H, or leave --test_image_size out"
            )

    def _check_frozen_views(self) -> None:
        views = self.network.frozen_views
        apart = {
            "class_augment": self.data.class_augment,
            "test_image_size": self.data.searched_size != self.data.image_size,
            "worker_processes": self.runtime.worker_processes,
            "dry_run": self.runtime.dry_run,
            "multihost": self.processes.multihost,
        }
        for name, value in apart.items():
            if value:
                raise ValueError(
                    f"--frozen_views={views} and --{name} do not go together: leave one of them out"
                )
        if self.data.on_bad_image == "skip" and self.runtime.verify_images != "full":
            raise ValueError(
                f"--frozen_views={views} and --on_bad_image=skip: give --verify_images=full, as "
                "no image is replaced later"
            )

    def flat(self) -> dict[str, Any]:
        """Returns {option: value} of all sections."""
        return {
            field.name: getattr(section, field.name)
            for section in (getattr(self, part.name) for part in dataclasses.fields(self))
            for field in dataclasses.fields(section)
        }

    def replace(self, **values: Any) -> "Config":
        """Returns the config with other values of some options."""
        return from_flat(**{**self.flat(), **values})

    def as_flagfile(self) -> str:
        """Returns the text of a flagfile with all options."""
        lines = (f"--{name}={options.to_text(value)}\n" for name, value in self.flat().items())
        return "".join(lines)


@dataclasses.dataclass(frozen=True)
class Option:
    """What is known of an option.

    Attributes:
      name: the name of its flag.
      part: the field of `Config` that holds its section.
      section: the class of its section.
      kind: the type of its value.
      default: its default.
      metadata: what `options.option` was told: help, low, high, choices, main, earlier.
    """

    name: str
    part: str
    section: type[options.Section]
    kind: Any
    default: Any
    metadata: Mapping[str, Any]

    @property
    def free_on_resume(self) -> bool:
        """Whether a resumed run may change the option."""
        return self.section.free_on_resume


_SECTIONS: dict[str, type[options.Section]] = get_type_hints(Config)


def _all_options() -> dict[str, Option]:
    found: dict[str, Option] = {}
    for part, section in _SECTIONS.items():
        for field, kind in options.fields(section):
            found[field.name] = Option(
                field.name, part, section, kind, field.default, field.metadata
            )
    return found


OPTIONS = _all_options()


def from_flat(**values: Any) -> Config:
    """Returns the config of some options' values; the others keep their defaults.

    Args:
      **values: {option: value}. A text is read as the flag's text would be.

    Raises:
      ValueError: no such option, or a value that cannot be; the message names the flag.
    """
    parts: dict[str, dict[str, Any]] = {part: {} for part in _SECTIONS}
    for name, value in values.items():
        if name not in OPTIONS:
            raise ValueError(f"--{name}: no such option")
        known = OPTIONS[name]
        if isinstance(value, str):
            value = options.from_text(name, known.kind, value)
        parts[known.part][name] = value
    sections: dict[str, Any] = {part: _SECTIONS[part](**given) for part, given in parts.items()}
    return Config(**sections)


def from_flagfile(path: pathlib.Path) -> Config:
    """Returns the options of a run from its flags.txt.

    Options that the file is older than have the values of what runs did before there were these.

    Raises:
      ValueError: the file is no such file; the message names the line.
    """
    values = {}
    for number, line in enumerate(options.read_flagfile(path), start=1):
        name, equals, text = line.removeprefix("--").partition("=")
        if name not in OPTIONS or not equals:
            raise ValueError(
                f"{path}, line {number}: expected --option=value of an experiment, found {line!r}"
            )
        try:
            values[name] = options.from_text(name, OPTIONS[name].kind, text)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {line!r}: {error}") from error
    earlier = {name: known.metadata["earlier"] for name, known in OPTIONS.items()}
    return from_flat(**{**earlier, **values})


def as_begun(config: Config, path: pathlib.Path) -> tuple[Config, dict[str, Any]]:
    """Returns the options with which a run goes on that may be older than some of them.

    Args:
      config: the options of the command.
      path: the run's flags.txt.

    Returns:
      The options, and {option: value} of those that are not `config`'s: options that the file is
      older than, that the command leaves at their defaults, and whose defaults are not what runs
      did before.
    """
    lines = options.read_flagfile(path)
    written = {line.partition("=")[0].removeprefix("--") for line in lines}
    flat = config.flat()
    changed = {
        name: known.metadata["earlier"]
        for name, known in OPTIONS.items()
        if name not in written
        and flat[name] == known.default
        and known.metadata["earlier"] != known.default
    }
    return config.replace(**changed), changed


def differences(before: Config, after: Config) -> list[str]:
    """Returns a text for each option that a resumed run may not change and that differs."""
    old, new = before.flat(), after.flat()
    if after.schedule.steps > before.schedule.steps and not after.optimizer.needs_all_steps:
        new["steps"] = old["steps"]
    return [
        f"--{name}={options.to_text(old[name])} there, {options.to_text(new[name])} here"
        for name, known in OPTIONS.items()
        if old[name] != new[name] and not known.free_on_resume
    ]
