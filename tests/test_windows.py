"""What Windows lacks is not needed: the main commands run without it. Windows itself was not tried."""

import os
import subprocess
import sys

import pytest

from lmlib import files
from lmlib.checkpoint import checkpoint_steps
from lmlib.files import PROJECT_ROOT

SCRIPT = PROJECT_ROOT / "tests" / "support" / "like_windows.py"


def like_windows(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], cwd=PROJECT_ROOT, capture_output=True
    )
    output = (done.stdout + done.stderr).decode("cp1252")
    assert done.returncode == 0, output
    return output


def test_a_run_trains_resumes_and_generates(tmp_path):
    overrides = [
        "-p",
        "output_dir",
        tmp_path,
        "-p",
        "checkpoint_every",
        "2",
        "-p",
        "eval_every",
        "2",
    ]
    like_windows("train", "smoke", *overrides, "-p", "total_steps", "2")
    said = like_windows("train", "smoke", *overrides, "-p", "total_steps", "4")
    assert "Resuming from step 2 of 4" in said and "Done: 4 steps" in said
    assert "\\U0001f4be Checkpoint saved" in said  # what its console cannot show is escaped
    assert checkpoint_steps(tmp_path / "smoke") == [2, 4]
    run = tmp_path / "smoke"
    batch = ["--mode", "batch", "--prompts", "To be", "--max-new-tokens", "4"]
    assert "To be" in like_windows("generate", run, *batch)
    assert "smoke" in like_windows("runs", tmp_path)
    like_windows("clean", tmp_path)


def test_a_folder_is_not_opened_where_that_is_impossible(monkeypatch, tmp_path):
    def refuse(path, flags):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        files.sync_folder(tmp_path)
    monkeypatch.delattr(os, "O_DIRECTORY")
    files.sync_folder(tmp_path)
