"""lmlib train."""

import argparse
import os
import traceback
import warnings
from pathlib import Path
from typing import get_type_hints

from lmlib.cli.display import show
from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.parameters import parse_overrides
from lmlib.run.lock import stop_with_parent
from lmlib.text import printable

# How a process ends that a launcher started: after an error that is no UserError, and where it has
# lost the others.
CRASHED, LOST = 70, 71
# What errors say that mean only the latter.
SIGNS_OF_LOSS = ("Connection closed", "Connection reset", "Connection was likely closed",
                 "Broken pipe", "Timed out waiting", "imeout")


def load_config(options: argparse.Namespace) -> RunConfig:
    """Return the configuration that a recipe and its -p options describe."""
    overrides = parse_overrides(options.p, get_type_hints(RunConfig))
    return RunConfig.load(options.params, **overrides)


def train(options: argparse.Namespace) -> int:
    """Train a recipe and print each record; Ctrl-C saves, and leaves the curves so far."""
    is_worker = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1
    stop_with_parent(os.getppid() if is_worker else None)
    if options.processes is not None:
        options.p.append(["processes", str(options.processes)])
    try:
        config = load_config(options)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 1  # the first process of this machine says it
        raise
    if not is_worker and (config.processes > 1 or options.restarts):
        from lmlib.cli.launch import launch
        return launch(config, options)
    return _work(config, options.params) if is_worker else _train(config, options.params)


def _work(config: RunConfig, recipe: Path) -> int:
    """Train as one of the processes that a launcher has started; rank 0 speaks for all."""
    from lmlib import distributed
    if not distributed.is_first():
        warnings.simplefilter("ignore")
    try:
        with distributed.join():
            return _train(config, recipe)
    except UserError as error:
        if distributed.is_first() or isinstance(error, distributed.LocalError):
            raise
        return 1
    except KeyboardInterrupt as stopped:
        if distributed.is_first():
            show("\n" + printable(str(stopped)), stream="stderr")
        # torchrun would start again whatever has another status.
        return 0 if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" else 130
    except Exception as error:
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS_OF_LOSS):
            return LOST
        traceback.print_exc()
        return CRASHED


def _train(config: RunConfig, recipe: Path) -> int:
    from lmlib import distributed, training  # torch, which an invalid parameter does not wait for
    from lmlib.run.records import describe
    from lmlib.run.start import find_start, greeting
    start = distributed.agree(lambda: find_start(config))
    if distributed.is_first():
        show(greeting(start, recipe))
    if start.results:
        return 0
    try:
        for record in training.train(config, start):
            if distributed.is_first():
                show(describe(record, config.total_steps))
    except KeyboardInterrupt:
        # Not yet while a new run tokenizes its corpus; the others would wait for it.
        if config.run_dir.is_dir() and not distributed.is_launched():
            draw_curves(config.run_dir)
        raise
    return 0


def draw_curves(run_dir: Path):
    """Draw the curves so far; an error is reported, since the run is saved."""
    try:
        from lmlib.analysis import figures
        figures.save_curves(run_dir)
    except ModuleNotFoundError:
        return  # drawing needs the notebook packages
    except Exception as error:
        show(f"The curves cannot be drawn: {printable(str(error))}", stream="stderr")
