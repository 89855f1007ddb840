"""Commands as processes that a test watches, signals and waits for."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lmlib.files import PROJECT_ROOT

SMOKE = PROJECT_ROOT / "params" / "smoke.yaml"
LONG = {"total_steps": 100_000, "checkpoint_every": 50_000, "eval_every": 50_000}


def command(name: str, **parameters) -> list[str]:
    """Return the command line of `lmlib NAME params/smoke.yaml` with these parameters."""
    pairs = [word for pair in parameters.items() for word in ("-p", *map(str, pair))]
    return [sys.executable, "-m", "lmlib", name, str(SMOKE), *pairs]


def start(log: Path, *words: str, **options) -> subprocess.Popen:
    """Start a process whose output goes to the file `log`."""
    options = {"cwd": PROJECT_ROOT, "stderr": subprocess.STDOUT, **options}
    with open(log, "w") as out:
        return subprocess.Popen([*map(str, words)], **{"stdout": out, **options})


def wait_for(process: subprocess.Popen, log: Path, text: str, times: int = 1):
    """Wait until the process has written `text` to `log` so often."""
    deadline = time.monotonic() + 180
    while (said := log.read_text("utf-8", "replace")).count(text) < times:
        assert time.monotonic() < deadline and process.poll() is None, said
        time.sleep(0.05)


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen):
    """Wait for a condition, while processes run."""
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.1)


def processes_of(folder: Path) -> list[str]:
    """Return the command lines that name a folder, of all processes of this machine."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and file.parent.name != str(os.getpid()):
            found.append(line)
    return found
