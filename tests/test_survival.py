"""A run that is killed resumes as if nothing had happened: the short forms of `make survival`."""

import subprocess
import sys

import pytest

from lmlib.files import PROJECT_ROOT


def survival(options: str) -> str:
    """Return the table that survival.py prints; its exit status must be 0."""
    command = [sys.executable, "tests/support/survival.py", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_run_survives_kills_corruption_full_disks_and_hostile_input():
    """The script exits with an error unless every run of every row ended correctly."""
    table = survival("--kills 4 --stages 6 --corruptions 6 --texts 6 --alone")
    assert table.count(" of ") >= 13 and "killed at random | 4 of 4 |" in table


@pytest.mark.slow
def test_transformers_trainer_is_killed_and_corrupted_in_the_same_way():
    """The second column is filled in; no particular counts are expected of it, except one."""
    table = survival("--kills 2 --stages 2 --corruptions 2 --texts 1")
    assert "| a finished run started again | 3 of 3 | 0 of 3 |" in table
    assert table.splitlines()[0].endswith("| transformers.Trainer, correct |")
