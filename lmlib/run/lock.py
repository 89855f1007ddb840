"""Who writes to a run's folder: the lock, the heartbeat, the run's status, requests to stop."""

import json
import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lmlib.errors import Held
from lmlib.files import read_mapping, utc_now

BEAT = 5.0  # seconds between heartbeats
STALE = 6 * BEAT  # age of the heartbeat of a process that has died, seen from another machine
HELD = 75  # exit status of `lmlib notebook` where another process trains the run
SESSION = "LMLIB_SESSION"  # in the environment: which `lmlib notebook` started this process
PARENT = "LMLIB_PARENT"  # in the environment: the process with which this one is to stop


def _lock_file(run_dir: Path) -> Path:
    return run_dir.parent / ".locks" / f"{run_dir.name}.lock"  # outside what users copy and delete


@contextmanager
def hold_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run for this process; raises a ValueError that names the process that holds it.

    The system drops the lock when the process ends, even by a kill, so no stale lock remains.
    Machines may not see each other's locks: the heartbeat of another one must be stale too, which
    is waited for.
    """
    path = _lock_file(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:  # waits an instant, since `lock_holder` may hold it to look
        held = FileLock(path).acquire(timeout=1, poll_interval=0.02)
    except Timeout:
        raise Held(f"{run_dir} is being written by process {_pid(path)}; stop that one first, "
                   "or choose another run_name.") from None
    with held:
        _wait_until_stale(run_dir)
        path.with_suffix(".pid").write_text(f"{os.getpid()} on {platform.node()}")
        yield


def _wait_until_stale(run_dir: Path):
    """Watch a heartbeat that another machine left; a ValueError if it keeps changing.

    Clocks of machines differ, so even one that looks old is watched for two beats.
    """
    age, writer = _beat_age(run_dir), _beating(run_dir)
    if age is None or _beats_here(run_dir) or age > 3600:
        return
    wait = max(2 * BEAT, STALE - age)
    logging.getLogger(__name__).warning(
        "%s was written by process %s %.0f seconds ago; waiting for %.0f seconds to see whether it "
        "still is.", run_dir, writer, age, wait)
    until, before = time.monotonic() + wait, _beat_time(run_dir)
    while time.monotonic() < until:
        time.sleep(0.2)
        _beating(run_dir)  # a network file system looks at the file again when it is opened
        if _beat_time(run_dir) not in (before, None):
            raise Held(f"{run_dir} is being written by process {writer}; stop that one first, "
                       "or choose another run_name.")


def lock_holder(run_dir: Path) -> str | None:
    """Return the process that holds the run, as "pid on machine"; None if none does."""
    return _pid(_lock_file(run_dir)) if _is_locked(run_dir) else None


def run_holder(run_dir: Path) -> str:
    """Return the process that writes to the run, by its lock or heartbeat, as "pid on machine"."""
    return lock_holder(run_dir) or _beating(run_dir)


def _beating(run_dir: Path) -> str:
    beat = read_mapping(run_dir / "heartbeat.json")
    return f"{beat.get('pid', 'unknown')} on {beat.get('machine', 'unknown')}"


def _is_locked(run_dir: Path) -> bool | None:
    """Say whether the run is locked; None where this user may not look."""
    path = _lock_file(run_dir)
    try:
        if path.exists():
            # Patiently: another process that looks holds the lock for an instant too.
            with FileLock(path).acquire(timeout=0.2, poll_interval=0.01):
                pass
    except Timeout:
        return True
    except OSError:
        return None
    return False


def _pid(lock_file: Path) -> str:
    try:
        return lock_file.with_suffix(".pid").read_text().strip() or "unknown"
    except OSError:
        return "unknown"


@contextmanager
def heartbeat(run_dir: Path) -> Iterator[None]:
    """Rewrite heartbeat.json every BEAT seconds from a thread, so that readers see the run alive.

    The file is removed at the end; a kill leaves it behind, and it grows old.
    """
    path, ended = run_dir / "heartbeat.json", threading.Event()
    content = {"pid": os.getpid(), "machine": platform.node(), "started": utc_now(),
               "session": os.environ.get(SESSION)}

    def beat():
        while not ended.is_set():
            with suppress(OSError):  # a full disk is for the saver to report
                path.write_text(json.dumps(content))
            ended.wait(BEAT)

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
            run_dir.rmdir()  # succeeds only if the run has written nothing


def run_status(run_dir: Path) -> str:
    """Return "running", "finished", "died" (a heartbeat is left), "stopped" or "empty"."""
    if (age := _beat_age(run_dir)) is not None:
        locked = _is_locked(run_dir) if _beats_here(run_dir) else None
        if age < STALE if locked is None else locked:
            return "running"
    if (run_dir / "results.json").exists():
        return "finished"
    if age is not None:
        return "died"
    return "stopped" if (run_dir / "metrics.jsonl").exists() else "empty"


def _beat_time(run_dir: Path) -> float | None:
    """Return the time of the run's heartbeat; None if it has none."""
    try:
        return (run_dir / "heartbeat.json").stat().st_mtime
    except OSError:
        return None


def _beat_age(run_dir: Path) -> float | None:
    beat = _beat_time(run_dir)
    return None if beat is None else time.time() - beat


def _beats_here(run_dir: Path) -> bool:
    """Whether the run's heartbeat is that of a process on this machine."""
    return read_mapping(run_dir / "heartbeat.json").get("machine") == platform.node()


def is_running(run_dir: Path) -> bool:
    """Whether a process writes to the run, here or elsewhere; True where this user may not look."""
    return _is_locked(run_dir) is not False or run_status(run_dir) == "running"


@contextmanager
def stop_requests(run_dir: Path, watches_file: bool = True) -> Iterator[Callable[[], str]]:
    """Yield a function that says why the run should stop, or "" if it should not.

    Ctrl-C, SIGTERM, SIGHUP (unless it was ignored, as by nohup) and a file named `stop` ask; a
    second Ctrl-C interrupts at once. Of several processes one watches the file.
    """
    asked: list[str] = []
    if watches_file:
        (run_dir / "stop").unlink(missing_ok=True)  # it was meant for an earlier session

    def note(number: int, frame: Any):
        # Only Ctrl-C: a terminal that closes may send SIGHUP twice, a scheduler SIGTERM.
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    def reason() -> str:
        if watches_file and (run_dir / "stop").exists():
            (run_dir / "stop").unlink(missing_ok=True)
            asked.append("lmlib stop")
        return asked[0] if asked else ""

    in_main = threading.current_thread() is threading.main_thread()  # signals arrive only there
    signals = (signal.SIGINT, signal.SIGTERM, *hangup_signals()) if in_main else ()
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield reason
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hangup_signals() -> tuple[signal.Signals, ...]:
    """Return SIGHUP where it exists and is not ignored, as nohup starts a process."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        return (signal.SIGHUP,)
    return ()


def stop_with_parent(parent: int | None = None):
    """Ask this process to stop, as SIGTERM does, once the process that started it has ended.

    PARENT in the environment has that process's id, which its own children do not inherit; else it
    is `parent`, if given.
    """
    given = os.environ.pop(PARENT, None)
    parent = int(given) if given else parent

    def watch():
        while os.getppid() == parent:  # on Windows, always
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)  # to the main thread, which may be waiting

    if parent:
        threading.Thread(target=watch, daemon=True).start()
