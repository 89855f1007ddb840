"""Run the commands and code blocks of a page in docs/, as a reader would."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from lmlib.files import PROJECT_ROOT


def blocks(page: str, language: str) -> list[str]:
    text = (PROJECT_ROOT / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def replaced(text: str, smaller: dict[str, str]) -> str:
    """Return a block at a smaller size; each replacement must be found in it."""
    for old, new in smaller.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def run(text: str, folder: Path, given: str = "") -> str:
    """Run a Python block, or one of lmlib's commands, in a process; return what it printed."""
    words = ["-c", text] if "\n" in text else ["-m", *shlex.split(text.split("  #")[0])]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        input=given,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
