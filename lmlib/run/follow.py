"""Train a run in several processes from one that only watches: a notebook, or a script."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from lmlib import checkpoint
from lmlib.errors import Stopped, UserError
from lmlib.files import PROJECT_ROOT
from lmlib.parameters import absolute_paths
from lmlib.run.lock import PARENT
from lmlib.run.records import Record
from lmlib.run.start import Start

PAUSE = 0.1  # seconds between two looks for new records


def follow(start: Start) -> Iterator[Record]:
    """Train a run by the command `lmlib train`, and yield its records as they are written.

    Closing the generator, or an interrupt, ends the step and saves, in all processes.

    Raises:
        ValueError: the run could not be trained; with the last lines that it printed.
        Stopped: the run was asked to stop, and is saved.
    """
    config, run_dir = start.config, start.config.run_dir
    position = checkpoint.read_state(start.source)["metrics_size"] if start.resumes else 0
    before = _written(run_dir)
    with tempfile.TemporaryDirectory() as folder:
        recipe, log = Path(folder) / "recipe.yaml", Path(folder) / "log"
        parameters = absolute_paths(config.to_dict())
        recipe.write_text(yaml.safe_dump(parameters, sort_keys=False), "utf-8")
        with open(log, "w", encoding="utf-8") as output:
            # A session of its own, so that a terminal's Ctrl-C reaches it once.
            process = subprocess.Popen(
                [sys.executable, "-m", "lmlib", "train", str(recipe)], cwd=PROJECT_ROOT,
                env={**os.environ, PARENT: str(os.getpid())},
                stdout=output, stderr=output, start_new_session=True)
        try:
            # Once config.json is written, metrics.jsonl holds no record of lost steps any more.
            while process.poll() is None and _written(run_dir) == before:
                time.sleep(PAUSE)
            if _written(run_dir) != before:
                yield from _new_records(run_dir / "metrics.jsonl", position, process)
            process.wait()
        except BaseException:  # the consumer leaves, or Ctrl-C
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        lines = log.read_text("utf-8", "replace").strip().splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith("Error: ")]
    said = "\n".join(lines[starts[-1]:] if starts else lines[-5:])
    if process.returncode == 130:
        raise Stopped(lines[-1] if lines else "Stopped.")
    if process.returncode:
        raise UserError(said.removeprefix("Error: "))


def _written(run_dir: Path) -> int:
    """Return when config.json was written, in nanoseconds; 0 if it was not."""
    file = run_dir / "config.json"
    return file.stat().st_mtime_ns if file.exists() else 0


def _new_records(metrics: Path, position: int, process: subprocess.Popen) -> Iterator[Record]:
    """Yield the records that are written from a position on, until the process has ended."""
    is_running = True
    with open(metrics, "rb") as file:
        while is_running:
            is_running = process.poll() is None  # before reading, so that the end is read too
            file.seek(position)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]  # the last line may be half-written
            position += len(whole)
            for values in map(json.loads, whole.decode().splitlines()):
                timing = values.pop("timing", {})
                yield Record(values.pop("kind"), values.pop("step"), values, timing)
            if is_running and not whole:
                time.sleep(PAUSE)
