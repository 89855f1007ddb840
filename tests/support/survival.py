"""What a run survives, counted, beside transformers' Trainer: `make survival`, or a short form with the options below.

Each row says how often of how many times a run that was killed, corrupted or starved ended right: with the very tensors (by
SHA-256) and records of the run that was left alone, times aside; or refused in a clear sentence, changing nothing.
"""

import argparse
import contextlib
import ctypes
import hashlib
import io
import json
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile
import peer
import safetensors

from lmlib import checkpoint, training
from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT
from lmlib.run.lock import hold_lock

TIMED = ("training_time_minutes", "tokens_per_second")
STEPS, SAVE_EVERY = 60, 6
CUT = 54  # a run stopped after this step has one more save to go

# ---------------------------------------------------------------------------------------------------
# The two trainers


@dataclass(frozen=True)
class Trainer:
    """What the rows need to know of a trainer whose runs live in one folder each."""

    name: str
    run: Callable[[Path, dict], None]  # train, or go on; the plan may hold "stop_at" and "poison" (a step each)
    fingerprint: Callable[[Path], Any]
    folder: str  # of the checkpoint of a step, with {}
    files: list[str]  # of a checkpoint
    writes: list[tuple[Any, str]]  # functions that write, flush, rename or prune: (holder, name)


def recipe(folder: Path) -> RunConfig:
    """A small run with everything that resuming must repeat: dropout, micro-batches, epoch borders, evaluations."""
    return RunConfig.load(
        PROJECT_ROOT / "params" / "smoke.yaml",
        **{"output_dir": folder.parent, "run_name": folder.name, "total_steps": STEPS, "max_tokens": 9000, "batch_size": 6},
        **{"micro_batch_size": 4, "eval_every": 7, "checkpoint_every": SAVE_EVERY, "log_every": 1},
    )


def run_ours(folder: Path, plan: dict):
    if "poison" in plan:
        real = training.accumulate_gradients
        training.accumulate_gradients = lambda *args: real(*args) * (float("nan") if args[5] == plan["poison"] else 1.0)
    for record in training.train(recipe(folder)):
        if (record.kind, record.step) == ("checkpoint", plan.get("stop_at")):
            return


def fingerprint(run_dir: Path) -> tuple:
    """Hashes of every tensor file, and the records and results without what depends on the clock."""
    tensors = {
        path.relative_to(run_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run_dir.rglob("*.safetensors"))
    }
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    records = [{name: value for name, value in line.items() if name != "timing"} for line in lines]
    results = json.loads((run_dir / "results.json").read_text())
    return tensors, records, {name: value for name, value in results.items() if name not in TIMED}


FILES = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
FILES += ["checkpoint.json", "training_state/optimizer.safetensors", "training_state/state.json"]
OURS = Trainer(
    "lmlib",
    run_ours,
    fingerprint,
    "checkpoints/checkpoint_step_{}",
    FILES,
    [(checkpoint, name) for name in ("save_file", "write_manifest", "write_json", "_sync_folder", "_remove", "prune")],
)
THEIRS = Trainer("transformers.Trainer", peer.run, peer.fingerprint, "checkpoint-{}", peer.FILES, peer.WRITES)


# ---------------------------------------------------------------------------------------------------
# One session of a run, in a process of its own

ENDED, WARNED, REFUSED, FAILED = 0, 3, 4, 5


def session(trainer_name: str, folder: Path, plan: dict):
    """Train until the end or what `plan` says; the exit status tells how it ended."""
    trainer = {trainer.name: trainer for trainer in (OURS, THEIRS)}[trainer_name]
    sys.stdout = sys.stderr = io.StringIO()
    calls = iter(range(1, 10**9))
    for holder, name in trainer.writes:
        setattr(holder, name, _counted(getattr(holder, name), calls, plan))
    if plan.get("root_obeys"):
        obey_permissions()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.run(folder, plan)
        except ValueError as error:
            os._exit(REFUSED if plan.get("sentence", "") in str(error) else FAILED)
        except Exception:
            os._exit(FAILED)
    if "count" in plan:
        Path(plan["count"]).write_text(str(next(calls)))
    damaged = plan.get("damaged")
    os._exit(WARNED if damaged and any(damaged in str(warning.message) for warning in caught) else ENDED)


def _counted(function: Callable, calls: Iterator[int], plan: dict) -> Callable:
    """The function, dying at call "kill_at_call" and failing for want of space at "full_at_call". Each counts as two calls,
    before and after it."""

    def strike():
        number = next(calls)
        if number == plan.get("kill_at_call"):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == plan.get("full_at_call"):
            raise OSError(28, "No space left on device")

    def wrapped(*args, **kwargs):
        strike()
        result = function(*args, **kwargs)
        strike()
        return result

    return wrapped


def obey_permissions():
    """Let the system refuse root what it refuses others: give up the two capabilities that override a file's permissions."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0


class Sessions:
    """Starts sessions in processes forked from one that has imported everything."""

    def __init__(self):
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # or the server would not find this file
        os.environ["PYTHONWARNINGS"] = "ignore"  # of locks that killed processes left
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["survival", "matplotlib.figure", "matplotlib.backends.backend_agg", "torch._dynamo"])

    def __call__(self, trainer: Trainer, folder: Path, **plan: Any) -> int:
        """How the session ended: one of the statuses above, or -SIGKILL. `after` kills it after so many seconds."""
        process = self.context.Process(target=session, args=(trainer.name, folder, plan))
        process.start()
        process.join(plan.get("after"))
        if process.is_alive():
            process.kill()
        process.join()
        return process.exitcode


# ---------------------------------------------------------------------------------------------------
# Rows: each returns (how many ended right, how many there were)


def equals(trainer: Trainer, folder: Path, expected: Any) -> bool:
    try:
        return trainer.fingerprint(folder) == expected
    except Exception:  # it never came to its end, and its last files are of any kind of broken
        return False


def random_kills(start: Sessions, trainer: Trainer, folder: Path, expected: Any, kills: int, longest: float) -> tuple[int, int]:
    """Runs are killed again and again until they end; a kill counts as right if its run ended right."""
    rng, right, done, runs = random.Random(0), 0, 0, 0
    while done < kills:
        run, times, runs = folder / f"random{runs}", 0, runs + 1
        status = -signal.SIGKILL
        while done + times < kills and status == -signal.SIGKILL:
            status = start(trainer, run, after=rng.uniform(0.05, longest))
            times += status == -signal.SIGKILL
        start(trainer, run)  # to its end
        right += times if equals(trainer, run, expected) else 0
        done += times
        shutil.rmtree(run, ignore_errors=True)
    return right, done


def middle_calls(start: Sessions, trainer: Trainer, folder: Path, stages: int) -> range:
    """The numbers of so many calls (before and after each function that writes) from the middle of a run on."""
    start(trainer, folder / "counted", count=str(folder / "count"))
    first = int((folder / "count").read_text()) // 2
    return range(first, first + stages)


def kills_in_saves(start: Sessions, trainer: Trainer, folder: Path, expected: Any, calls: range) -> tuple[int, int]:
    """A kill before and after each call that writes, flushes, renames or prunes."""
    right = 0
    for call in calls:
        run = folder / f"stage{call}"
        assert start(trainer, run, kill_at_call=call) == -signal.SIGKILL, "the run ended before that call"
        start(trainer, run)
        right += equals(trainer, run, expected)
        shutil.rmtree(run)
    return right, len(calls)


DAMAGES = {
    "delete": lambda content, other: None,
    "truncate": lambda content, other: content[: len(content) // 2],
    "empty": lambda content, other: b"",
    "flip a bit": lambda content, other: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "zero a block": lambda content, other: content[: len(content) // 3] + bytes(16) + content[len(content) // 3 + 16 :],
    "swap": lambda content, other: other,
    "grow": lambda content, other: content + content[:100],
}


def corruptions(start: Sessions, trainer: Trainer, folder: Path, expected: Any, damages: int | None) -> list[tuple[int, int]]:
    """Each file of the newest checkpoint damaged in each way that changes it, and the run started again: how often that was
    noticed (an error or a warning that names the checkpoint); how often it was, or changed nothing; how often the run then
    ended right."""
    noticed = harmless = right = count = 0
    cut = folder / "cut"
    start(trainer, cut, stop_at=CUT)
    cases = [(file, damage) for damage in DAMAGES for file in trainer.files]
    for file, damage in random.Random(1).sample(cases, len(cases) if damages is None else damages):
        name = trainer.folder.format(CUT)
        content, other = ((cut / trainer.folder.format(step) / file).read_bytes() for step in (CUT, CUT - SAVE_EVERY))
        damaged = DAMAGES[damage](content, other)
        if damaged == content:
            continue  # both steps have the same tokenizer: a swap is no damage
        shutil.move(cut, folder / "kept")
        shutil.copytree(folder / "kept", cut)
        (cut / name / file).unlink() if damaged is None else (cut / name / file).write_bytes(damaged)
        status = start(trainer, cut, damaged=name)
        same = equals(trainer, cut, expected)
        noticed += status != ENDED
        harmless += status != ENDED or same
        right += same
        count += 1
        shutil.rmtree(cut)
        shutil.move(folder / "kept", cut)
    return [(noticed, count), (harmless, count), (right, count)]


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and the time of its last change."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def finished_runs(start: Sessions, trainer: Trainer, whole: Path) -> tuple[int, int]:
    """A finished run started again, three times: not one byte may change."""
    before, right = content(whole), 0
    for _ in range(3):
        start(trainer, whole)
        right += content(whole) == before
    return right, 3


def poisoned(start: Sessions, trainer: Trainer, folder: Path) -> tuple[int, int]:
    """A loss that is not a number, at three steps: the run must say so and leave a checkpoint whose weights are finite."""
    right, steps = 0, (SAVE_EVERY + 1, 30, STEPS)
    for step in steps:
        run = folder / f"poison{step}"
        said = start(trainer, run, poison=step) in (REFUSED, FAILED)
        weights = [safetensors.safe_open(file, "pt") for file in run.rglob("model.safetensors")]
        finite = [all(file.get_tensor(name).isfinite().all() for name in file.keys()) for file in weights]  # noqa: SIM118
        right += said and any(finite)
    return right, len(steps)


# ---------------------------------------------------------------------------------------------------
# Rows of lmlib alone


def full_disks(start: Sessions, folder: Path, expected: Any, calls: range) -> tuple[int, int]:
    """Each call of a save fails with "no space left": a clear error, and started again the run ends right."""
    right = 0
    for call in calls:
        run = folder / f"full{call}"
        said = start(OURS, run, full_at_call=call, sentence="another output_dir") == REFUSED
        start(OURS, run)
        right += said and equals(OURS, run, expected)
        shutil.rmtree(run)
    return right, len(calls)


def small_disks(start: Sessions, folder: Path, expected: Any) -> tuple[int, int] | None:
    """A real disk that fills up before a save, to the byte; None where none can be mounted (that takes root)."""
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True).returncode:
        return None
    try:
        shutil.copytree(folder / ".tokens", disk / ".tokens")
        start(OURS, disk / "run", stop_at=CUT)
        shutil.move(disk / "run", folder / "kept_disk")
        save = sum(path.stat().st_size for path in folder.glob(f"kept_disk/checkpoints/checkpoint_step_{CUT}/**/*"))
        right, rooms = 0, [0, save // 2, *(save + 4096 * pages for pages in range(-6, 14, 2))]
        for room in rooms:
            shutil.copytree(folder / "kept_disk", disk / "run")
            (disk / "filler").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - room)))
            status = start(OURS, disk / "run", sentence="another output_dir")
            (disk / "filler").unlink()
            start(OURS, disk / "run")
            right += status in (REFUSED, ENDED) and equals(OURS, disk / "run", expected)
            shutil.rmtree(disk / "run")
        return right, len(rooms)
    finally:
        subprocess.run(["umount", disk], check=True)


def read_only(start: Sessions, folder: Path, whole: Path, expected: Any) -> tuple[int, int]:
    """Folders and files that may not be written: a clear error, nothing changed where nothing may be; made writable, the
    run ends right."""
    right = 0
    places = [".", "checkpoints", f"checkpoints/checkpoint_step_{CUT}", "metrics.jsonl", "everything"]
    for place in places:
        run = folder / "locked" / "run"
        shutil.copytree(folder / ".tokens", run.parent / ".tokens", dirs_exist_ok=True)
        start(OURS, run, stop_at=CUT)
        paths = [run, *run.rglob("*")] if place == "everything" else [run / place]
        modes = {path: path.stat().st_mode for path in paths}
        before = content(run)
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        status = start(OURS, run, root_obeys=True, sentence="another output_dir")
        kept = content(run) == before or place not in (".", "everything")
        for path, mode in modes.items():
            path.chmod(mode)
        start(OURS, run)
        # a locked old checkpoint is in nobody's way; the rest must be refused
        right += (status == REFUSED or place.endswith(str(CUT))) and kept and equals(OURS, run, expected)
        shutil.rmtree(run.parent)
    empty = folder / "empty"
    empty.mkdir(mode=0o555)
    right += start(OURS, empty / "run", root_obeys=True, sentence="cannot be used") == REFUSED and not list(empty.iterdir())
    for path in (whole, *whole.rglob("*")):
        path.chmod(path.stat().st_mode & 0o555)
    before = content(whole)
    right += start(OURS, whole, root_obeys=True) == ENDED and content(whole) == before
    for path in (whole, *whole.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    return right, len(places) + 2


def two_writers(start: Sessions, folder: Path, expected: Any) -> tuple[int, int]:
    """A second process on a run's folder is refused with the first one's pid; a lock whose holder died is no obstacle."""
    run = folder / "written"
    with hold_lock(run):
        refused = start(OURS, run, sentence=f"is being written by process {os.getpid()}") == REFUSED
    assert (folder / ".locks" / "written.lock").exists()
    start(OURS, run)
    return int(refused) + int(equals(OURS, run, expected)), 2


# ---------------------------------------------------------------------------------------------------


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=200, help="random kills; half as many soon after starting again")
    options.add_argument("--stages", type=int, default=40, help="calls of a save to be killed or starved at")
    options.add_argument("--damages", type=int, help="corruptions, drawn from all; default: all")
    options.add_argument("--texts", type=int, default=len(hostile.TEXTS), help="hostile texts")
    options.add_argument("--alone", action="store_true", help="without transformers' Trainer")
    options.add_argument("--browser", action="store_true", help="hostile texts in a real browser too (needs Chromium)")
    arguments = options.parse_args()
    trainers = [OURS] if arguments.alone else [OURS, THEIRS]
    table: dict[str, dict[str, tuple[int, int]]] = {}
    calls: dict[str, range] = {}

    def row(what: str, trainer: Trainer, counts: tuple[int, int] | None):
        if counts is not None:
            table.setdefault(what, {})[trainer.name] = counts
            print(f"{counts[0]:>4} of {counts[1]:>4}  {trainer.name}, {what}", file=sys.stderr, flush=True)

    start = Sessions()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a killed process loses nothing that it wrote there
    with tempfile.TemporaryDirectory(dir=memory) as name:
        for trainer in trainers:
            folder = Path(name, trainer.name)
            folder.mkdir()
            if trainer is THEIRS:
                shutil.copytree(Path(name, "lmlib", "whole", OURS.folder.format(STEPS)), folder / "model")
            start(trainer, folder / "warm")
            began = time.monotonic()
            start(trainer, folder / "whole")
            length = time.monotonic() - began
            expected = trainer.fingerprint(folder / "whole")
            row("the same run twice", trainer, (int(trainer.fingerprint(folder / "warm") == expected), 1))
            row("killed at random", trainer, random_kills(start, trainer, folder, expected, arguments.kills, length))
            early = random_kills(start, trainer, folder, expected, arguments.kills // 2, 0.4 * length)
            row("killed soon after starting again", trainer, early)
            calls[trainer.name] = middle_calls(start, trainer, folder, arguments.stages)
            in_saves = kills_in_saves(start, trainer, folder, expected, calls[trainer.name])
            row("killed at each stage of a save", trainer, in_saves)
            noticed, harmless, right = corruptions(start, trainer, folder, expected, arguments.damages)
            row("corrupted checkpoints: noticed", trainer, noticed)
            row("corrupted checkpoints: no other result in silence", trainer, harmless)
            row("corrupted checkpoints: the run ended right all the same", trainer, right)
            row("a finished run started again", trainer, finished_runs(start, trainer, folder / "whole"))
            row("a loss that is not a number", trainer, poisoned(start, trainer, folder))
        folder, whole = Path(name, "lmlib"), Path(name, "lmlib", "whole")
        expected = OURS.fingerprint(whole)
        row("disk full at each stage of a save", OURS, full_disks(start, folder, expected, calls["lmlib"]))
        row("a small disk that fills up", OURS, small_disks(start, folder, expected))
        row("folders and files that may not be written", OURS, read_only(start, folder, whole, expected))
        row("a second writer; a lock left behind", OURS, two_writers(start, folder, expected))
        files = [hostile.refused(file, folder) for file in hostile.PARAMETER_FILES]
        row("hostile parameter files", OURS, (sum(files), len(files)))
        texts = hostile.stay_text(hostile.TEXTS[: arguments.texts], folder)
        row("hostile texts in every page", OURS, (sum(texts), len(texts)))
        if arguments.browser:
            import browser

            (folder / "browser").mkdir()
            with browser.chromium() as chromium, contextlib.redirect_stdout(io.StringIO()):
                ran = browser.texts_that_ran(folder / "browser", chromium)
            row("hostile texts in a real browser", OURS, (len(browser.HOSTILE) - len(ran), len(browser.HOSTILE)))

    names = [trainer.name for trainer in trainers]
    print(f"| what happened | {' | '.join(f'{name}, ended right' for name in names)} |\n|{'---|' * (1 + len(names))}")
    for what, counts in table.items():
        print(f"| {what} | {' | '.join(f'{counts[n][0]} of {counts[n][1]}' if n in counts else '' for n in names)} |")
    sys.exit(any(counts["lmlib"][0] != counts["lmlib"][1] for counts in table.values()))


if __name__ == "__main__":
    main()
