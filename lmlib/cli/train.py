"""lmlib train."""

import argparse
import os
import traceback
from pathlib import Path
from typing import get_type_hints

from lmlib.cli.display import show
from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.parameters import parse_overrides
from lmlib.run.lock import stop_with_parent
from lmlib.text import printable

CRASHED = 70  # exit status of one of several processes, after an error that is no UserError


def load_config(options: argparse.Namespace) -> RunConfig:
    """Return the configuration that a recipe and its -p options describe."""
    overrides = parse_overrides(options.p, get_type_hints(RunConfig))
    return RunConfig.load(options.params, **overrides)


def train(options: argparse.Namespace) -> int:
    """Train a recipe and print each record; Ctrl-C saves, and leaves the curves so far."""
    stop_with_parent(os.getppid() if "WORLD_SIZE" in os.environ else None)
    if options.processes is not None:
        options.p.append(["processes", str(options.processes)])
    config = load_config(options)
    if (config.processes > 1 or options.restarts) and "WORLD_SIZE" not in os.environ:
        from lmlib.cli.launch import launch
        return launch(config, options)
    from lmlib import distributed  # imports torch, which an invalid parameter should not wait for
    try:
        with distributed.join():
            _train(config, options.params)
    except (UserError, KeyboardInterrupt) as stopped:
        if distributed.is_first() or isinstance(stopped, distributed.Alone):
            raise
        return 130 if isinstance(stopped, KeyboardInterrupt) else 1  # rank 0 says it, once
    except Exception as error:
        if not distributed.is_launched():
            raise
        if not distributed.is_lost(error):  # else another process has ended, and says why
            traceback.print_exc()
        return CRASHED
    return 0


def _train(config: RunConfig, recipe: Path):
    from lmlib import distributed, training
    from lmlib.run.records import describe
    from lmlib.run.start import find_start, greeting
    start = distributed.agree(lambda: find_start(config))
    if distributed.is_first():
        show(greeting(start, recipe))
    if start.results:
        return
    try:
        for record in training.train(config, start):
            if distributed.is_first():
                show(describe(record, config.total_steps))
    except KeyboardInterrupt:
        # Not yet while a new run tokenizes its corpus.
        if config.run_dir.is_dir() and distributed.is_first():
            _draw_curves(config.run_dir)
        raise


def _draw_curves(run_dir: Path):
    """Draw the curves so far; an error is reported, since the run is saved."""
    try:
        from lmlib.analysis import figures
        figures.save_curves(run_dir)
    except ModuleNotFoundError:
        return  # drawing needs the notebook packages
    except Exception as error:
        show(f"The curves cannot be drawn: {printable(str(error))}", stream="stderr")
