"""lmlib benchmark and export."""

import argparse

from lmlib.cli.display import paint, warn_of_leaks
from lmlib.errors import UserError
from lmlib.parameters import existing_folder


def benchmark(options: argparse.Namespace):
    """Print the scores of each checkpoint as it is scored."""
    from lmlib import checkpoint
    from lmlib.tools.benchmark import benchmark as score
    run_dir, steps = existing_folder(options.run), options.steps
    if "all" in steps and not (steps := checkpoint.checkpoint_steps(run_dir)):
        raise UserError(f"{options.run} has no checkpoints, so --steps all is none.")
    warn_of_leaks(run_dir)
    header = paint(f"{'step':>7}  {'task':<16} {'metric':<13} {'score':>7}{'± 1 SE':>9}"
                   f"{'chance':>9}{'items':>8}{'documents':>11}\n", "bold")
    for step, scores in score(run_dir, steps, options.tasks, options.text):
        for s in scores:
            error = "-" if s["stderr"] is None else f"{s['stderr']:.4f}"
            print(f"{header}{'-' if step is None else step:>7}  {s['task']:<16} {s['metric']:<13} "
                  f"{s['score']:>7.4f}{error:>9}{s['chance']:>9.4f}{s['items']:>8}"
                  f"{s['clusters']:>11}", flush=True)
            header = ""


def export(options: argparse.Namespace):
    """Write a model as a GGUF file."""
    from lmlib.tools import gguf
    warn_of_leaks(existing_folder(options.run))
    gguf.export(options.run, options.gguf, options.step)
    print(f"Wrote {options.gguf}, {options.gguf.stat().st_size / 1e6:.1f} MB.")
