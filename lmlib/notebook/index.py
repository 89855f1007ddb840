"""The start page's table of runs: state, score, a small curve, and notebooks opened on the run."""

import html
import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from lmlib.analysis import frames, tables
from lmlib.files import PROJECT_ROOT, write_json
from lmlib.notebook.live import is_live
from lmlib.text import printable

NOTEBOOKS = {"curves.ipynb": "curves", "generate.ipynb": "generate"}  # file, and the link's word
CELL = "style='text-align: left; padding: 4px 12px 4px 0; white-space: nowrap'"


def runs(output_dir: str | Path) -> tables.Table:
    """Return the runs under a folder, newest first, with links that open notebooks on each run.

    A link opens a copy in the run's folder, which is made here if it is not there: the notebooks
    under version control stay as they are. Where that folder cannot be written there is no link.
    """
    overview = frames.overview(output_dir)
    if overview.empty:
        text = "There are no runs yet: open train.ipynb and run its cells."
        return tables.Table(f"<p>{text}</p>", text)
    evals = frames.read_runs(overview["folder"])
    evals = evals[evals["kind"] == "eval"]
    names = {folder: name for name, folder in evals.attrs["runs"].items()}
    lines = []
    for run, row in overview.iterrows():
        folder = Path(row["folder"])
        losses = evals[evals["run"] == names.get(row["folder"])].get("val_bits_per_byte")
        cells = [html.escape(run), tables.badge(row["state"]),
                 f"{row['date']:%Y-%m-%d %H:%M}" if pd.notna(row["date"]) else "–",
                 f"{row['steps']:,}",
                 f"{row['bits per byte']:.3f}" if pd.notna(row["bits per byte"]) else "–",
                 sparkline([] if losses is None else losses.dropna().tolist()), _links(folder),
                 f"<span style='white-space: normal'>{html.escape(printable(row['notes']))}</span>"]
        lines.append("".join(f"<td {CELL}>{cell}</td>" for cell in cells))
    heads = ["run", "state", "started", "steps", "bits per byte", "curve", "open", ""]
    head = "".join(f"<th {CELL}>{name}</th>" for name in heads)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    text = overview.drop(columns="folder").to_string()
    return tables.Table(f"<table style='border-collapse: collapse'><thead><tr>{head}</tr></thead>"
                        f"<tbody>{body}</tbody></table>", text)


def sparkline(values: list[float], width: int = 90, height: int = 22) -> str:
    """Return a curve of values as a small SVG; its first fifth may be cut off at the top."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values[len(values) // 5 :])
    xs = [round(2 + (width - 4) * n / (len(values) - 1), 1) for n in range(len(values))]
    ys = [round(height - 3 - (height - 6) * (min(v, high) - low) / ((high - low) or 1), 1)
          for v in values]
    points = " ".join(f"{x},{y}" for x, y in zip(xs, ys, strict=True))
    return (f"<svg width='{width}' height='{height}' role='img' aria-label='validation curve'>"
            f"<polyline points='{points}' fill='none' stroke='#0072B2' stroke-width='1.5'/></svg>")


def _links(folder: Path) -> str:
    """Return a link for each notebook of a run: the executed train.ipynb, and opened copies."""
    found = {folder / "train.ipynb": "training"} if (folder / "train.ipynb").exists() else {}
    for file, word in NOTEBOOKS.items():
        if (word == "curves" or (folder / "checkpoints").is_dir()) and _open_copy(file, folder):
            found[folder / file] = word
    start = Path.cwd() if is_live() else PROJECT_ROOT / "notebooks"
    return " · ".join(f"<a href='{html.escape(quote(os.path.relpath(path, start)))}'>{word}</a>"
                      for path, word in found.items())


def _open_copy(file: str, folder: Path) -> bool:
    """Make a notebook in a run's folder that is opened on the run; return whether it is there."""
    if (folder / file).exists():
        return True
    book = json.loads((PROJECT_ROOT / "notebooks" / file).read_text("utf-8"))
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = _with(cell["source"], run_name=folder.name,
                                   output_dir=str(folder.parent))
    try:
        write_json(folder / file, book)
    except OSError:
        return False
    return True


def _with(source: Any, **values: str) -> str:
    """Return a parameters cell with other values."""
    source = "".join(source)
    for name, value in values.items():
        source = re.sub(rf"^{name} = .*$", lambda _, line=f"{name} = {value!r}": line, source,
                        count=1, flags=re.MULTILINE)
    return source
