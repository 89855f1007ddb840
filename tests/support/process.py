"""Commands as processes that a test watches, signals and waits for."""

import subprocess
import sys
import time
from pathlib import Path

from lmlib.files import PROJECT_ROOT

SMOKE = PROJECT_ROOT / "params" / "smoke.yaml"


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
