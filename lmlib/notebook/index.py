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
from lmlib.files import PROJECT_ROOT, atomic_write, display_path
from lmlib.leaks import known_leaks
from lmlib.notebook.live import is_live
from lmlib.text import printable

NOTEBOOKS = {"curves.ipynb": "curves", "generate.ipynb": "generate"}  # file, and the link's word
CELL = "style='text-align: left; padding: 4px 12px 4px 0; vertical-align: top'"
WHOLE, SMALL = "white-space: nowrap", "font-size: 12px; opacity: .75"


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
        losses = evals[evals["run"] == names.get(row["folder"])].get("val_bits_per_byte")
        losses = [] if losses is None else losses.dropna().tolist()
        cells = _cells(run, row, losses)
        lines.append("".join(f"<td {CELL}>{cell}</td>" for cell in cells))
    heads = ["run", "open", "state", "started", "steps", "bits per byte", "curve"]
    head = "".join(f"<th {CELL}>{name}</th>" for name in heads)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    text = overview.drop(columns="folder").to_string()
    return tables.Table(f"<table style='border-collapse: collapse'><thead><tr>{head}</tr></thead>"
                        f"<tbody>{body}</tbody></table>", text)


def _cells(run: str, row: pd.Series, losses: list[float]) -> list[str]:
    """Return the cells of a run as HTML; what a reader must not miss stands at the left."""
    folder = Path(row["folder"])
    name = re.sub("[/_-]", r"\g<0><wbr>", html.escape(run))  # where a long name may wrap
    name = f"<span style='overflow-wrap: anywhere'>{name}</span>"
    if row["notes"]:
        name += f"<div style='{SMALL}'>{html.escape(printable(row['notes']))}</div>"
    state = tables.badge(row["state"])
    if known_leaks(folder):
        state += " " + tables.pill("LEAKS", tables.BADGES["died"])
    date = f"{row['date']:%b %d, %H:%M}" if pd.notna(row["date"]) else "–"
    bits = f"{row['bits per byte']:.3f}" if pd.notna(row["bits per byte"]) else "–"
    return [name, _links(folder), state, f"<span style='{WHOLE}'>{date}</span>",
            f"{row['steps']:,}", bits, sparkline(losses)]


def sparkline(values: list[float], width: int = 70, height: int = 22) -> str:
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
    """Make a notebook in a run's folder that is opened on the run; return whether it is there.

    One that is there stays as it is, except that its `output_dir` follows the run's folder: a
    project that was copied or moved must not open the runs of the other one.
    """
    copy, values = folder / file, {"output_dir": display_path(folder.parent)}
    is_new = not copy.exists()
    try:
        origin = PROJECT_ROOT / "notebooks" / file if is_new else copy
        book = json.loads(origin.read_text("utf-8"))
        if is_new:
            values["run_name"] = folder.name
            for cell in book["cells"]:
                if cell["cell_type"] == "code":
                    cell |= {"outputs": [], "execution_count": None}
        if _set(book, values) or is_new:
            with atomic_write(copy) as draft:  # as JupyterLab writes it
                text = json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True)
                draft.write_text(text + "\n", "utf-8")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # read-only, or edited
        return not is_new
    return True


def _set(book: Any, values: dict[str, str]) -> bool:
    """Set values in the parameters cell of a notebook; return whether that changed it."""
    [cell] = [cell for cell in book["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    before = source = "".join(cell["source"])
    for name, value in values.items():  # a comment behind a value stays
        line = re.compile(rf"^{name} = .*?(\s+#[^'\"\n]*)?$", re.MULTILINE)
        source = line.sub(lambda m, new=f"{name} = {value!r}": new + (m[1] or ""), source, count=1)
    cell["source"] = source.splitlines(keepends=True)
    return source != before
