"""The error that ends a run."""


class RunError(ValueError):
    """A run that cannot go on. The message is one line for the user."""
