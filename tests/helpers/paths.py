"""Where the project is, and the data that some machines have beside it."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
