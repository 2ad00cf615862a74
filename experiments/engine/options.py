"""How a section of a run's options is declared: typed fields with help and limits."""

from collections.abc import Iterator, Sequence
import dataclasses
import pathlib
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    main: bool = False,
    earlier: Any = None,
) -> Any:
    """Declares a field of a `Section`.

    Args:
      default: the default.
      help: a full sentence that can be understood alone, with the unit.
      low: the lowest value allowed, or None.
      high: the highest value allowed, or None.
      choices: the texts allowed; empty for any.
      main: whether the option is among those that --help shows.
      earlier: what runs did before there was this option; None for the default.
    """
    metadata = {
        "help": help,
        "low": low,
        "high": high,
        "choices": tuple(choices),
        "main": main,
        "earlier": default if earlier is None else earlier,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Section:
    """Options that belong together. Subclasses declare fields by `option`.

    Raises:
      ValueError: an option is out of range or two do not go together; the message names the flag.
    """

    title: ClassVar[str]
    free_on_resume: ClassVar[bool] = False  # whether a resumed run may change these options

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        self.check()

    def check(self) -> None:
        """Raises ValueError where options of this section do not go together."""


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    if isinstance(value, str) and ("\n" in value or "\r" in value):
        raise ValueError(f"--{field.name}={value!r}: has a line break, which no flagfile can hold")
    choices, low, high = (field.metadata[name] for name in ("choices", "low", "high"))
    if choices and value not in choices:
        raise ValueError(f"--{field.name}={value}: expected one of {', '.join(choices)}")
    too_low, too_high = low is not None and not low <= value, high is not None and not value <= high
    if too_low or too_high:
        expected = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"--{field.name}={value}: expected {expected}")


def fields(section: type[Section]) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Yields each field of a section with its type."""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        yield field, hints[field.name]


def to_text(value: Any) -> str:
    """Returns a value as a flag's text: a list with commas between, None as nothing."""
    if value is None:
        return ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def from_text(name: str, kind: Any, text: str) -> Any:
    """Returns a flag's text as a value of the field's type.

    Raises:
      ValueError: the text is not of that type.
    """
    if kind is bool:
        return _boolean(name, text)
    if get_origin(kind) is Literal:
        return text
    if get_origin(kind) is not tuple:
        return kind(text)
    item = get_args(kind)[0]
    parts = [part.strip() for part in text.split(",")] if text else []
    expected = ValueError(f"--{name}={text}: expected numbers with commas between")
    if item is int and not all(part.isdecimal() for part in parts):
        raise expected
    try:
        return tuple(item(part) for part in parts)
    except ValueError:
        raise expected from None


def write_flagfile(path: pathlib.Path, text: str) -> None:
    """Writes the text of a flagfile. The names of files in it may hold any bytes."""
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def read_flagfile(path: pathlib.Path) -> list[str]:
    """Returns the lines of what `write_flagfile` wrote."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    return text.removesuffix("\n").split("\n") if text else []


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"--{name}={text}: expected True or False")
    return text.lower() == "true"
