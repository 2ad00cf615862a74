"""The dataset that comes with the project, and the command that built it."""
