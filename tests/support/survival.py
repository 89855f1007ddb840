"""Count what a run survives, beside transformers' Trainer: `make survival`; options shorten it.

Each row says how often, of how many times, a run that was killed, corrupted or out of disk space
ended correctly: with exactly the tensors (by SHA-256) and records of the uninterrupted run, timing
aside, or with an error message that names the problem, changing nothing. A traceback that does not
name the problem counts as a failure, of either trainer.
"""

import argparse
import contextlib
import ctypes
import io
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hostile
import peer
import safetensors
from fingerprint import fingerprint

from lmlib import checkpoint, training
from lmlib.config import RunConfig
from lmlib.data import verify
from lmlib.files import PROJECT_ROOT
from lmlib.model import huggingface, manifest
from lmlib.run.lock import hold_lock

STEPS, SAVE_EVERY = 60, 6
CUT = 54  # a run stopped after this step has one more checkpoint to save
Count = tuple[int, int]  # (how many ended correctly, how many there were)

# ---------------------------------------------------------------------------------------------
# The two trainers


@dataclass(frozen=True)
class Trainer:
    """What the rows need to know about a trainer that keeps each run in a folder."""

    name: str
    run: Callable[[Path, dict], None]  # train or resume; a plan may hold "stop_at" and "nan_at"
    fingerprint: Callable[[Path], Any]
    checkpoint: str  # folder of the checkpoint of a step, with {} for the step
    files: list[str]  # of a checkpoint
    writes: list[tuple[Any, str]]  # functions that write, flush, rename or prune: (holder, name)
    errors: type[Exception]  # what it raises to say what is wrong; others are crashes


def recipe(run: Path) -> RunConfig:
    """Return a small run that uses all that resuming must repeat.

    That is dropout, micro-batches, several epochs and evaluations between checkpoints.
    """
    return RunConfig.load(
        PROJECT_ROOT / "params" / "smoke.yaml",
        output_dir=run.parent,
        run_name=run.name,
        total_steps=STEPS,
        max_tokens=9000,
        batch_size=6,
        micro_batch_size=4,
        eval_every=7,
        checkpoint_every=SAVE_EVERY,
        log_every=1,
    )


def run_ours(run: Path, plan: dict):
    if "nan_at" in plan:
        real = training.accumulate_gradients
        training.accumulate_gradients = lambda *args: (
            real(*args) * (float("nan") if args[5] == plan["nan_at"] else 1.0)
        )
    for record in training.train(recipe(run)):
        if (record.kind, record.step) == ("checkpoint", plan.get("stop_at")):
            return


FILES = [
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "lineage.bin",
    "checkpoint.json",
    "training_state/optimizer.safetensors",
    "training_state/state.json",
]
WRITES = {
    checkpoint: ["save_file", "write_manifest", "write_card", "sync_folder", "_try_to_delete"],
    huggingface: ["save_model", "save_file", "write_json"],
    manifest: ["flush", "write_json"],
}
OURS = Trainer(
    name="lmlib",
    run=run_ours,
    fingerprint=fingerprint,
    checkpoint="checkpoints/checkpoint_step_{}",
    files=FILES,
    writes=[(module, name) for module, names in WRITES.items() for name in names],
    errors=ValueError,
)
THEIRS = Trainer(
    name="transformers.Trainer",
    run=peer.run,
    fingerprint=peer.fingerprint,
    checkpoint="checkpoint-{}",
    files=peer.FILES,
    writes=peer.WRITES,
    errors=Exception,
)


# ---------------------------------------------------------------------------------------------
# One session of a run, in a process of its own

# How a session ends: without a word of what is wrong, with a warning that names it, with an error
# that names it, or in a crash: any other error. A kill is -SIGKILL.
ENDED, WARNED, REFUSED, CRASHED = 0, 3, 4, 5


def session(trainer_name: str, run: Path, plan: dict):
    """Train to the end or as far as `plan` allows; the exit status is one of those above."""
    trainer = {trainer.name: trainer for trainer in (OURS, THEIRS)}[trainer_name]
    sys.stdout = sys.stderr = output = io.StringIO()
    logging.getLogger("transformers").handlers = [logging.StreamHandler(output)]
    calls, failure = iter(range(1, 10**9)), None
    for holder, name in trainer.writes:
        setattr(holder, name, with_faults(getattr(holder, name), calls, plan))
    if plan.get("as_user"):
        obey_permissions()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.run(run, plan)
        except Exception as error:
            failure = error
    if "count_calls" in plan:
        Path(plan["count_calls"]).write_text(str(next(calls)))
    said = [output.getvalue(), *(str(warning.message) for warning in caught)]
    os._exit(exit_status(failure, said, plan.get("named", ()), trainer.errors))


def exit_status(
    failure: Exception | None, said: list[str], named: tuple[str, ...], errors: type[Exception]
) -> int:
    """Judge the end of a session.

    Args:
        failure: what it raised, if anything.
        said: its warnings and all that it printed or logged.
        named: what names the problem, any of these; none: a session that says nothing of it.
        errors: the type of an error that is more than a crash.
    """
    if failure is not None:
        is_named = any(name in str(failure) for name in named)
        return REFUSED if is_named and isinstance(failure, errors) else CRASHED
    is_named = any(name in text for name in named for text in said)
    return WARNED if is_named else ENDED


def with_faults(function: Callable, calls: Iterator[int], plan: dict) -> Callable:
    """Wrap a function: the process dies at call "kill_at_call"; "full_at_call" finds no disk space.

    Each call counts as two: before and after it.
    """

    def inject():
        number = next(calls)
        if number == plan.get("kill_at_call"):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == plan.get("full_at_call"):
            raise OSError(28, "No space left on device")

    def wrapped(*args, **kwargs):
        inject()
        result = function(*args, **kwargs)
        inject()
        return result

    return wrapped


def obey_permissions():
    """Make root obey file permissions: give up the two capabilities that override them."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0


class Sessions:
    """Start sessions in processes forked from one that has imported everything."""

    def __init__(self):
        # The server that forks must find this module by its name.
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        os.environ["PYTHONWARNINGS"] = "ignore"  # about locks left by killed processes
        self.context = multiprocessing.get_context("forkserver")
        plotting = ["matplotlib.figure", "matplotlib.backends.backend_agg"]
        self.context.set_forkserver_preload(["survival", *plotting, "torch._dynamo"])

    def __call__(self, trainer: Trainer, run: Path, **plan: Any) -> int:
        """Return the exit status: one of the above, or -SIGKILL.

        Args:
            plan: for `session`, and "kill_after": seconds until it is killed.
        """
        process = self.context.Process(target=session, args=(trainer.name, run, plan))
        process.start()
        process.join(plan.get("kill_after"))
        if process.is_alive():
            process.kill()
        process.join()
        return process.exitcode


@dataclass(frozen=True)
class Subject:
    """A trainer under test: the folder of its runs, and its uninterrupted run's fingerprint."""

    sessions: Sessions
    trainer: Trainer
    folder: Path
    expected: Any

    @property
    def whole(self) -> Path:
        """The uninterrupted run."""
        return self.folder / "whole"

    def start(self, run: Path, **plan: Any) -> int:
        return self.sessions(self.trainer, run, **plan)

    def ends_correctly(self, run: Path) -> bool:
        """Start a run, with nothing wrong any more: it must end, and as the uninterrupted one."""
        return self.start(run) == ENDED and self.is_correct(run)

    def is_correct(self, run: Path) -> bool:
        try:
            return self.trainer.fingerprint(run) == self.expected
        except Exception:  # it did not finish; its last files may be broken in any way
            return False


# ---------------------------------------------------------------------------------------------
# Rows of both trainers


def random_kills(subject: Subject, kills: int, longest: float) -> Count:
    """Kill runs again and again until they end; a kill counts as correct if its run ends so."""
    rng, correct, done, runs = random.Random(0), 0, 0, 0
    while done < kills:
        run, times, runs = subject.folder / f"random{runs}", 0, runs + 1
        status = -signal.SIGKILL
        while done + times < kills and status == -signal.SIGKILL:
            status = subject.start(run, kill_after=rng.uniform(0.05, longest))
            times += status == -signal.SIGKILL
        correct += times if subject.ends_correctly(run) else 0
        done += times
        shutil.rmtree(run, ignore_errors=True)
    return correct, done


def middle_calls(subject: Subject, stages: int) -> range:
    """Return the numbers of `stages` calls of writing functions, from the middle of a run."""
    count = subject.folder / "count"
    subject.start(subject.folder / "counted", count_calls=str(count))
    first = int(count.read_text()) // 2
    return range(first, first + stages)


def kills_in_saves(subject: Subject, calls: range) -> Count:
    """Kill before and after each call that writes, flushes, renames or prunes."""
    correct = 0
    for call in calls:
        run = subject.folder / f"stage{call}"
        status = subject.start(run, kill_at_call=call)
        assert status == -signal.SIGKILL, "the run ended before that call"
        correct += subject.ends_correctly(run)
        shutil.rmtree(run)
    return correct, len(calls)


# Each takes a file's bytes and those of an earlier step; None deletes the file.
CORRUPTIONS: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "delete": lambda data, other: None,
    "truncate": lambda data, other: data[: len(data) // 2],
    "empty": lambda data, other: b"",
    "flip a bit": lambda data, other: data[:-8] + bytes([data[-8] ^ 1]) + data[-7:],
    "zero a block": lambda data, other: (
        data[: len(data) // 3] + bytes(16) + data[len(data) // 3 + 16 :]
    ),
    "swap": lambda data, other: other,
    "grow": lambda data, other: data + data[:100],
}


def corrupted_checkpoints(subject: Subject, limit: int | None) -> tuple[Count, Count, Count]:
    """Corrupt each file of the newest checkpoint in each way that changes it, and resume.

    Returns how often that was noticed (an error or a warning that names the checkpoint or the
    file, or a run that restored the file), how often no run ended with another result and not a
    word of that, and how often the run still ended correctly.
    """
    noticed = harmless = correct = count = 0
    trainer, run, copy = subject.trainer, subject.folder / "cut", subject.folder / "kept"
    newest, earlier = (trainer.checkpoint.format(step) for step in (CUT, CUT - SAVE_EVERY))
    subject.start(run, stop_at=CUT)
    cases = [(file, kind) for kind in CORRUPTIONS for file in trainer.files]
    for file, kind in random.Random(1).sample(cases, len(cases) if limit is None else limit):
        data = (run / newest / file).read_bytes()
        corrupted = CORRUPTIONS[kind](data, (run / earlier / file).read_bytes())
        if corrupted == data:
            continue  # both steps have the same tokenizer, so swapping changes nothing
        shutil.move(run, copy)
        shutil.copytree(copy, run)
        damage(run / newest / file, corrupted)
        status = subject.start(run, named=(Path(newest).name, Path(file).name))
        is_noticed = status in (WARNED, REFUSED) or content(run / newest / file) == data
        is_correct = subject.is_correct(run)
        noticed += is_noticed
        harmless += is_correct or status != ENDED
        correct += is_correct
        count += 1
        shutil.rmtree(run)
        shutil.move(copy, run)
    return (noticed, count), (harmless, count), (correct, count)


def damage(file: Path, corrupted: bytes | None):
    """Write what a corruption made of a file; None deletes it."""
    if corrupted is None:
        file.unlink()
    else:
        file.write_bytes(corrupted)


def content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return each file's bytes and the time of its last change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def finished_runs(subject: Subject) -> Count:
    """Start a finished run again, three times: not one byte may change."""
    before, correct = snapshot(subject.whole), 0
    for _ in range(3):
        status = subject.start(subject.whole)
        correct += status == ENDED and snapshot(subject.whole) == before
    return correct, 3


def nan_losses(subject: Subject) -> Count:
    """Make the loss NaN at one of three steps: an error, and a checkpoint with finite weights."""
    correct, steps = 0, (SAVE_EVERY + 1, 30, STEPS)
    for step in steps:
        run = subject.folder / f"nan{step}"
        is_error = subject.start(run, nan_at=step, named=("not finite", "NaN", "nan")) == REFUSED
        correct += is_error and any(map(is_finite, run.rglob("model.safetensors")))
    return correct, len(steps)


def is_finite(file: Path) -> bool:
    with safetensors.safe_open(file, "pt") as tensors:
        names = tensors.keys()  # the file itself cannot be iterated over
        return all(tensors.get_tensor(name).isfinite().all() for name in names)


# ---------------------------------------------------------------------------------------------
# Rows of lmlib alone


def full_disks(subject: Subject, calls: range) -> Count:
    """Let each call of a save find no disk space: a clear error, and the resumed run is correct."""
    correct = 0
    for call in calls:
        run = subject.folder / f"full{call}"
        status = subject.start(run, full_at_call=call, named=("another output_dir",))
        correct += status == REFUSED and subject.ends_correctly(run)
        shutil.rmtree(run)
    return correct, len(calls)


def small_disks(subject: Subject) -> Count | None:
    """Fill a real disk before a save, leaving room for more or less of it.

    Returns None where no disk can be mounted (that takes root).
    """
    folder, disk = subject.folder, subject.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        return None
    try:
        run, copy = disk / "run", folder / "kept_disk"
        shutil.copytree(folder / ".tokens", disk / ".tokens")
        subject.start(run, stop_at=CUT)
        shutil.move(run, copy)
        newest = copy / subject.trainer.checkpoint.format(CUT)
        save = sum(path.stat().st_size for path in newest.rglob("*"))
        correct, rooms = 0, [0, save // 2, *(save + 4096 * pages for pages in range(-6, 14, 2))]
        for room in rooms:
            shutil.copytree(copy, run)
            filler = max(0, shutil.disk_usage(disk).free - room)
            (disk / "filler").write_bytes(bytes(filler))
            status = subject.start(run, named=("another output_dir",))
            (disk / "filler").unlink()
            is_expected = status == REFUSED or (room > save and status == ENDED)
            correct += is_expected and subject.ends_correctly(run)
            shutil.rmtree(run)
        return correct, len(rooms)
    finally:
        subprocess.run(["umount", disk], check=True)


def read_only(subject: Subject) -> Count:
    """Forbid writing to folders and files, and resume; once that is allowed, the run is correct.

    What a run must write is refused with a clear error, and where nothing may be written nothing
    changes. A checkpoint that need not be written is no obstacle. One whose training state cannot
    be deleted is a warning.
    """
    locked, kept = f"checkpoints/checkpoint_step_{CUT}", CUT - 2 * SAVE_EVERY
    undeletable = f"checkpoint_step_{kept}/training_state cannot be deleted"
    expected = {  # place: (exit status, what its message says)
        ".": (REFUSED, "another output_dir"),
        "checkpoints": (REFUSED, "another output_dir"),
        "metrics.jsonl": (REFUSED, "another output_dir"),
        "all": (REFUSED, "another output_dir"),
        locked: (ENDED, "cannot be"),
        f"checkpoints/checkpoint_step_{kept}": (WARNED, undeletable),
    }
    correct = sum(read_only_place(subject, place, *end) for place, end in expected.items())

    empty = subject.folder / "empty"
    empty.mkdir(mode=0o555)
    status = subject.start(empty / "run", as_user=True, named=("cannot be used",))
    correct += status == REFUSED and not list(empty.iterdir())

    finished = [subject.whole, *subject.whole.rglob("*")]
    for path in finished:
        path.chmod(path.stat().st_mode & 0o555)
    before = snapshot(subject.whole)
    status = subject.start(subject.whole, as_user=True)
    correct += status == ENDED and snapshot(subject.whole) == before
    for path in finished:
        path.chmod(path.stat().st_mode | 0o200)
    return correct, len(expected) + 2


def read_only_place(subject: Subject, place: str, status: int, message: str) -> bool:
    """Check how a run with a read-only file or folder ends, and that it resumes once writable."""
    run, last = subject.folder / "locked" / "run", CUT
    shutil.copytree(subject.folder / ".tokens", run.parent / ".tokens", dirs_exist_ok=True)
    if status == WARNED:  # a save is left that deletes what this one could not
        last = CUT - SAVE_EVERY
    subject.start(run, stop_at=last)
    paths = [run, *run.rglob("*")] if place == "all" else [run / place]
    modes = {path: path.stat().st_mode for path in paths}
    before = snapshot(run)
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    stop_at = {"stop_at": CUT} if status == WARNED else {}
    is_expected = subject.start(run, as_user=True, named=(message,), **stop_at) == status
    is_unchanged = snapshot(run) == before or place not in (".", "all")
    for path, mode in modes.items():
        path.chmod(mode)
    # One that ended is finished: it must be correct as it is.
    is_correct = subject.is_correct(run) if status == ENDED else subject.ends_correctly(run)
    shutil.rmtree(run.parent)
    return is_expected and is_unchanged and is_correct


def damaged_tokens(subject: Subject, limit: int | None) -> tuple[Count, Count]:
    """Damage each file of the token cache in each way, and resume a run, or start a new one.

    Returns how often a warning named the file and the file was restored, and how often the run
    ended correctly.
    """
    noticed = correct = count = 0
    folder = subject.folder / "tokens"
    run, store, copy = folder / "run", folder / ".tokens", subject.folder / "kept_tokens"
    shutil.copytree(subject.folder / ".tokens", store)
    subject.start(run, stop_at=CUT)
    shutil.copytree(folder, copy)
    [key] = [path for path in store.iterdir() if path.is_dir()]
    files = sorted(path.name for path in key.iterdir() if path.stat().st_size)
    cases = [(file, kind) for kind in TOKEN_DAMAGE for file in files]
    for file, kind in random.Random(2).sample(cases, len(cases) if limit is None else limit):
        data = (key / file).read_bytes()
        damage(key / file, TOKEN_DAMAGE[kind](data))
        if count % 2:
            shutil.rmtree(run)
        is_named = subject.start(run, named=(file,)) == WARNED
        # A resumed run builds with its checkpoint's tokenizer, which these two files then say.
        is_restored = content(key / file) == data or file in ("store.json", "tokenizer_config.json")
        noticed += is_named and is_restored and verify.damage(key) == ""
        correct += subject.is_correct(run)
        count += 1
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
    return (noticed, count), (correct, count)


# What happens to a file of the token cache; None: it is deleted.
TOKEN_DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "delete": lambda data: None,
    "truncate": lambda data: data[: len(data) // 2],
    "garble": lambda data: data[: len(data) // 2] + random.Random(3).randbytes(len(data) // 2),
    "zero": lambda data: bytes(len(data)),
    "flip a bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


def two_processes(subject: Subject) -> Count:
    """Start a second process on a run: refused, naming the first one's pid.

    A lock whose process died does not block the run.
    """
    run = subject.folder / "locked_run"
    message = f"is being written by process {os.getpid()}"
    with hold_lock(run):
        status = subject.start(run, named=(message,))
    assert (run.parent / ".locks" / f"{run.name}.lock").exists()
    return int(status == REFUSED) + int(subject.ends_correctly(run)), 2


# ---------------------------------------------------------------------------------------------
# The table


@dataclass
class Table:
    """Rows of counts, one column per trainer; each count is printed to stderr when it is known."""

    trainers: list[Trainer]
    rows: dict[str, dict[str, Count]] = field(default_factory=dict)

    def add(self, row: str, trainer: Trainer, count: Count | None):
        if count is not None:
            self.rows.setdefault(row, {})[trainer.name] = count
            line = f"{count[0]:>4} of {count[1]:>4}  {trainer.name}, {row}"
            print(line, file=sys.stderr, flush=True)

    def print(self):
        names = [trainer.name for trainer in self.trainers]
        print("| what happened |", " | ".join(f"{name}, correct" for name in names), "|")
        print(f"|{'---|' * (1 + len(names))}")
        for row, counts in self.rows.items():
            cells = [f"{counts[n][0]} of {counts[n][1]}" if n in counts else "" for n in names]
            print(f"| {row} | {' | '.join(cells)} |")


def uninterrupted(sessions: Sessions, trainer: Trainer, folder: Path) -> tuple[Subject, float]:
    """Train the uninterrupted run; returns the subject and the run's seconds."""
    folder.mkdir()
    if trainer is THEIRS:  # its model has the shape and the tokenizer of ours
        ours = folder.parent / OURS.name / "whole" / OURS.checkpoint.format(STEPS)
        shutil.copytree(ours, folder / "model")
    sessions(trainer, folder / "warm")  # the first run of all prepares the tokens
    began = time.monotonic()
    sessions(trainer, folder / "whole")
    seconds = time.monotonic() - began
    return Subject(sessions, trainer, folder, trainer.fingerprint(folder / "whole")), seconds


def add_common_rows(
    table: Table, subject: Subject, seconds: float, calls: range, options: argparse.Namespace
):
    """Add the rows that both trainers have; an uninterrupted run takes `seconds`."""
    add = lambda row, count: table.add(row, subject.trainer, count)  # noqa: E731
    add("the same run twice", (int(subject.is_correct(subject.folder / "warm")), 1))
    add("killed at random", random_kills(subject, options.kills, seconds))
    early = random_kills(subject, options.kills // 2, 0.4 * seconds)
    add("killed soon after resuming", early)
    add("killed at each stage of a save", kills_in_saves(subject, calls))
    noticed, harmless, correct = corrupted_checkpoints(subject, options.corruptions)
    add("corrupted checkpoints: named or repaired", noticed)
    add("corrupted checkpoints: no silent change of the result", harmless)
    add("corrupted checkpoints: the run still ended correctly", correct)
    add("a finished run started again", finished_runs(subject))
    add("a NaN loss", nan_losses(subject))


def add_own_rows(table: Table, subject: Subject, calls: range, options: argparse.Namespace):
    """Add the rows of lmlib alone."""
    add = lambda row, count: table.add(row, subject.trainer, count)  # noqa: E731
    folder = subject.folder
    add("disk full at each stage of a save", full_disks(subject, calls))
    add("a small disk that fills up", small_disks(subject))
    add("read-only folders and files", read_only(subject))
    noticed, correct = damaged_tokens(subject, options.corruptions)
    add("damaged token cache: named and rebuilt", noticed)
    add("damaged token cache: the run ended correctly", correct)
    add("a second process on the run; a stale lock", two_processes(subject))
    files = [hostile.refused(file, folder) for file in hostile.PARAMETER_FILES]
    add("hostile parameter files", (sum(files), len(files)))
    texts = hostile.stay_text(hostile.TEXTS[: options.texts], folder)
    add("hostile texts in every page", (sum(texts), len(texts)))
    if options.browser:
        import browser  # Playwright is needed for this row alone

        (folder / "browser").mkdir()
        with browser.chromium() as chromium, contextlib.redirect_stdout(io.StringIO()):
            ran = browser.texts_that_ran(folder / "browser", chromium)
        count = len(browser.HOSTILE)
        add("hostile texts in a real browser", (count - len(ran), count))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=200, help="random kills; half as many soon after resuming"
    )
    parser.add_argument(
        "--stages", type=int, default=40, help="calls of a save to be killed at, or to fail"
    )
    parser.add_argument(
        "--corruptions", type=int, help="how many corruptions, sampled from all; default: all"
    )
    parser.add_argument(
        "--texts", type=int, default=len(hostile.TEXTS), help="how many hostile texts"
    )
    parser.add_argument("--alone", action="store_true", help="leave out transformers' Trainer")
    parser.add_argument(
        "--browser", action="store_true", help="hostile texts in Chromium too, which must be there"
    )
    return parser.parse_args()


def main():
    options = parse_options()
    trainers = [OURS] if options.alone else [OURS, THEIRS]
    table, sessions = Table(trainers), Sessions()
    # In memory if possible: a killed process loses nothing that it wrote there.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        for trainer in trainers:
            subject, seconds = uninterrupted(sessions, trainer, Path(name, trainer.name))
            calls = middle_calls(subject, options.stages)
            add_common_rows(table, subject, seconds, calls, options)
            if trainer is OURS:
                add_own_rows(table, subject, calls, options)
    table.print()
    ours = [counts[OURS.name] for counts in table.rows.values()]
    sys.exit(any(correct != count for correct, count in ours))


if __name__ == "__main__":
    main()
