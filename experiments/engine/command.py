"""How a command begins and ends: its flags, its help, and a user's mistakes in one line."""

from collections.abc import Iterator, Sequence
import contextlib
import io
import pathlib
import sys

from absl import flags, logging

from experiments.engine import help_text, signals

USER_ERROR = 2  # the exit code of a user's mistake


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags of a command, for `app.run`.

    Prints the help for --help, --helpshort and --helpfull, and exits with 0. Prints one line and
    exits with 2 where a flag is wrong.
    """
    for argument in argv[1:]:
        name = argument.lstrip("-")
        if argument.startswith("-") and name in ("h", "?", "help", "helpshort", "helpfull"):
            print(help_text.help_text(full=name == "helpfull"))
            sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except UnicodeDecodeError as error:
        files = ", ".join(a.partition("=")[2] for a in argv if "flagfile=" in a)
        message = f"--flagfile={files}: expected UTF-8, found {error}: give these options as flags"
        sys.exit(_flag_error(argv[0], message))
    except flags.Error as error:
        sys.exit(_flag_error(argv[0], " ".join(str(error).split()) + _place(argv, error)))
    if len(rest) > 1:
        message = f"unexpected argument {rest[1]!r}: options are written --name=value"
        sys.exit(_flag_error(argv[0], message))
    return rest


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with one line and exit code 2 where what the user gave is at fault.

    Those are the block's ValueErrors and OSErrors. Ctrl-C and SIGTERM end it as `stops` says.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may hold any bytes
    logging.set_verbosity(logging.FATAL)  # orbax logs all that it does, and what it raises
    try:
        with stops():
            yield
    except (ValueError, OSError) as error:
        sys.exit(print_error(error))


@contextlib.contextmanager
def stops(interrupted: str = "interrupted") -> Iterator[None]:
    """Ends the program with a word and an exit code where Ctrl-C or SIGTERM ends the block.

    Args:
      interrupted: the word for Ctrl-C.
    """
    try:
        with signals.raised():
            yield
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(signals.INTERRUPTED)
    except signals.ToldToStop:
        print(signals.TOLD_TO_STOP, file=sys.stderr)
        sys.exit(signals.RUN_AGAIN)


def print_error(error: BaseException) -> int:
    """Prints an error in one line; returns the exit code of a user's mistake."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return USER_ERROR


def check_free(name: str, path: pathlib.Path) -> None:
    """Raises ValueError where the file of flag `name` exists already, or its folder does not."""
    if path.exists():
        raise ValueError(f"--{name}={path} exists: choose another name")
    if not path.parent.is_dir():
        raise ValueError(f"--{name}={path}: no folder {path.parent}")


def _flag_error(program: str, message: str) -> int:
    print(f"{pathlib.Path(program).stem}: {message}", file=sys.stderr)
    return USER_ERROR


def _place(argv: Sequence[str], error: flags.Error) -> str:
    """Returns the line of the flagfile that holds an unknown flag, for whoever mends it."""
    unknown = getattr(error, "flagname", "")
    for argument in argv[1:]:
        key, _, value = argument.lstrip("-").partition("=")
        path = pathlib.Path(value)
        if unknown and key == "flagfile" and path.is_file():
            lines = path.read_text(errors="replace").splitlines()
            for number, line in enumerate(lines, start=1):
                if line.strip().lstrip("-").partition("=")[0] == unknown:
                    return f" ({path}, line {number})"
    return ""
