"""The commands of the project: `python -m experiments.NAME`."""

# ruff: noqa: E402 - what is imported takes time, and Ctrl-C may come
from experiments.engine import signals

signals.settle()

from experiments.engine import startup

startup.settle()
