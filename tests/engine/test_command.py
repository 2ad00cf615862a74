"""How a command ends: with a word and an exit code for each kind of end."""

import pytest

from experiments.engine import command


def while_importing(error):
    """The error of an extension whose import a signal ended."""
    imported = ImportError("initialization failed")
    imported.__cause__ = error
    return imported


@pytest.mark.parametrize(
    "error, code, told",
    [
        (ValueError("--a=1:\n  expected 2"), 2, "error: --a=1: expected 2\n"),
        (FileNotFoundError("no file"), 2, "error: no file\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (while_importing(KeyboardInterrupt()), 130, "interrupted\n"),
        (while_importing(SystemExit(75)), 75, ""),
        (SystemExit(75), 75, ""),
    ],
)
def test_the_end_of_a_command(error, code, told, capsys):
    with pytest.raises(SystemExit) as ended, command.user_errors():
        raise error
    assert (ended.value.code, capsys.readouterr().err) == (code, told)


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ImportError, match="no such module"), command.user_errors():
        raise ImportError("no such module")
