"""lmlib audit, checkpoints, runs, stop."""

import argparse
import time
from pathlib import Path

from lmlib.files import resolve_path
from lmlib.leaks import LEAKY
from lmlib.text import printable


def audit(options: argparse.Namespace) -> int:
    """Print the verdicts and write the page; 1 if a check failed."""
    page = Path(options.page) if options.page else None
    if page and (page.suffix != ".html" or not page.absolute().parent.is_dir()):
        raise ValueError(f"--page {options.page} must end in .html and lie in a folder that exists.")
    from lmlib.analysis import audit_page
    from lmlib.run.run_audit import audit

    reports = audit(options.source, options.step)
    for report in reports:
        print(report, flush=True)
    folder = resolve_path(options.source)
    page = page or (folder / "audit.html" if (folder / "checkpoints").is_dir() else None)
    if page:
        audit_page.save(reports, options.source, page)
        print(f"The page: {page}")
    return 1 if any(report.passed is False for report in reports) else 0


def checkpoints(options: argparse.Namespace):
    run_dir = resolve_path(options.run)
    if not run_dir.is_dir():
        raise ValueError(f"There is no run {options.run}. `python -m lmlib runs` lists the runs.")
    _print_checkpoints(run_dir)


def _print_checkpoints(run_dir: Path):
    from lmlib import checkpoint

    steps, manifests, failures = checkpoint.checkpoint_steps(run_dir), {}, {}
    for step in steps:
        try:
            manifests[step] = checkpoint.verify(run_dir / "checkpoints" / f"checkpoint_step_{step}")
        except ValueError as error:
            failures[step] = error
    best = min(manifests, key=lambda step: manifests[step]["val_loss"], default=None)
    for step in steps:
        if step in failures:
            print(f"step {step:>7}  {printable(str(failures[step]))}")
            continue
        manifest = manifests[step]
        line = f"step {step:>7}  held-out loss {manifest['val_loss']:.4f} (of step {manifest['val_loss_step']})"
        line += "  best" if step == best else "      "
        line += f"  LEAKS ({printable(str(manifest[LEAKY]))})" if manifest.get(LEAKY) else ""
        resumable = (run_dir / "checkpoints" / f"checkpoint_step_{step}" / "training_state").is_dir()
        print(f"{line}  {printable(str(manifest['timestamp']))}{'  (can be continued)' if resumable else ''}")
    if not steps:
        print(f"{run_dir} has no checkpoint yet.")


def runs(options: argparse.Namespace):
    from lmlib.analysis import frames

    folder = resolve_path(options.output_dir).absolute()
    found = frames.named_folders(frames.find_runs(folder, nested=True)).values()
    names = [printable(str(run_dir.relative_to(folder))) for run_dir in found]
    for name, (_, row) in zip(names, frames.results_table(found).iterrows(), strict=True):
        state, *notes = row["state"].split("; ")
        line = f"{name:<{max(24, *map(len, names))}} {state:<9} step {row['steps']:>7}  best held-out loss "
        line += f"{row['best']:.4f} at step {int(row['at step'])}" if row["best"] == row["best"] else "-"
        print(printable("; ".join([line, *notes])))
    if not names:
        print(f"There is no run in {folder}.")


def stop(options: argparse.Namespace):
    from lmlib.run.lock import lock_holder

    run_dir = resolve_path(options.run)
    if not (run_dir / "config.json").exists():
        raise ValueError(f"There is no run {options.run}. `python -m lmlib runs` lists the runs.")
    if lock_holder(run_dir) is None and run_dir.parent.joinpath(".locks").exists():
        raise ValueError(f"{options.run} is not running here, so there is nothing to stop.")
    (run_dir / "stop").touch()
    print(f"Asked {run_dir.name} to stop; it ends the step at hand, saves and stops.", flush=True)
    while (run_dir / "stop").exists() and lock_holder(run_dir) is not None:
        time.sleep(0.1)
    (run_dir / "stop").unlink(missing_ok=True)
    print("It is stopping.")
