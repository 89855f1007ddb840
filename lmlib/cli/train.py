"""lmlib train."""

import argparse
from pathlib import Path
from typing import get_type_hints

from lmlib.cli.display import show
from lmlib.config import RunConfig
from lmlib.parameters import parse_overrides
from lmlib.text import printable


def load_config(options: argparse.Namespace) -> RunConfig:
    """Return the configuration that a recipe and its -p options describe."""
    overrides = parse_overrides(options.p, get_type_hints(RunConfig))
    return RunConfig.load(options.params, **overrides)


def train(options: argparse.Namespace):
    """Train a recipe and print each record; Ctrl-C saves, and leaves the curves so far."""
    config = load_config(options)
    from lmlib import training  # imports torch, which an invalid parameter should not wait for
    from lmlib.run.records import describe
    from lmlib.run.start import find_start, greeting
    start = find_start(config)
    show(greeting(start, options.params))
    if start.results:
        return
    try:
        for record in training.train(config, start):
            show(describe(record, config.total_steps))
    except KeyboardInterrupt:
        if config.run_dir.is_dir():  # not yet while a new run tokenizes its corpus
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
