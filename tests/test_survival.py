"""Killed without warning, a run goes on as if nothing had been: the short forms of `make survival`."""

import subprocess
import sys

import pytest

from lmlib.files import PROJECT_ROOT


def survival(*options: str) -> str:
    command = [sys.executable, "tests/support/survival.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_survives_kills_corruption_full_disks_and_hostile_input():
    """Each kind a few times; the table's every count must equal its number, or the exit status says so."""
    table = survival("--kills", "4", "--stages", "6", "--damages", "6", "--texts", "6", "--alone")
    assert table.count(" of ") >= 13 and "killed at random | 4 of 4 |" in table


@pytest.mark.slow
def test_the_peer_is_killed_and_corrupted_in_the_same_way():
    """The second column is made: its counts are what they are."""
    table = survival("--kills", "2", "--stages", "2", "--damages", "2", "--texts", "1")
    assert "| a finished run started again | 3 of 3 | 0 of 3 |" in table
    assert table.splitlines()[0].endswith("| transformers.Trainer, ended right |")
