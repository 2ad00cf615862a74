"""The commands of the project: `python -m experiments.NAME`."""

from experiments.engine import startup

startup.settle()
