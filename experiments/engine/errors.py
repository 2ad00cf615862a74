"""The error that ends a run, and the words of others' errors."""


class RunError(ValueError):
    """A run that cannot go on. The message is one line for the user."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its name where it has no message."""
    return str(error).splitlines()[0] if str(error) else repr(error)
