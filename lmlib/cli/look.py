"""lmlib audit, checkpoints, runs, stop, clean."""

import argparse
import sys
import textwrap
import time
from pathlib import Path

from lmlib.cli.display import confirm, format_size, paint
from lmlib.cli.parser import missing_packages
from lmlib.errors import UserError
from lmlib.files import resolve_path
from lmlib.leaks import LEAKY
from lmlib.parameters import existing_folder
from lmlib.run.lock import lock_holder
from lmlib.text import printable

WIDTH = 100  # columns of a table of runs, notes and warnings


def audit(options: argparse.Namespace) -> int:
    """Print the verdicts and write the page; return 1 if a check failed."""
    page = Path(options.page) if options.page else None
    if page and (page.suffix != ".html" or not page.absolute().parent.is_dir()):
        raise UserError(f"--page {page} must end in .html and lie in a folder that exists.")
    from lmlib.run import run_audit
    found, reports = run_audit.audit(options.source, options.step), []
    colors = {True: "green", False: "red", None: "yellow"}
    for report in found:
        reports.append(report)
        number = f"{len(reports):>2} of {len(found)}  " if sys.stdout.isatty() else ""
        verdict = paint(report.verdict, colors[report.passed])
        print(f"{number}{str(report).replace(report.verdict, verdict, 1)}", flush=True)
    folder = resolve_path(options.source)
    if page or (folder / "checkpoints").is_dir():
        page = page or folder / "audit.html"
        try:
            from lmlib.analysis import audit_page
            audit_page.save(reports, options.source, page)
            print(f"The page: {page}")
        except ModuleNotFoundError as error:  # the verdicts stand without it
            print(missing_packages("The page", error))
    return int(any(report.passed is False for report in reports))


def checkpoints(options: argparse.Namespace):
    """Print a line per checkpoint: its validation loss, or why it cannot be used."""
    from lmlib import checkpoint
    run_dir = existing_folder(options.run)
    folders = {step: run_dir / "checkpoints" / f"checkpoint_step_{step}"
               for step in checkpoint.checkpoint_steps(run_dir)}
    manifests, errors = {}, {}
    for step, folder in folders.items():
        try:
            manifests[step] = checkpoint.verify(folder)
        except ValueError as error:
            errors[step] = str(error)
    best = next(iter(checkpoint.best_steps(manifests)), None)
    for step, folder in folders.items():
        if not (line := errors.get(step)):
            manifest = manifests[step]
            leaks = f"  LEAKS ({manifest[LEAKY]})" if manifest.get(LEAKY) else ""
            resumable = "  (can be resumed)" if (folder / "training_state").is_dir() else ""
            line = (f"validation loss {manifest['val_loss']:.4f} (of step "
                    f"{manifest['val_loss_step']})  {'best' if step == best else '    '}{leaks}  "
                    f"{manifest['timestamp']}{resumable}")
        print(f"step {step:>7}  {printable(line)}")
    if not folders:
        print(f"{run_dir} has no checkpoint yet.")


def runs(options: argparse.Namespace):
    """Print a line per run, newest first: state, start, steps, bits per byte; below it notes, and
    the forecast of an unfinished run.
    """
    from lmlib.analysis import forecast, frames
    output_dir = resolve_path(options.output_dir).absolute()
    table = frames.overview(output_dir)
    if table.empty:
        print(f"There is no run in {output_dir}.")
        return
    colors = {"finished": "green", "running": "blue", "died": "red", "stopped": "yellow"}
    width = min(max(16, *map(len, table.index)), WIDTH - 54)
    print(paint(f"{'run':<{width}}  {'state':<8}  {'started':<10}  {'steps':>15}  "
                "bits per byte", "bold"))
    for name, row in table.iterrows():
        date, bits = row["date"], row["bits per byte"]
        date = f"{date:%Y-%m-%d}" if date == date else "-"  # NaT and NaN equal nothing
        bits = f"{bits:.3f}" if bits == bits else "-"
        total = f" of {row['total']:,}" if isinstance(row["total"], int) else ""
        state = paint(f"{row['state']:<8}", colors.get(row["state"], "dim"))
        name = name if len(name) <= width else f"{name}\n{'':<{width}}"
        print(f"{name:<{width}}  {state}  {date:<10}  {f'{row.steps:,}{total}':>15}  {bits:>13}")
        for line in _wrapped(printable(row["notes"]), indent="    "):
            print(paint(line, "yellow"))
        if expected := forecast(row["folder"]):
            print(paint(f"    forecast of validation loss at step {expected.step:,}: "
                        f"{expected.loss:.3f} (90 %: {expected.low:.3f} to {expected.high:.3f})",
                        "dim"))
    if warning := frames.loss_column(table["folder"])[1]:
        print(paint("\n".join(["", *_wrapped(warning)]), "yellow"))


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def stop(options: argparse.Namespace):
    """Ask a run to stop, through a file in its folder, and wait until it has seen that."""
    run_dir = existing_folder(options.run)
    if not (run_dir / "config.json").exists():
        raise UserError(f"{options.run} is not a run. `lmlib runs` lists the runs.")
    # A folder without locks may be shared with the machine that trains there.
    if lock_holder(run_dir) is None and (run_dir.parent / ".locks").exists():
        raise UserError(f"{options.run} is not running here, so there is nothing to stop.")
    request = run_dir / "stop"
    request.touch()
    print(f"Asked {run_dir.name} to stop: it finishes its step, saves and stops.", flush=True)
    while request.exists() and lock_holder(run_dir) is not None:
        time.sleep(0.1)
    request.unlink(missing_ok=True)
    print("It is stopping.")


def clean(options: argparse.Namespace) -> int:
    """Show caches and drafts that no run uses, and delete them if that is confirmed."""
    from lmlib.run.clean import delete, find_leftovers
    output_dir = resolve_path(options.output_dir)
    if not output_dir.is_dir():
        raise UserError(f"There is no folder {options.output_dir}.")
    found = find_leftovers(output_dir)
    if not found:
        print(f"There is nothing to delete in {output_dir}.")
        return 0
    for leftover in found:
        path = printable(str(leftover.path.relative_to(output_dir)))
        print(f"{format_size(leftover.size):>9}  {path}  ({leftover.why})")
    print(f"{format_size(sum(leftover.size for leftover in found)):>9}  in all")
    if not options.yes and not (sys.stdin.isatty() and confirm("Delete? [y/N] ")):
        print("Nothing is deleted. To delete these: lmlib clean --yes")
        return 0
    kept = delete(output_dir, found)
    for leftover in kept:
        print(f"{printable(str(leftover.path))} is in use now, so it is kept.")
    print(f"Deleted: {len(found) - len(kept)}.")
    return 0
