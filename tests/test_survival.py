"""Killed without warning, a run goes on as if nothing had been: the short form of `make survival`."""

import subprocess
import sys

from lmlib.config import PROJECT_ROOT


def test_a_run_survives_kills_corruption_and_a_full_disk():
    """kill -9 at random and at stages of a save; every file of a checkpoint damaged in every way; no space left."""
    command = [sys.executable, "benchmarks/survival.py", "--kills", "4", "--stages", "8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("|\n") == 8
