"""lmlib train."""

import argparse
import contextlib
from typing import get_type_hints

from lmlib.config import RunConfig
from lmlib.parameters import parse_overrides, read_parameters


def load_config(options: argparse.Namespace) -> RunConfig:
    """Return the configuration that a recipe and its -p options describe."""
    overrides = parse_overrides(options.p, get_type_hints(RunConfig))
    return RunConfig(**read_parameters(options.params) | overrides)


def train(options: argparse.Namespace):
    """Train a recipe and print each record; Ctrl-C saves, and leaves the curves so far."""
    config = load_config(options)
    from lmlib import training  # imports torch, which an invalid parameter should not wait for
    from lmlib.run.records import describe
    from lmlib.run.start import find_start, greeting
    start = find_start(config)
    print(greeting(start), flush=True)
    if start.results:
        return
    try:
        for record in training.train(config, start):
            print(describe(record, config.total_steps), flush=True)
    except KeyboardInterrupt:
        with contextlib.suppress(ModuleNotFoundError):  # drawing needs the notebook packages
            from lmlib.analysis import figures
            if config.run_dir.is_dir():  # not yet while a new run tokenizes its corpus
                figures.save_curves(config.run_dir)
        raise
