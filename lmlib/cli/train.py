"""lmlib train."""

import argparse
from typing import get_type_hints

from lmlib.config import RunConfig
from lmlib.parameters import parse_overrides


def train(options: argparse.Namespace):
    config = RunConfig.load(options.params, **parse_overrides(options.p, get_type_hints(RunConfig)))
    from lmlib import training
    from lmlib.analysis import figures
    from lmlib.run.records import describe
    from lmlib.run.start import finished_results, greeting

    print(greeting(config), flush=True)
    if finished_results(config):
        return
    try:
        for record in training.train(config):
            print(describe(record, config.total_steps), flush=True)
    except KeyboardInterrupt:
        figures.save_curves(config.run_dir)
        raise
