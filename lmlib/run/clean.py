"""What killed and deleted runs leave behind: caches and drafts that no run uses."""

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lmlib.data.verify import SHARDS
from lmlib.files import read_mapping
from lmlib.run.lock import is_running

DEPTHS = ("", "*/", "*/*/", "*/*/*/")  # where runs lie in a folder of runs; sweeps nest them
STORE = re.compile(r"[0-9a-f]{24}")
DRAFT = re.compile(r"([0-9a-f]{24})\.(draft-.+|damaged)")
OLD_DRAFT = re.compile(r"([0-9a-f]{24})\.(\d+)-[0-9a-f]{8}")  # of earlier versions, with the pid
DAY = 24 * 60 * 60


@dataclass(frozen=True)
class Leftover:
    """A file or folder that can be deleted."""
    path: Path
    size: int  # bytes
    why: str


def find_leftovers(output_dir: Path) -> list[Leftover]:
    """List what can be deleted in a folder of runs, those of sweeps included; changes nothing.

    Nothing of a running run is listed, and no checkpoint.
    """
    runs = {file.parent for name in ("config.json", "metrics.jsonl", "environment.json")
            for file in _glob(output_dir, name) if file.parent.parent.name != "checkpoints"}
    names, hashes = _used_stores(runs)
    found = []
    for tokens in _glob(output_dir, ".tokens"):
        if tokens.is_symlink():
            continue  # other folders may share it
        spares = any(is_running(run) and not _names_store(run) for run in runs
                     if run.parent == tokens.parent)  # it starts, and may be about to use any
        for folder in sorted(tokens.iterdir()):
            is_used = spares or folder.name in names or _hashes(folder) in hashes
            if folder.is_dir() and (why := _why_unused(folder, is_used)):
                found.append(Leftover(folder, _size(folder), why))
    for run in sorted(runs):
        if not is_running(run) and not is_running(run.resolve()):
            found += [Leftover(path, _size(path), why) for path, why in _run_leftovers(run)]
    return [leftover for leftover in found if not leftover.path.is_symlink()]


def delete(output_dir: Path, shown: list[Leftover]) -> list[Leftover]:
    """Delete what was found, and return what was kept since a process uses it by now.

    Raises OSError if the system refuses.
    """
    unused = {leftover.path for leftover in find_leftovers(output_dir)}
    return [leftover for leftover in shown
            if leftover.path not in unused or not _delete(leftover.path)]


def _delete(path: Path) -> bool:
    """Delete a file or folder; False for a store that a process builds."""
    if path.parent.name != ".tokens":
        path.unlink() if path.is_file() else shutil.rmtree(path)
        return True
    with _lock(path) as is_free:
        if is_free:
            doomed = path.with_name(f"{path.name[:24]}.draft-{uuid.uuid4().hex[:8]}")
            path.rename(doomed)  # nobody finds a store that is half-deleted
            shutil.rmtree(doomed)
    return is_free


# ---- Token stores ----

def _used_stores(runs: set[Path]) -> tuple[set[str], list[dict]]:
    """Return the stores that runs name, and the hashes by which runs of older versions do."""
    known = [read_mapping(run / "environment.json") for run in runs]
    names = {environment["tokens"] for environment in known
             if isinstance(environment.get("tokens"), str)}
    hashes = [environment["fingerprints"] for environment in known
              if isinstance(environment.get("fingerprints"), dict)]
    return names, hashes


def _names_store(run: Path) -> bool:
    return bool(read_mapping(run / "environment.json").keys() & {"tokens", "fingerprints"})


def _hashes(folder: Path) -> dict | None:
    return read_mapping(folder / "store.json").get("sha256")


def _why_unused(folder: Path, is_used: bool) -> str:
    """Say why a folder in .tokens can be deleted; "" if it cannot."""
    if _lock_file(folder).exists():
        with _lock(folder) as is_free:
            if not is_free:
                return ""  # a process is building it
    if STORE.fullmatch(folder.name):
        return "" if is_used else "tokens that no run uses"
    if folder.name.endswith(SHARDS):  # the same command would continue from them
        is_old = time.time() - folder.stat().st_mtime > 7 * DAY
        return "shards of a preparation that was interrupted a week ago or more" if is_old else ""
    if DRAFT.fullmatch(folder.name):
        return "draft of tokens whose build ended early"
    if old := OLD_DRAFT.fullmatch(folder.name):
        age = time.time() - folder.stat().st_mtime
        if age > DAY or _has_ended(int(old[2])):
            return "draft of tokens whose build ended early"
    return ""


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name[:24]}.lock")


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the lock under which a store is built, if it is free; yields whether it is."""
    lock = FileLock(_lock_file(folder))
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _has_ended(pid: int) -> bool:
    if os.name != "posix":  # where asking would end the process
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass  # another user's
    return False


# ---- Run folders ----

def _run_leftovers(run: Path) -> Iterator[tuple[Path, str]]:
    """Yield what an interrupted save or write left in a run's folder, and why it can go."""
    for path in sorted((run / "checkpoints").glob(".draft_step_*")):
        yield path, "draft of a checkpoint whose save ended early"
    for path in sorted((run / "checkpoints").glob(".deleted_step_*")):
        yield path, "checkpoint whose deletion ended early"
    for folder in (run, run / "evaluations"):
        for path in sorted(folder.glob(".*.draft")):
            yield path, "draft of a file whose write ended early"


# ---- Files ----

def _glob(output_dir: Path, name: str) -> list[Path]:
    return sorted(path for depth in DEPTHS for path in output_dir.glob(depth + name))


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())
