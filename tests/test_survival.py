"""A run that is killed resumes as if nothing had happened: the short forms of `make survival`."""

import subprocess
import sys

import pytest
from survival import CRASHED, ENDED, REFUSED, WARNED, exit_status

from lmlib.files import PROJECT_ROOT

COMMON = [
    "the same run twice",
    "killed at random",
    "killed soon after resuming",
    "killed at each stage of a save",
    "corrupted checkpoints: named or repaired",
    "corrupted checkpoints: no silent change of the result",
    "corrupted checkpoints: the run still ended correctly",
    "a finished run started again",
    "a NaN loss",
]
OWN = [
    "disk full at each stage of a save",
    "a small disk that fills up",
    "read-only folders and files",
    "damaged token cache: named and rebuilt",
    "damaged token cache: the run ended correctly",
    "a second process on the run; a stale lock",
    "hostile parameter files",
    "hostile texts in every page",
]
NEEDS_ROOT = {"a small disk that fills up"}  # it mounts a disk


def survival(options: str) -> list[list[str]]:
    """Return the cells of the table that survival.py prints; its exit status must be 0."""
    command = [sys.executable, "tests/support/survival.py", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    assert lines[0][0] == "what happened" and set(lines[1][0]) <= set("-|")
    return [lines[0], *lines[2:]]


def test_run_survives_kills_corruption_full_disks_and_hostile_input():
    _, *rows = survival("--kills 4 --stages 6 --corruptions 6 --texts 6 --alone")
    counts = {row: tuple(map(int, count.split(" of "))) for row, count in rows}
    assert [row for row in COMMON + OWN if row not in counts] in ([], [*NEEDS_ROOT])
    assert all(correct == count > 0 for correct, count in counts.values())
    expected = {"killed at random": 4, "killed soon after resuming": 2, OWN[0]: 6, OWN[3]: 6}
    assert {row: counts[row][1] for row in expected} == expected


@pytest.mark.ecosystem
def test_transformers_trainer_is_killed_and_corrupted_in_the_same_way():
    """The second column is filled in; no particular counts are expected of it, except one."""
    head, *rows = survival("--kills 2 --stages 2 --corruptions 2 --texts 1")
    assert head[1:] == ["lmlib, correct", "transformers.Trainer, correct"]
    theirs = {row: counts[1] for row, *counts in rows if len(counts) == 2}
    assert list(theirs) == COMMON and theirs["a finished run started again"] == "0 of 3"


@pytest.mark.parametrize(
    ("failure", "said", "expected"),
    [
        (None, [], ENDED),
        (None, ["Resuming from step 48."], ENDED),
        (None, ["checkpoint_step_54 is corrupted. Falling back to step 48."], WARNED),
        (ValueError("checkpoint_step_54 is corrupted"), [], REFUSED),
        (ValueError("invalid literal"), [], CRASHED),
        (ValueError("invalid literal"), ["checkpoint_step_54 is corrupted."], CRASHED),
        (KeyError("checkpoint_step_54"), [], CRASHED),
    ],
    ids=str,
)
def test_damage_is_noticed_only_if_a_message_names_it(failure, said, expected):
    assert exit_status(failure, said, ("checkpoint_step_54",), ValueError) == expected


def test_any_error_of_the_other_trainer_that_names_the_damage_counts():
    names = ("checkpoint-54", "optimizer.pt")
    missing = FileNotFoundError(2, "No such file", "run/checkpoint-54/optimizer.pt")
    assert exit_status(missing, [], names, Exception) == REFUSED
    assert exit_status(RuntimeError("unexpected pos 64"), [], names, Exception) == CRASHED
