"""Trains on the emoji that come with the project: half of the classes train.

python -m experiments.emoji --flagfile=experiments/flagfiles/emoji.flags
"""

from absl import app

from experiments.engine import command, flags, train_loop

if __name__ == "__main__":
    flags.define(dataset="emoji", workdir="runs/emoji")
    app.run(train_loop.main, flags_parser=command.parse_flags)
