"""What killed and deleted runs leave behind: caches and drafts that no run uses."""

import re
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from lmlib.data.verify import SHARDS
from lmlib.files import read_mapping
from lmlib.run.lock import is_running

DEPTHS = ("", "*/", "*/*/", "*/*/*/")  # where runs lie in a folder of runs; sweeps nest them
STORE = re.compile(r"[0-9a-f]{24}")
DRAFT = re.compile(r"([0-9a-f]{24})\.(draft-.+|damaged)")
OLD_DRAFT = re.compile(r"[0-9a-f]{24}\.\d+-[0-9a-f]{8}")  # of earlier versions, which took no lock
DAY = 24 * 60 * 60
LITTER = {  # what an interrupted save or write leaves in a run's folder, and why it can go
    "checkpoints/.draft_step_*": "draft of a checkpoint whose save ended early",
    "checkpoints/.deleted_step_*": "checkpoint whose deletion ended early",
    ".*.draft": "draft of a file whose write ended early",
    "evaluations/.*.draft": "draft of a file whose write ended early"}


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
    known = {run: read_mapping(run / "environment.json") for run in runs}
    # A run names its store; those of older versions have the hashes of its files instead.
    names = [environment.get("tokens") for environment in known.values()]
    hashes = [environment["fingerprints"] for environment in known.values()
              if isinstance(environment.get("fingerprints"), dict)]
    found = []
    for tokens in _glob(output_dir, ".tokens"):
        if tokens.is_symlink():
            continue  # other folders may share it
        spares = any(is_running(run) and not known[run].keys() & {"tokens", "fingerprints"}
                     for run in runs if run.parent == tokens.parent)  # it starts, and may use any
        for folder in sorted(tokens.iterdir()):
            is_used = (spares or folder.name in names
                       or read_mapping(folder / "store.json").get("sha256") in hashes)
            if folder.is_dir() and (why := _why_unused(folder, is_used)):
                found.append(Leftover(folder, _size(folder), why))
    for run in sorted(runs):
        if not is_running(run) and not is_running(run.resolve()):
            found += [Leftover(path, _size(path), why) for pattern, why in LITTER.items()
                      for path in sorted(run.glob(pattern))]
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
    if not (held := _take_lock(path)):
        return False
    with held:
        doomed = path.with_name(f"{path.name[:24]}.draft-{uuid.uuid4().hex[:8]}")
        path.rename(doomed)  # nobody finds a store that is half-deleted
        shutil.rmtree(doomed)
    return True


# ---- Token stores ----

def _why_unused(folder: Path, is_used: bool) -> str:
    """Say why a folder in .tokens can be deleted; "" if it cannot."""
    if _lock_file(folder).exists():
        if not (held := _take_lock(folder)):
            return ""  # a process is building it
        held.lock.release()
    if STORE.fullmatch(folder.name):
        return "" if is_used else "tokens that no run uses"
    if folder.name.endswith(SHARDS):  # the same command would continue from them
        is_old = time.time() - folder.stat().st_mtime > 7 * DAY
        return "shards of a preparation that was interrupted a week ago or more" if is_old else ""
    is_old = OLD_DRAFT.fullmatch(folder.name) and time.time() - folder.stat().st_mtime > DAY
    if DRAFT.fullmatch(folder.name) or is_old:
        return "draft of tokens whose build ended early"
    return ""


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name[:24]}.lock")


def _take_lock(folder: Path) -> AcquireReturnProxy | None:
    """Take the lock under which a store is built, for `with`; None if a process has it."""
    with suppress(Timeout, OSError):
        return FileLock(_lock_file(folder)).acquire(timeout=0)
    return None


# ---- Files ----

def _glob(output_dir: Path, name: str) -> list[Path]:
    return sorted(path for depth in DEPTHS for path in output_dir.glob(depth + name))


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())
