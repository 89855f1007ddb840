"""A menu of the runs under a folder: no names to type."""

from pathlib import Path

import ipywidgets as w
import pandas as pd

from lmlib.analysis import frames
from lmlib.files import resolve_path


def describe(row: pd.Series) -> str:
    """Return a run's state, date and score, from a row of `frames.overview`."""
    date = f"{row['date']:%Y-%m-%d %H:%M}" if pd.notna(row["date"]) else "not started"
    bits = row["bits per byte"]
    score = f"{bits:.3f} bits per byte" if pd.notna(bits) else "no score yet"
    return " · ".join([row["state"], date, score, *filter(None, [row["notes"]])])


def run_menu(output_dir: str | Path, chosen: Path | None = None, **layout: str) -> w.Dropdown:
    """Return a menu of runs whose value is a run's folder: `chosen` if it is there, or None."""
    runs = [(f"{name} · {describe(row)}", Path(row["folder"]))
            for name, row in frames.overview(output_dir).iterrows()]
    chosen = resolve_path(chosen).absolute() if chosen else None
    value = chosen if chosen in [folder for _, folder in runs] else None
    return w.Dropdown(options=runs, value=value, description="run",
                      layout={"width": "100%"} | layout)
