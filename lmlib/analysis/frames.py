"""Runs read as data frames: their records, their scores, and what tells them apart.

Whatever stands in a folder is shown as far as it goes and labelled: no record yet, a torn last line, another version's
fields, a run being written.
"""

import gc
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lmlib.config import RunConfig, unused
from lmlib.files import read_mapping, resolve_path
from lmlib.leaks import LEAKY, LEAKY_NAME, known_leaks
from lmlib.run.lock import run_status
from lmlib.run.records import parse_record
from lmlib.text import format_duration, printable

TEXTS = {"run", "kind", "path", "prompts", "texts", "expert_load", "windows", "model_name", "notes", "verdicts", "leaks", LEAKY}


LISTS = {"val_loss_by_position", "val_accuracy_by_position", "steps_skipped"}


AXES = {"step": "step", "tokens": "tokens trained", "minutes": "minutes of training", "flops": "floating-point operations"}


def read_runs(run_dirs: Iterable[str | Path] | str | Path) -> pd.DataFrame:
    """Every record of the runs as a row: run, kind, step, a column for each value and time, and the costs so far.

    `tokens`, `minutes` and `flops` stand beside `step` as other measures of how far a run was. Two runs of one name
    carry their parent folder's. `frame.attrs["notes"]` says, for each run, what is odd about it.

    Raises:
        ValueError: a folder is not there.
    """
    folders, frames, notes = named_folders(run_dirs), [], {}
    for run, folder in folders.items():
        records, torn = _records(folder / "metrics.jsonl")
        frame = pd.DataFrame(records)
        for column in ("kind", "step"):
            frame[column] = frame.get(column, np.nan)
        for column in frame.columns.difference(TEXTS | LISTS):
            numbers = pd.to_numeric(frame[column], errors="coerce").astype(float)
            frame[column] = numbers.where(numbers.abs() < 1e100)  # infinite or absurd: nothing that could be drawn
        frame = frame[frame["step"].notna()].assign(run=run)
        frame["minutes"] = frame["seconds"] / 60 if "seconds" in frame else np.nan
        frame["tokens"] = frame["step"] * _tokens_a_step(folder)
        frame["flops"] = frame["tokens"] * pd.to_numeric(_size(folder).get("flops_per_token"), errors="coerce")
        frames.append(frame)
        notes[run] = run_notes(folder, frame, torn)
    whole = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["run", "kind", "step", *AXES])
    whole.attrs = {"notes": notes, "runs": {run: str(folder) for run, folder in folders.items()}}
    return whole


def named_folders(run_dirs: Iterable[str | Path] | str | Path) -> dict[str, Path]:
    """The folders by the names that tell them apart, safe to print; one given twice counts once. A run that leaks has it in
    its name, and so in every table and figure.

    Raises:
        ValueError: a folder is not there.
    """
    given = [resolve_path(run_dir).absolute() for run_dir in ([run_dirs] if isinstance(run_dirs, str | Path) else run_dirs)]
    folders = list({folder.resolve(): folder for folder in given}.values())
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"There is no run {folder}. `python -m lmlib runs` lists the runs.")
    named: dict[str, Path] = {}
    for folder in folders:
        others, parts = [other.parts for other in folders if other != folder], 1
        while parts < len(folder.parts) and folder.parts[-parts:] in [other[-parts:] for other in others]:
            parts += 1
        mark = LEAKY_NAME if known_leaks(folder) else ""
        named[printable("/".join(folder.parts[-parts:])) + mark] = folder
    return named


def find_runs(output_dir: str | Path, nested: bool = False) -> list[Path]:
    """Every run in a folder, begun or only tried, and, if `nested`, those in folders of sweeps inside it; by name."""
    folder, files = resolve_path(output_dir), ("metrics.jsonl", "config.json", "sweep.yaml")
    depths = ("*", "*/*", "*/*/*") if nested else ("*",)
    found = {path.parent for depth in depths for file in files for path in folder.glob(f"{depth}/{file}")}
    return sorted(path for path in found if path.parent.name != "checkpoints" and path.name != "training_state")


def _records(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The file's records with their times beside their values, and how many lines are none."""
    lines = file.read_bytes().decode("utf-8", "replace").removesuffix("\n").split("\n") if file.exists() else []
    lines = [] if lines == [""] else lines
    collects = gc.isenabled()
    gc.disable()  # else Python looks for garbage among the new records again and again, for a third of the time
    try:
        found = json.loads(f"[{','.join(lines)}]")  # at once: three times as quick as line by line
    except (ValueError, RecursionError):
        found = []
    finally:
        if collects:
            gc.enable()
    if len(found) != len(lines):
        found = [parse_record(line) for line in lines]
    records = [record for record in found if _is_record(record)]
    flat = [{**t, **r} if isinstance(t := r.pop("timing", None), dict) else r for r in records]
    return flat, len(lines) - len(records)


def _is_record(found: Any) -> bool:
    """Whether it has a kind and a finite step."""
    is_known = isinstance(found, dict) and isinstance(found.get("kind"), str) and isinstance(found.get("step"), int | float)
    return is_known and abs(found["step"]) < 2**53


def _tokens_a_step(folder: Path) -> float:
    config = read_mapping(folder / "config.json")
    try:
        return float(config["batch_size"] * config["sequence_length"])
    except (KeyError, TypeError, ValueError):
        return np.nan


def _size(folder: Path) -> dict[str, Any]:
    """The model's counts of parameters and operations; runs of earlier versions have none."""
    model = read_mapping(folder / "environment.json").get("model")
    return model if isinstance(model, dict) else {}


def run_notes(folder: Path, frame: pd.DataFrame, torn: int) -> list[str]:
    leaks = known_leaks(folder)
    notes = [f"it LEAKS ({printable(leaks)})"] if leaks else []
    audited = read_mapping(folder / "environment.json").get("audit")
    verdicts = audited.get("verdicts") if isinstance(audited, dict) else None
    if not leaks and isinstance(verdicts, dict) and str(verdicts.get("split")).startswith("FAIL"):
        notes.append("held-out text stands in its training text (see the audit)")
    notes += [] if len(frame) else ["no record yet"]
    if torn:
        notes.append(f"{torn} line{'s' if torn > 1 else ''} of metrics.jsonl cannot be read")
    if not read_mapping(folder / "config.json"):
        notes.append("config.json is missing or cannot be read")
    measured = frame[frame["kind"].isin(["step", "eval"])]
    known = [
        measured.loc[measured["kind"] == kind, name] for kind, name in (("step", "loss"), ("eval", "val_loss")) if name in frame
    ]
    if len(measured) and not sum(map(len, known)):
        notes.append("it has no losses that this version knows")
    if any(column.isna().any() for column in known) or (frame["kind"] == "nonfinite").any():
        notes.append("some losses are not finite")
    return notes


def headline(frame: pd.DataFrame, run: str) -> str:
    """Where a run stands, in a line of plain text: its state, step, losses, speed, and the time it may still take."""
    folder, of_run = Path(frame.attrs["runs"][run]), frame[frame["run"] == run]
    status = run_status(folder) if folder.is_dir() else "its folder is gone"
    total = read_mapping(folder / "config.json").get("total_steps")
    parts = [status, f"step {int(of_run['step'].max())}" + (f" of {total}" if total else "")] if len(of_run) else [status]
    last = {kind: rows.iloc[-1] for kind, rows in of_run.groupby("kind")}
    if "step" in last and "loss" in of_run:
        parts.append(f"loss {last['step']['loss']:.4f}")
    if "eval" in last and "val_loss" in of_run:
        parts.append(f"held-out {last['eval']['val_loss']:.4f}")
    if "step" in last and {"tokens_per_second", "utilization", "seconds_left"} <= set(of_run):
        now = last["step"]
        parts.append(f"{now['tokens_per_second']:,.0f} tokens/s, {now['utilization']:.0%} of peak")
        if status == "running" and now["seconds_left"] == now["seconds_left"]:
            parts.append(f"{format_duration(now['seconds_left'])} left")
    return " | ".join([*parts, *frame.attrs["notes"].get(run, [])])


def texts_at(frame: pd.DataFrame, step: float = np.inf) -> list[tuple[str, str, str]]:
    """What the runs wrote at their last evaluation up to `step`: (run and step, prompt, text) each."""
    samples, found = frame[(frame["kind"] == "sample") & (frame["step"] <= step)], []
    for run, of_run in samples.groupby("run", sort=False):
        last = of_run.iloc[-1]
        prompts, texts = last.get("prompts"), last.get("texts")
        if isinstance(prompts, list) and isinstance(texts, list):
            heading = f"{run}, step {int(last['step'])}"
            found += [(heading, str(prompt), str(text)) for prompt, text in zip(prompts, texts, strict=False)]
    return found


SCORES = ["held-out loss", "± standard error", "best", "at step", "accuracy", "perplexity", "bits per byte"]


COSTS = ["parameters", "active", "minutes", "FLOPs"]


def results_table(run_dirs: Iterable[str | Path] | pd.DataFrame) -> pd.DataFrame:
    """A row a run: its last and best held-out scores, size, cost and state. All scores are on held-out text.

    Takes the runs' folders, or the frame that `read_runs` made of them.
    """
    frame, rows = run_dirs if isinstance(run_dirs, pd.DataFrame) else read_runs(run_dirs), {}
    for run, folder in frame.attrs["runs"].items():
        of_run = frame[frame["run"] == run]
        model = _size(Path(folder))
        row: dict[str, Any] = {"steps": int(of_run["step"].max()) if len(of_run) else 0}
        evals = of_run[(of_run["kind"] == "eval") & of_run.get("val_loss", of_run["step"]).notna()]
        if len(evals) and "val_loss" in evals:
            last, best = evals.iloc[-1], evals.loc[evals["val_loss"].idxmin()]
            row |= {
                "held-out loss": last["val_loss"],
                "± standard error": last.get("val_loss_stderr"),
                "best": best["val_loss"],
                "at step": int(best["step"]),
                "accuracy": last.get("val_accuracy"),
                "perplexity": last.get("val_perplexity"),
                "bits per byte": last.get("val_bits_per_byte"),
            }
        row |= {
            "parameters": model.get("parameter_count"),
            "active": model.get("active_parameter_count"),
            "minutes": of_run["minutes"].max(),
            "FLOPs": of_run["flops"].max(),
            "state": "; ".join([run_status(Path(folder)), *frame.attrs["notes"][run]]),
        }
        rows[run] = row
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=["steps", *SCORES, *COSTS, "state"])
    table[[*SCORES, *COSTS]] = table[[*SCORES, *COSTS]].apply(pd.to_numeric, errors="coerce")
    whole = ["at step", "parameters", "active"]
    table[whole] = table[whole].replace([np.inf, -np.inf], np.nan).round().astype("Int64")
    return table.rename_axis("run")


def parameters_table(run_dirs: Iterable[str | Path], differences_only: bool = True) -> pd.DataFrame:
    """The parameters of runs, a column a run, "-" where its model ignores one; by default only those that differ."""
    configs = {run: whole_config(folder) for run, folder in named_folders(run_dirs).items()}
    names = [name for name in dict.fromkeys(n for config in configs.values() for n in config) if name != "run_name"]
    table = pd.DataFrame(
        {run: [config.get(name, "(not given)") for name in names] for run, config in configs.items()}, index=names
    )
    table = table.astype(object).rename_axis("parameter")
    if differences_only:
        table = table[[len({repr(value) for value in row}) > 1 for row in table.to_numpy()]]
    return table


def whole_config(folder: Path) -> dict[str, Any]:
    """A run's parameters: those that came after it was made at their defaults, "-" for those that its model ignores."""
    config = read_mapping(folder / "config.json")
    config = {**RunConfig().to_dict(), **config} if config else {}
    ignored = unused(str(config.get("attention")), str(config.get("feed_forward")))
    config |= dict.fromkeys(ignored & config.keys(), "-")
    return {printable(name): printable(value) if isinstance(value, str) else value for name, value in config.items()}


def resumes(run_dir: str | Path) -> list[int]:
    """The steps at which a run was started again."""
    sessions = read_mapping(Path(run_dir) / "environment.json").get("sessions")
    sessions = sessions if isinstance(sessions, list) else []
    steps = [session.get("from_step") for session in sessions if isinstance(session, dict)]
    return sorted({step for step in steps[1:] if isinstance(step, int) and step > 0})
