"""Read run folders as data frames: records, scores, and the parameters that differ.

A run may be empty, running, damaged or of another version: what can be read is shown.
"""

import gc
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lmlib.config import ABSENT, RunConfig, unused_parameters
from lmlib.errors import UserError
from lmlib.files import read_mapping, resolve_path
from lmlib.intervals import FEW
from lmlib.leaks import LEAKY, LEAKY_NAME, known_leaks
from lmlib.run.lock import run_status
from lmlib.run.records import parse_record
from lmlib.text import format_duration, printable

NOT_NUMBERS = {"run", "kind", "path", "prompts", "texts", "model_name", "notes", "verdicts", LEAKY,
               "leaks", "windows", "expert_load", "steps_skipped", "val_loss_by_position",
               "val_accuracy_by_position", "test_steps", "lineage"}
AXES = {"step": "step", "tokens": "tokens trained", "minutes": "minutes of training",
        "flops": "training FLOPs"}
SCORES = ["validation loss", "± standard error", "documents", "best", "at step", "accuracy",
          "perplexity", "bits per byte"]
TEST_SCORES = ["test loss", "± test", "test bits per byte"]
COSTS = ["parameters", "active", "minutes", "FLOPs"]


def read_runs(run_dirs: Iterable[str | Path] | str | Path) -> pd.DataFrame:
    """Return the records of runs, one per row: run, kind, step, and a column per value and timing.

    The columns `tokens`, `minutes` and `flops` hold the cost up to that step. `frame.attrs["runs"]`
    maps each run's name to its folder, in the order asked for, which decides its color everywhere;
    `frame.attrs["notes"]` to its `run_notes`. A folder that does not exist is a ValueError.
    """
    folders, frames, notes = named_folders(run_dirs), [], {}
    for run, folder in folders.items():
        records, invalid = _records(folder / "metrics.jsonl")
        frame = pd.DataFrame(records, columns=None if records else ["kind", "step"])
        for column in frame.columns.difference(NOT_NUMBERS):
            numbers = pd.to_numeric(frame[column], errors="coerce").astype(float)
            frame[column] = numbers.where(numbers.abs() < 1e100)  # Plotly cannot scale to more
        config = read_mapping(folder / "config.json") | environment(folder, "model")
        sizes = [config.get(key) for key in ("batch_size", "sequence_length", "flops_per_token")]
        batch, length, flops = pd.to_numeric(pd.Series(sizes, dtype=object), errors="coerce")
        minutes = frame["seconds"] / 60 if "seconds" in frame else np.nan
        frame = frame.assign(run=run, minutes=minutes, tokens=frame["step"] * (batch * length))
        frames.append(frame.assign(flops=frame["tokens"] * flops))
        notes[run] = run_notes(folder, frame, invalid)
    whole = pd.concat(frames or [pd.DataFrame(columns=["run", "kind", *AXES])], ignore_index=True)
    whole.attrs = {"notes": notes, "runs": {run: str(folder) for run, folder in folders.items()}}
    return whole


def named_folders(run_dirs: Iterable[str | Path] | str | Path) -> dict[str, Path]:
    """Return run folders by printable names: "small", or "2025/small" if that is not unique.

    The name of a run that leaks says so, and with it every table and figure. A folder that does
    not exist is a ValueError.
    """
    run_dirs = [run_dirs] if isinstance(run_dirs, str | Path) else run_dirs
    given = [resolve_path(run_dir).absolute() for run_dir in run_dirs]
    folders = list({folder.resolve(): folder for folder in given}.values())  # each of them once
    named: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"There is no run {folder}. `lmlib runs` lists the runs.")
        others, length = [other.parts for other in folders if other != folder], 1
        while folder.parts[-length:] in [parts[-length:] for parts in others]:
            length += 1
        mark = LEAKY_NAME if known_leaks(folder) else ""
        named[printable("/".join(folder.parts[-length:])) + mark] = folder
    return named


def find_runs(output_dir: str | Path, nested: bool = False) -> list[Path]:
    """Return the run folders in a folder, sorted; if `nested`, also those of sweeps inside it."""
    folder, files = resolve_path(output_dir), ("metrics.jsonl", "config.json", "sweep.yaml")
    found = {path.parent for depth in ("*", "*/*", "*/*/*")[: 3 if nested else 1]
             for file in files for path in folder.glob(f"{depth}/{file}")}
    return sorted(path for path in found  # a checkpoint has a config.json too
                  if path.parent.name != "checkpoints" and path.name != "training_state")


def _records(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Return a file's records, their timing merged in, and the number of lines that are invalid."""
    text = file.read_bytes().decode("utf-8", "replace").removesuffix("\n") if file.is_file() else ""
    text = text.replace('"utilisation":', '"utilization":')  # the spelling of earlier versions
    lines = text.split("\n") if text else []
    collecting = gc.isenabled()
    gc.disable()  # scanning the new records for cycles can take two thirds of the time
    try:
        found = json.loads(f"[{','.join(lines)}]")  # three times as fast as line by line
    except (ValueError, RecursionError):
        found = []
    finally:
        if collecting:
            gc.enable()
    if len(found) != len(lines):
        found = [parse_record(line) for line in lines]
    records = [record for record in found if isinstance(record, dict)
               and isinstance(record.get("kind"), str)
               and isinstance(record.get("step"), int | float) and abs(record["step"]) < 2**53]
    flat = [{**t, **r} if isinstance(t := r.pop("timing", None), dict) else r for r in records]
    return flat, len(lines) - len(records)


def environment(folder: Path, *keys: str) -> dict[str, Any]:
    """Return a mapping inside a run's environment.json, empty where it is missing or invalid."""
    found = read_mapping(folder / "environment.json")
    for key in keys:
        found = found[key] if isinstance(found.get(key), dict) else {}
    return found


def run_notes(folder: Path, frame: pd.DataFrame, invalid: int) -> list[str]:
    """Return what a reader of a run's scores must know: leaks, and what is missing or invalid."""
    leaks, split = known_leaks(folder), str(environment(folder, "audit", "verdicts").get("split"))
    losses = [frame.loc[frame["kind"] == kind, column]
              for kind, column in (("step", "loss"), ("eval", "val_loss")) if column in frame]
    tested = read_mapping(folder / "results.json").get("test_steps")
    tested = tested if isinstance(tested, list) else []
    evals = frame[frame["kind"] == "eval"]
    documents = (evals["val_documents"].iloc[-1]
                 if len(evals) and "val_documents" in evals else np.nan)
    known = read_mapping(folder / "environment.json").get("lineage")
    has_parent = read_mapping(folder / "config.json").get("init_from") is not None
    notes = {
        f"it LEAKS ({printable(leaks)})": leaks,
        "lineage unknown": known == "unknown" or (known is None and has_parent),
        f"scored on only {documents:.0f} document{'' if documents == 1 else 's'}": documents < FEW,
        f"its test text was scored at {len(tested)} steps": len(tested) > 1,
        "its training text contains validation text (see the audit)":
            not leaks and split.startswith("FAIL"),
        "no records yet": frame.empty,
        f"{invalid} line{'s' * (invalid > 1)} of metrics.jsonl cannot be read": invalid,
        "config.json is missing or cannot be read": not read_mapping(folder / "config.json"),
        "its losses have names that this version does not know":
            frame["kind"].isin(["step", "eval"]).any() and not any(map(len, losses)),
        "some losses are not finite":
            any(loss.isna().any() for loss in losses) or "nonfinite" in set(frame["kind"])}
    return [note for note, holds in notes.items() if holds]


def headline(frame: pd.DataFrame, run: str) -> str:
    """Return a run's state in one line of plain text: step, losses, speed, and the time left."""
    folder, records = Path(frame.attrs["runs"][run]), frame[frame["run"] == run]
    parts = [status := run_status(folder) if folder.is_dir() else "folder deleted"]
    if len(records):
        total = read_mapping(folder / "config.json").get("total_steps")
        parts.append(f"step {int(records['step'].max())}" + (f" of {total}" if total else ""))
    last = {kind: dict(rows.iloc[-1]) for kind, rows in records.groupby("kind")}
    step, evaluation = last.get("step", {}), last.get("eval", {})
    if "loss" in step:
        parts.append(f"loss {step['loss']:.4f}")
    if "val_loss" in evaluation:
        parts.append(f"validation loss {evaluation['val_loss']:.4f}")
    if {"tokens_per_second", "utilization", "seconds_left"} <= set(step):
        parts.append(f"{step['tokens_per_second']:,.0f} tokens/s, {step['utilization']:.0%} MFU")
        if status == "running" and pd.notna(left := step["seconds_left"]):
            parts.append(f"{format_duration(left)} left")
    return " | ".join([*parts, *frame.attrs["notes"].get(run, [])])


def samples_at(frame: pd.DataFrame, step: float = np.inf) -> list[tuple[str, str, str]]:
    """Return the samples of each run's last evaluation up to `step`: (heading, prompt, text)."""
    samples = frame[(frame["kind"] == "sample") & (frame["step"] <= step)]
    last = samples.drop_duplicates("run", keep="last").to_dict("records")
    return [(f"{row['run']}, step {int(row['step'])}", str(prompt), str(text)) for row in last
            if isinstance(row.get("prompts"), list) and isinstance(row.get("texts"), list)
            for prompt, text in zip(row["prompts"], row["texts"], strict=False)]


def results_table(run_dirs: Iterable[str | Path] | pd.DataFrame) -> pd.DataFrame:
    """Return one row per run: its last and best validation scores, test scores, size, cost, state.

    Takes the runs' folders, or the frame that `read_runs` made of them. A standard error without a
    number of documents is left out: older versions took windows for independent.
    """
    frame, rows = run_dirs if isinstance(run_dirs, pd.DataFrame) else read_runs(run_dirs), {}
    for run, folder in frame.attrs["runs"].items():
        records, model = frame[frame["run"] == run], environment(Path(folder), "model")
        scores, evals = [np.nan] * len(SCORES), records[records["kind"] == "eval"]
        if "val_loss" in evals and len(evals := evals.dropna(subset="val_loss")):
            last, best = evals.iloc[-1], evals.loc[evals["val_loss"].idxmin()]
            documents = last.get("val_documents", np.nan)
            error = last.get("val_loss_stderr") if documents > 1 else np.nan
            scores = [last["val_loss"], error, documents, best["val_loss"], best["step"],
                      *map(last.get, ["val_accuracy", "val_perplexity", "val_bits_per_byte"])]
        results = read_mapping(Path(folder) / "results.json")
        tested = map(results.get, ["test_loss", "test_loss_stderr", "test_bits_per_byte"])
        rows[run] = [int(records["step"].max()) if len(records) else 0, *scores, *tested,
                     model.get("parameter_count"), model.get("active_parameter_count"),
                     records["minutes"].max(), records["flops"].max(),
                     "; ".join([run_status(Path(folder)), *frame.attrs["notes"][run]])]
    numbers, counts = [*SCORES, *TEST_SCORES, *COSTS], ["documents", "at step", "parameters",
                                                        "active"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["steps", *numbers, "state"])
    table[numbers] = table[numbers].apply(pd.to_numeric, errors="coerce")
    table[counts] = table[counts].replace([np.inf, -np.inf], np.nan).round().astype("Int64")
    table.attrs["runs"] = frame.attrs["runs"]
    return table.rename_axis("run")


def overview(output_dir: str | Path) -> pd.DataFrame:
    """Return the runs under a folder, sweeps' too, newest first; the index is the path inside it.

    Columns: state ("running", "finished", ...), date (when it was last started, local time),
    steps, total (steps asked for), bits per byte (of the last evaluation), notes, folder.
    """
    output_dir = resolve_path(output_dir).absolute()
    folders = list(named_folders(find_runs(output_dir, nested=True)).values())
    table = results_table(folders)
    states = [state.partition("; ") for state in table["state"]]
    dates = pd.to_datetime([_last_start(folder) for folder in folders], utc=True, errors="coerce")
    found = pd.DataFrame({
        "state": [state for state, _, _ in states],
        "date": dates.tz_convert(datetime.now().astimezone().tzinfo),
        "steps": table["steps"].tolist(),
        "total": [read_mapping(folder / "config.json").get("total_steps") for folder in folders],
        "bits per byte": table["bits per byte"].tolist(),
        "notes": [notes for _, _, notes in states], "folder": list(map(str, folders))})
    found.index = [printable(folder.relative_to(output_dir).as_posix()) for folder in folders]
    return found.sort_values("date", ascending=False, kind="stable").rename_axis("run")


def _last_start(folder: Path) -> Any:
    """Return when a run was last started or resumed, as environment.json says; None if unknown."""
    sessions = read_mapping(folder / "environment.json").get("sessions")
    last = sessions[-1] if isinstance(sessions, list) and sessions else {}
    return last.get("started") if isinstance(last, dict) else None


def evaluated_on(folder: Path) -> dict[str, Any]:
    """Return what decides whether two runs' losses can be compared: text, tokenizer and windows."""
    config, hashes = whole_config(folder), environment(folder, "data")
    old = environment(folder, "fingerprints")  # what older versions recorded
    return {"validation text": hashes.get("validation", old.get("validation.bin")),
            "tokenizer": hashes.get("tokenizer", old.get("tokenizer.json")),
            "sequence_length": config.get("sequence_length"),
            "validation_windows": config.get("validation_windows")}


def loss_column(run_dirs: Iterable[str | Path]) -> tuple[str, str]:
    """Return the column in which runs can be compared, and a warning, "" if there is none.

    That is "val_loss" where all runs were scored on the same windows in the same tokens, else
    "val_bits_per_byte".
    """
    texts = [evaluated_on(Path(folder)) for folder in run_dirs]
    different = [name for name in (texts[0] if texts else [])
                 if len({repr(text[name]) for text in texts}) > 1]
    if not different:
        return "val_loss", ""
    other_text = ("" if different == ["tokenizer"] else
                  " They were scored on different text, so small differences mean nothing.")
    names = ", ".join(different)
    return "val_bits_per_byte", (f"⚠ These runs differ in {names}: their losses per token cannot "
                                 f"be compared, bits per byte can.{other_text}")


def parameters_table(run_dirs: Iterable[str | Path], differences_only: bool = True) -> pd.DataFrame:
    """Return one column per run with its parameters: all, or only those that differ."""
    configs = {run: whole_config(folder) for run, folder in named_folders(run_dirs).items()}
    names = list(dict.fromkeys(name for config in configs.values() for name in config
                               if name != "run_name"))
    columns = {run: [config.get(name, "(not given)") for name in names]
               for run, config in configs.items()}
    table = pd.DataFrame(columns, index=names).astype(object).rename_axis("parameter")
    if differences_only:  # compared as text, since a value may be a list
        table = table[[len(set(map(repr, row))) > 1 for row in table.to_numpy()]]
    return table


def whole_config(folder: Path) -> dict[str, Any]:
    """Return a run's parameters; "-" for those that its model ignores.

    A parameter of a later version has the value that means "absent", whatever today's default is.
    """
    config = read_mapping(folder / "config.json")
    config = {**RunConfig().to_dict(), **ABSENT, **config} if config else {}
    ignored = unused_parameters(str(config.get("attention")), str(config.get("feed_forward")))
    config |= dict.fromkeys(ignored & config.keys(), "-")
    return {printable(name): printable(value) if isinstance(value, str) else value
            for name, value in config.items()}


def resumes(run_dir: str | Path) -> list[int]:
    """Return the steps from which a run was resumed: the starts of all sessions but the first."""
    sessions = read_mapping(Path(run_dir) / "environment.json").get("sessions")
    sessions = sessions if isinstance(sessions, list) else []
    steps = [session.get("from_step") for session in sessions if isinstance(session, dict)]
    return sorted({step for step in steps[1:] if isinstance(step, int) and step > 0})
