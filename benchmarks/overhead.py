"""What a run of 10,000 steps spends on anything but its updates, and how soon it begins.

    python benchmarks/overhead.py [--recipe params/exp9.yaml] [--steps 4] [--no-start]

The parts are timed in a real run of a few steps that evaluates and saves at each, and multiplied by
how often 10,000 steps need them: 100 evaluations, 10 checkpoints, the recipe's log lines. The chart
is drawn from the records of 10,000 steps. Wall-clock seconds; the text is Shakespeare's, so no
network is needed. `--no-start` leaves out the time from `make train` and `lmlib train`, with a
cached corpus, to the first step. exp9 needs 8 GB of memory and 10 minutes.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from lmlib import training
from lmlib.analysis import figures, frames
from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT, resolve_path
from lmlib.notebook import live
from lmlib.notebook.chart import Figure
from lmlib.run import prepare as preparing

STEPS, EVALUATIONS, CHECKPOINTS = 10_000, 100, 10


class Clock:
    """The seconds of each call of functions, by name."""

    def __init__(self):
        self.seconds = defaultdict(list)

    def watch(self, module, name: str, generates: bool = False):
        """Replace a module's function by one that is timed."""
        function = getattr(module, name)

        def timed(*arguments, **options):
            began = time.perf_counter()
            result = function(*arguments, **options)
            result = list(result) if generates else result
            self.seconds[name].append(time.perf_counter() - began)
            return result

        setattr(module, name, timed)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def parts(recipe: str, steps: int, folder: str) -> list[tuple[str, float, int]]:
    """Train a few steps; returns (part, seconds each, times in 10,000 steps), the update first."""
    config = RunConfig.load(
        recipe,
        corpus="shakespeare",
        corpus_config=None,
        tokenizer="train",
        validation_fraction=0.15,
        output_dir=folder,
        run_name="overhead",
        total_steps=steps,
        eval_every=1,
        log_every=1,
        checkpoint_every=1,
        keep_checkpoints=1,
        score_test=False,
    )
    shutil.rmtree(config.run_dir, ignore_errors=True)
    clock = Clock()
    for name in ("apply_update", "open_together", "save", "prepare", "finish"):
        clock.watch(training, name)
    for name in ("evaluate", "read_updates"):
        clock.watch(training, name, generates=True)
    clock.watch(preparing, "before_training")
    began = time.perf_counter()
    for record in training.train(config):
        if record.kind == "eval" and record.step == 0:
            looped = time.perf_counter()
    ended = time.perf_counter()
    known = ("apply_update", "read_updates", "save", "finish")
    # The evaluation of step 0 comes before `looped`.
    timed = sum(sum(clock.seconds[name]) for name in known) + sum(clock.seconds["evaluate"][1:])
    before = sum(clock.seconds[name][0] for name in ("open_together", "prepare", "evaluate"))
    audit = clock.seconds["before_training"][0]
    records = STEPS // RunConfig.load(recipe).log_every
    updates = clock.median("apply_update") * STEPS
    drawing = chart(config, folder, records) * (records + 2 * EVALUATIONS)
    return [
        ("updates", clock.median("apply_update"), STEPS),
        ("loop and guards", max(0.0, ended - looped - timed) / steps, STEPS),
        ("reading losses, metrics", clock.median("read_updates"), records),
        ("evaluations and samples", clock.median("evaluate"), EVALUATIONS),
        ("checkpoints", clock.median("save"), CHECKPOINTS),
        ("live chart (it limits itself)", min(drawing, live.CREDIT + live.SHARE * updates), 1),
        ("preparing the tokens, once", clock.seconds["open_together"][0], 1),
        ("preflight audit", audit, 1),
        ("building the model, lock, folder", looped - began - before, 1),
        ("the rest of prepare", clock.seconds["prepare"][0] - audit, 1),
        ("last results and curves", clock.seconds["finish"][0], 1),
    ]


def chart(config: RunConfig, folder: str, records: int) -> float:
    """Return the seconds to draw the live chart from the records of 10,000 steps."""
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    step, evaluation = (
        [record for record in found if record["kind"] == kind][-1] for kind in ("step", "eval")
    )
    run = Path(folder) / "long"
    run.mkdir(exist_ok=True)
    shutil.copy(config.run_dir / "config.json", run)
    with open(run / "metrics.jsonl", "w") as file:
        for record, number in ((step, records), (evaluation, EVALUATIONS)):
            for n in range(number):
                json.dump({**record, "step": (n + 1) * STEPS // number}, file)
                file.write("\n")
    widget = Figure(figures.training_curves(frames.read_runs(run)))
    began = time.perf_counter()
    for _ in range(10):
        figures.update(widget, frames.read_runs(run))
    return (time.perf_counter() - began) / 10


def seconds_to_first_step(command: list[str], run: Path) -> float:
    """Start a command; return the seconds until its run has made a step, then stop it."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=PROJECT_ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = run / "metrics.jsonl"
    try:
        while not (metrics.exists() and '"kind": "step"' in metrics.read_text()):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}.")
            time.sleep(0.02)
        return time.monotonic() - began
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def starts(folder: str) -> dict[str, float]:
    """Return the seconds to quickstart's first step by each command, the corpus cached."""
    lmlib = [sys.executable, "-m", "lmlib", "train", "params/quickstart.yaml"]
    changes = ["-p", "output_dir", folder, "-p", "log_every", "1", "-p", "run_name"]
    commands = {
        "make train": ["make", "train", "ARGS=" + " ".join([*changes, "make"])],
        "lmlib train": [*lmlib, *changes, "lmlib"],
    }
    found = {}
    seconds_to_first_step([*lmlib, *changes, "first"], Path(folder) / "first")  # fills the cache
    for name, command in commands.items():
        found[name] = seconds_to_first_step(command, Path(folder) / name.split()[0])
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default=str(PROJECT_ROOT / "params" / "exp9.yaml"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--no-start", action="store_true")
    options = parser.parse_args()
    outputs = resolve_path("outputs")
    with tempfile.TemporaryDirectory(dir=outputs) as folder:
        table = parts(options.recipe, options.steps, folder)
        whole = sum(seconds * times for _, seconds, times in table)
        for name, seconds, times in table:
            share = seconds * times / whole
            print(f"{name:<34}{seconds:10.4f} s x {times:>6,} {share:9.3%}")
        updates = table[0][1] * STEPS
        print(f"all but the updates: {1 - updates / whole:.2%} of {whole / 3600:.1f} hours")
        if not options.no_start:
            for name, seconds in starts(folder).items():
                print(f"{name}, from the command to the first step: {seconds:.1f} s")


if __name__ == "__main__":
    main()
