"""Lines about phases that take long."""

import subprocess
import sys

from tests.helpers.paths import ROOT


def test_the_line_of_another_thread_finds_the_lock_of_the_bars_made():
    """Two threads that made it at once left it locked, and the command waited for ever."""
    code = (
        "import tqdm; from experiments.engine import phases\n"
        "assert not hasattr(tqdm.tqdm, '_lock')\n"
        "with phases.told('working'): assert hasattr(tqdm.tqdm, '_lock')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
