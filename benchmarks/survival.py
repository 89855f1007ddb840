"""What a run survives, counted: `make survival` (long), `python benchmarks/survival.py --kills 20` (short).

Each row of the table says how often of how many times a run that was killed, corrupted or starved ended with
the very tensors (SHA-256 of the files) and records of the run that was left alone, or was refused in a clear sentence.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from lmlib import checkpoint
from lmlib.config import PROJECT_ROOT, RunConfig
from lmlib.training import train

TIMED = ("training_time_minutes", "tokens_per_second")


def recipe(output_dir: Path, run_name: str) -> RunConfig:
    """A small run with everything that resuming must repeat: dropout, micro-batches, epoch borders, evaluations."""
    return RunConfig.load(
        PROJECT_ROOT / "params" / "smoke.yaml",
        **{"output_dir": output_dir, "run_name": run_name, "total_steps": 60, "max_tokens": 9000, "batch_size": 6},
        **{"micro_batch_size": 4, "eval_every": 7, "checkpoint_every": 6, "log_every": 1},
    )


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


# ---------------------------------------------------------------------------------------------------
# Kills


def session(config: RunConfig, kill_at_call: int | None = None):
    """One process's part of a run, quiet; kills itself at the n-th call that touches a checkpoint, if asked."""
    sys.stdout = sys.stderr = io.StringIO()
    warnings.simplefilter("ignore")
    if kill_at_call is not None:
        calls = iter(range(1, 10**9))
        for name in ("save_file", "write_manifest", "write_json", "_sync_folder", "_remove", "prune"):
            setattr(checkpoint, name, _deadly(getattr(checkpoint, name), calls, kill_at_call))
    for _ in train(config):
        pass


def _deadly(function: Callable, calls, fatal: int) -> Callable:
    """The function, dying before it at call `fatal` and after it at call `fatal` + 1 (both count)."""

    def wrapped(*args, **kwargs):
        if next(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if next(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def killed(config: RunConfig, start: Callable, **plan) -> bool:
    """Run one session, killed by `plan`; whether it died of it."""
    process = start(config, plan.get("kill_at_call"))
    if "after" in plan:
        process.join(plan["after"])
        if process.is_alive():
            process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def random_kills(folder: Path, start: Callable, kills: int, longest: float, name: str, expected: tuple) -> tuple[int, int]:
    """(kills after which the run still ended right, kills): runs are killed again and again until they end."""
    rng, right, done, runs = random.Random(0), 0, 0, 0
    while done < kills:
        config, times, runs = recipe(folder, f"{name}{runs}"), 0, runs + 1
        while done + times < kills and killed(config, start, after=rng.uniform(0.05, longest)):
            times += 1
        killed(config, start)  # this time to its end
        right += times if fingerprint(config.run_dir) == expected else 0
        done += times
        shutil.rmtree(config.run_dir)
    return right, done


def kills_in_saves(folder: Path, start: Callable, stages: int, expected: tuple) -> tuple[int, int]:
    """A kill before and after each of the calls that write, flush, rename or prune, from the third save on."""
    right = 0
    for call in range(stages):
        config = recipe(folder, f"stage{call}")
        assert killed(config, start, kill_at_call=61 + call), "the run ended before that call"
        killed(config, start)
        right += fingerprint(config.run_dir) == expected
        shutil.rmtree(config.run_dir)
    return right, stages


# ---------------------------------------------------------------------------------------------------
# Corruption and starvation

DAMAGES = {
    "delete": lambda content, other: None,
    "truncate": lambda content, other: content[: len(content) // 2],
    "empty": lambda content, other: b"",
    "flip a bit": lambda content, other: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "zero a block": lambda content, other: content[: len(content) // 3] + bytes(16) + content[len(content) // 3 + 16 :],
    "swap": lambda content, other: other,
}
FILES = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
FILES += ["checkpoint.json", "training_state/optimizer.safetensors", "training_state/state.json"]


def corruptions(run_dir: Path) -> tuple[int, int]:
    """Each file of the newest checkpoint damaged in each way that changes it: was the step before it taken?"""
    right = count = 0
    steps = checkpoint.checkpoint_steps(run_dir)
    newest, before = (run_dir / "checkpoints" / f"checkpoint_step_{step}" for step in (steps[-1], steps[-2]))
    for file in FILES:
        content, other = (newest / file).read_bytes(), (before / file).read_bytes()
        for damage in DAMAGES.values():
            damaged = damage(content, other)
            if damaged == content:
                continue  # both steps have the same tokenizer: a swap is no damage
            (newest / file).unlink() if damaged is None else (newest / file).write_bytes(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                right += checkpoint.newest_good(run_dir, with_state=True) == before
            count += 1
            (newest / file).write_bytes(content)
    return right, count


def full_disks(folder: Path, expected: tuple) -> tuple[int, int]:
    """Every call of a save fails once with "no space left": a clear error, earlier checkpoints whole, and an exact end."""
    right = count = 0
    names = ("save_file", "write_manifest", "write_json", "_sync_folder")
    for name in names:
        for nth in (1, 3):
            config, real, calls = recipe(folder, f"full_{name}{nth}"), getattr(checkpoint, name), iter(range(1, 10**6))

            def failing(*args, real=real, calls=calls, nth=nth, **kwargs):
                if next(calls) == nth:
                    raise OSError(28, "No space left on device")
                return real(*args, **kwargs)

            setattr(checkpoint, name, failing)
            try:
                list(train(config))
                said = False
            except ValueError as error:
                said = "No space left on device" in str(error) and "Free some space" in str(error)
            setattr(checkpoint, name, real)
            list(train(config))
            right += said and fingerprint(config.run_dir) == expected
            count += 1
            shutil.rmtree(config.run_dir)
    return right, count


# ---------------------------------------------------------------------------------------------------


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=200, help="random kills; half as many during resume")
    options.add_argument("--stages", type=int, default=40, help="calls of a save to be killed at")
    arguments = options.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lmlib.training", "transformers", "torch._dynamo"])

    def start(config: RunConfig, kill_at_call: int | None):
        process = context.Process(target=session, args=(config, kill_at_call))
        process.start()
        return process

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        whole = recipe(folder, "whole")
        began = time.monotonic()
        killed(whole, start)
        length = time.monotonic() - began
        began = time.monotonic()
        again = recipe(folder, "again")
        killed(again, start)
        length = time.monotonic() - began
        expected = fingerprint(whole.run_dir)
        rows = [
            ("the same run twice", int(fingerprint(again.run_dir) == expected), 1),
            ("killed at random", *random_kills(folder, start, arguments.kills, length, "random", expected)),
            ("killed soon after starting again", *random_kills(folder, start, arguments.kills // 2, 0.5, "early", expected)),
            ("killed at each stage of a save", *kills_in_saves(folder, start, arguments.stages, expected)),
            ("corrupted checkpoints found", *corruptions(whole.run_dir)),
            ("disk full at each stage of a save", *full_disks(folder, expected)),
        ]
    print(f"| {'what happened':<36} | ended right | of |\n|{'-' * 38}|{'-' * 13}|{'-' * 5}|")
    for what, right, count in rows:
        print(f"| {what:<36} | {right:>11} | {count:>3} |")
    sys.exit(any(right != count for _, right, count in rows))


if __name__ == "__main__":
    main()
