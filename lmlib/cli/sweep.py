"""lmlib sweep and find-rate."""

import argparse
import signal
import time
from typing import Any, get_type_hints

from lmlib.cli.display import show
from lmlib.cli.train import load_config
from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.files import read_mapping
from lmlib.parameters import parse_overrides
from lmlib.run.lock import hangup_signals
from lmlib.text import format_duration, printable


def sweep(options: argparse.Namespace) -> int:
    """Train every combination of the given values; return 1 if a run failed."""
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}; it must be 1 or more")
    hints, grid = get_type_hints(RunConfig), {}
    for name, *values in options.p:
        if not values:
            raise UserError(f"-p {name} has no value: write -p NAME VALUE, or several values, as "
                            "in -p seed 0 1 2")
        parsed = [parse_overrides([(name, value)], hints)[name] for value in values]
        grid[name] = grid.get(name, []) + parsed
    from lmlib.sweep.grid import plan
    return _train_all(plan(options.params, grid), options.jobs)


def _train_all(configs: list[RunConfig], jobs: int | None) -> int:
    """Train the runs of a sweep and print how each ended; return 1 if one failed."""
    from lmlib.analysis import ranking
    from lmlib.sweep import launch
    for number in (signal.SIGTERM, *hangup_signals()):
        signal.signal(number, _interrupt_once)
    folders = sorted({str(config.run_dir.parent) for config in configs})
    show(f"{len(configs)} runs in {', '.join(folders)}.")
    states, began = [], time.monotonic()
    for number, outcome in enumerate(launch.sweep(configs, jobs), 1):
        states.append(outcome.state)
        trained, left = len(states) - states.count("finished before"), len(configs) - number
        line = f"[{number}/{len(configs)}] {outcome.config.run_name}  {outcome.state}"
        if outcome.state == "failed":
            line += f": {printable(outcome.message)}"
        elif results := read_mapping(outcome.config.run_dir / "results.json"):
            line += (f"  {results['val_bits_per_byte']:.3f} bits per byte, "
                     f"{results['training_time_minutes']:.1f} minutes")
        if left and trained:
            each = (time.monotonic() - began) / trained
            line += f"  (about {format_duration(each * left)} left)"
        show(line)
    finished = [c.run_dir for c in configs if (c.run_dir / "results.json").exists()]
    show("\n" + ranking.summary(finished))
    return int("failed" in states)


def _interrupt_once(number: int, frame: Any):
    """Interrupt as Ctrl-C does, once: a terminal that closes may send SIGHUP again."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def find_rate(options: argparse.Namespace) -> int:
    """Print the losses of a range test and the rates that it suggests; train them if asked."""
    config = load_config(options)
    from lmlib.sweep.learning_rate import candidates, find_learning_rate  # imports torch
    found = find_learning_rate(config)
    every = max(1, len(found.factors) // 20)  # about 20 lines
    for factor, loss in zip(found.factors[::every], found.losses[::every], strict=True):
        print(f"{factor:8.3g} x the recipe's learning rates: loss {loss:.4f}")
    if not found.suggestion:
        raise UserError("The loss fell at no learning rate, so there is nothing to suggest.")
    suggested = (f"-p {name} {rate:g}" for name, rate in found.suggestion.items())
    print("Suggested:", *suggested, flush=True)
    return _train_all(candidates(found, options.confirm), None) if options.confirm else 0
