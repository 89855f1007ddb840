"""lmlib audit, checkpoints, runs, stop."""

import argparse
import time
from pathlib import Path
from typing import Any

from lmlib.cli.parser import missing_packages
from lmlib.files import read_mapping, resolve_path
from lmlib.leaks import LEAKY, known_leaks
from lmlib.run.lock import lock_holder, run_status
from lmlib.run.records import read_records
from lmlib.text import printable


def audit(options: argparse.Namespace) -> int:
    """Print the verdicts and write the page; return 1 if a check failed."""
    page = Path(options.page) if options.page else None
    if page and (page.suffix != ".html" or not page.absolute().parent.is_dir()):
        raise ValueError(f"--page {options.page} must end in .html and lie in a folder that "
                         "exists.")
    from lmlib.run.run_audit import audit

    reports = audit(options.source, options.step)
    for report in reports:
        print(report, flush=True)
    folder = resolve_path(options.source)
    if page or (folder / "checkpoints").is_dir():
        _save_page(reports, options.source, page or folder / "audit.html")
    return 1 if any(report.passed is False for report in reports) else 0


def _save_page(reports: list, source: str, page: Path):
    try:
        from lmlib.analysis import audit_page
    except ModuleNotFoundError as error:  # the verdicts stand without it
        print(missing_packages("The page", error))
        return
    audit_page.save(reports, source, page)
    print(f"The page: {page}")


def checkpoints(options: argparse.Namespace):
    run_dir = resolve_path(options.run)
    if not run_dir.is_dir():
        raise ValueError(f"There is no run {options.run}. `lmlib runs` lists the runs.")
    print_checkpoints(run_dir)


def print_checkpoints(run_dir: Path):
    """Print a line per checkpoint: its validation loss, or why it cannot be used."""
    from lmlib import checkpoint

    folders = {step: run_dir / "checkpoints" / f"checkpoint_step_{step}"
               for step in checkpoint.checkpoint_steps(run_dir)}
    if not folders:
        print(f"{run_dir} has no checkpoint yet.")
    manifests, errors = {}, {}
    for step, folder in folders.items():
        try:
            manifests[step] = checkpoint.verify(folder)
        except ValueError as error:
            errors[step] = error
    best = min(manifests, key=lambda step: manifests[step]["val_loss"], default=None)
    for step, folder in folders.items():
        if step in errors:
            print(f"step {step:>7}  {printable(str(errors[step]))}")
            continue
        manifest = manifests[step]
        mark = "best" if step == best else "    "
        leaks = f"  LEAKS ({printable(str(manifest[LEAKY]))})" if manifest.get(LEAKY) else ""
        resumable = "  (can be resumed)" if (folder / "training_state").is_dir() else ""
        print(f"step {step:>7}  validation loss {manifest['val_loss']:.4f} "
              f"(of step {manifest['val_loss_step']})  {mark}{leaks}  "
              f"{printable(str(manifest['timestamp']))}{resumable}")


def runs(options: argparse.Namespace):
    """Print each run's status, last step, best validation loss, and what to know of them."""
    folder = resolve_path(options.output_dir).absolute()
    found = list({run.resolve(): run for run in _find_runs(folder)}.values())  # links: once
    names = [printable(str(run.relative_to(folder))) for run in found]
    for name, run in zip(names, found, strict=True):
        records = [r for r in read_records(run) if isinstance(r.get("step"), int)]
        last = max((r["step"] for r in records), default=0)
        evals = [r for r in records if r.get("kind") == "eval" and _is_finite(r.get("val_loss"))]
        best = min(evals, key=lambda r: r["val_loss"], default=None)
        score = f"{best['val_loss']:.4f} at step {best['step']}" if best else "-"
        line = (f"{name:<{max(24, *map(len, names))}} {run_status(run):<9} step {last:>7}  "
                f"best validation loss {score}")
        print(printable("; ".join([line, *_notes(run, records)])))
    if not found:
        print(f"There is no run in {folder}.")


def _find_runs(output_dir: Path) -> list[Path]:
    """Return the run folders in a folder and in the sweeps inside it, sorted."""
    found = {path.parent for depth in ("*", "*/*", "*/*/*")
             for name in ("metrics.jsonl", "config.json", "sweep.yaml")
             for path in output_dir.glob(f"{depth}/{name}")}
    # A checkpoint has a config.json too.
    return sorted(path for path in found
                  if path.parent.name != "checkpoints" and path.name != "training_state")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e100  # NaN is not below either


def _notes(run: Path, records: list[dict[str, Any]]) -> list[str]:
    """Say what qualifies a run's scores: leaks, missing files and losses."""
    audit = read_mapping(run / "environment.json").get("audit")
    verdicts = audit.get("verdicts") if isinstance(audit, dict) else None
    leaks, losses = known_leaks(run), {"step": "loss", "eval": "val_loss"}
    has_leaked_text = isinstance(verdicts, dict) and str(verdicts.get("split")).startswith("FAIL")
    is_nonfinite = any(r["kind"] == "nonfinite" or not _is_finite(r.get(losses[r["kind"]], 0))
                       for r in records if r.get("kind") in ("nonfinite", *losses))
    notes = {
        f"it LEAKS ({printable(leaks)})": leaks,
        "its training text contains validation text (see the audit)": has_leaked_text and not leaks,
        "no records yet": not records,
        "config.json is missing or cannot be read": not read_mapping(run / "config.json"),
        "some losses are not finite": is_nonfinite,
    }
    return [note for note, holds in notes.items() if holds]


def stop(options: argparse.Namespace):
    """Ask a run to stop, through a file in its folder, and wait until it has seen that."""
    run_dir = resolve_path(options.run)
    if not (run_dir / "config.json").exists():
        raise ValueError(f"There is no run {options.run}. `lmlib runs` lists the runs.")
    # A folder without locks may be shared with the machine that trains there.
    if lock_holder(run_dir) is None and run_dir.parent.joinpath(".locks").exists():
        raise ValueError(f"{options.run} is not running here, so there is nothing to stop.")
    request = run_dir / "stop"
    request.touch()
    print(f"Asked {run_dir.name} to stop: it finishes the current step, saves and stops.",
          flush=True)
    while request.exists() and lock_holder(run_dir) is not None:
        time.sleep(0.1)
    request.unlink(missing_ok=True)
    print("It is stopping.")
