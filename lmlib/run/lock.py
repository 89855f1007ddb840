"""Who writes to a run: lock, heartbeat, status, stop."""

import fcntl
import json
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lmlib.files import read_json, utc_now


def lock_holder(run_dir: Path) -> str | None:
    """The process that holds the run, as "pid on machine"; None if none does."""
    try:
        file = open(run_dir.parent / ".locks" / f"{run_dir.name}.lock")  # noqa: SIM115 (closed below)
    except OSError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except OSError:
            return file.read().strip() or "unknown"


def _take(file: Any):
    """Lock a file, waiting a moment for one who only looks whether it is locked; OSError if somebody holds it."""
    for _ in range(5):
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def hold_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run for this process. The system drops the lock with the process, so a stale one is no obstacle.

    Raises:
        ValueError: another process holds it; its pid is named.
    """
    path = run_dir.parent / ".locks" / f"{run_dir.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            _take(file)
        except OSError:
            file.seek(0)
            raise ValueError(
                f"{run_dir} is being written by process {file.read().strip() or 'unknown'}; "
                "stop that one first, or choose another run_name."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


BEAT = 5.0  # seconds between two signs of life


@contextmanager
def heartbeat(run_dir: Path) -> Iterator[None]:
    """While the run goes on, renew heartbeat.json every BEAT seconds, from a thread, so that whoever sees the folder can
    tell it from a dead one; removed at the end, left behind by a kill."""
    path, ended = run_dir / "heartbeat.json", threading.Event()
    sign = json.dumps({"pid": os.getpid(), "machine": platform.node(), "started": utc_now()})

    def beat():
        while True:
            with suppress(OSError):  # a full disk is the saver's to report
                path.write_text(sign)
            if ended.wait(BEAT):
                return

    thread = threading.Thread(target=beat, daemon=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            path.unlink(missing_ok=True)
            run_dir.rmdir()  # if nothing came of it


def run_status(run_dir: Path) -> str:
    """A run's state: "finished", "running", "died" (its last sign of life is old, or its process gone), "stopped", "empty"."""
    try:
        age = time.time() - (run_dir / "heartbeat.json").stat().st_mtime
    except OSError:
        age = math.inf
    try:
        sign = read_json(run_dir / "heartbeat.json")
    except ValueError:  # caught half-written
        sign = None
    if age < math.inf:
        here = isinstance(sign, dict) and sign.get("machine") == platform.node()
        if lock_holder(run_dir) is not None if here else age < 6 * BEAT:
            return "running"
    if (run_dir / "results.json").exists():
        return "finished"
    if age < math.inf:
        return "died"
    return "stopped" if (run_dir / "metrics.jsonl").exists() else "empty"


@contextmanager
def stop_requests(run_dir: Path) -> Iterator[Callable[[], str]]:
    """Yields a function that says why the run should stop, or "". A second Ctrl-C interrupts at once."""
    asked: list[str] = []
    (run_dir / "stop").unlink(missing_ok=True)  # meant for an earlier session

    def note(number: int, frame: Any):
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    def reason() -> str:
        if (run_dir / "stop").exists():
            (run_dir / "stop").unlink(missing_ok=True)
            asked.append("python -m lmlib stop")
        return asked[0] if asked else ""

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM) if in_main}
    try:
        yield reason
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
