"""Ranked List Loss on the emoji that come with the project: half of the classes train, the other half is searched.

python -m experiments.emoji --flagfile=experiments/flagfiles/emoji.flags
"""

from absl import app

from experiments.engine import config, train_loop

if __name__ == "__main__":
    config.define_flags(dataset="emoji", workdir="runs/emoji")
    app.run(train_loop.main, flags_parser=config.parse_flags)
