"""Show scores to people: a card for one run, a table for several, as HTML and as text.

Styles are inline, since notebooks drop style sheets; GitHub drops these too and shows plain tables.
"""

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lmlib.analysis import frames
from lmlib.files import read_mapping
from lmlib.intervals import Estimate
from lmlib.leaks import LEAKY_NAME
from lmlib.text import printable

MISSING = "–"
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
BADGES = {"running": "#0072B2", "finished": "#00795A", "stopped": "#A65E00", "died": "#C0392B",
          "empty": "#6B6B6B"}  # white text reads on them
LINE = "border-bottom: 1px solid rgba(128, 128, 128, .3)"
BOX = ("font-family: system-ui, -apple-system, 'Segoe UI', sans-serif; font-size: 13px; "
       "overflow-x: auto")
# The best of a column is the lowest (1) or highest (-1); test scores choose nothing.
BEST = {"validation loss": 1, "bits per byte": 1, "perplexity": 1, "accuracy": -1}
FORMATS = {"accuracy": "{:.1%}", "perplexity": "{:,.1f}", "minutes": "{:,.1f}",
           "difference": "{:+.3f}", "behind the best": "{:+.3f}",
           **dict.fromkeys(["validation loss", "best", "bits per byte", "spread", "± seeds",
                            "± documents", "± 95 %", "± standard error", "test loss", "± test",
                            "test bits per byte"], "{:.3f}")}


@dataclass(frozen=True)
class Table:
    """A table as HTML, for notebooks and pages, and as text, for terminals."""
    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def results(run_dirs: Iterable[str | Path] | str | Path | pd.DataFrame) -> Table:
    """Return the scores of one run as a card, of several as a table with the best in bold.

    Takes the runs' folders, or the frame that `read_runs` made of them.
    """
    frame = run_dirs if isinstance(run_dirs, pd.DataFrame) else frames.read_runs(run_dirs)
    folders, table = frame.attrs["runs"], frames.results_table(frame)
    if len(table) == 1:
        [folder] = folders.values()
        return _card(str(table.index[0]), Path(folder), table.iloc[0])
    column, warning = frames.loss_column(folders.values())
    states = [str(state).partition("; ") for state in table["state"]]
    halves = [interval_half(*row) for row in
              table[["± standard error", "documents"]].itertuples(index=False)]
    shown = table.assign(state=[state for state, _, _ in states],
                         notes=[notes for _, _, notes in states], **{"± 95 %": halves})
    kept = ["state", "steps", "validation loss", "± 95 %", "bits per byte", "accuracy",
            "perplexity", "best", "at step", "test loss", "test bits per byte", "parameters",
            "active", "minutes", "notes"]
    same = [("best", "validation loss"), ("at step", "steps"), ("active", "parameters")]
    hidden = {one for one, other in same
              if shown[one].astype(float).equals(shown[other].astype(float))}
    hidden |= {name for name in kept if shown[name].isna().all() or not any(shown[name] != "")}
    best = {"bits per byte"} if column == "val_bits_per_byte" else set(BEST)
    return formatted(shown[[name for name in kept if name not in hidden]], warning, best)


def formatted(frame: pd.DataFrame, caption: str = "", best: Iterable[str] = BEST) -> Table:
    """Return a frame as a table: numbers without e-notation, an en dash where one is missing.

    Columns without any value are left out. The best value of each of the columns `best` is in
    bold; rows that leak, or were scored on other text, do not count. `caption`, a warning for
    instance, stands above.
    """
    named = any(name is not None for name in frame.index.names)
    frame = frame.reset_index() if named else frame
    frame = frame.loc[:, frame.notna().any() | frame.empty]
    cells = pd.DataFrame({str(name): [_cell(str(name), value) for value in frame[name]]
                          for name in frame}, index=frame.index, dtype=object)
    bold = {(row, str(name)) for name in set(best) & set(frame) for row in _best_rows(frame, name)}
    is_text = {str(name): not pd.api.types.is_numeric_dtype(frame[name]) for name in frame}
    head = "".join(_td(html.escape(printable(name)), text, "th") for name, text in is_text.items())
    rows = []
    for number, (_, row) in enumerate(cells.iterrows()):
        shown = {name: badge(value) if name == "state" else html.escape(value)
                 for name, value in row.items()}
        rows.append("".join(_td(f"<b>{value}</b>" if (number, name) in bold else value,
                                is_text[name], wraps=name == "notes")
                            for name, value in shown.items()))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    above = _warning(caption) if caption else ""
    text = cells.to_string(index=False) if len(cells) else "No rows"
    return Table(f"<div style=\"{BOX}\">{above}<table style='border-collapse: collapse'>"
                 f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>",
                 "\n".join(filter(None, [printable(caption), text])))


def badge(state: str) -> str:
    """Return a run's state as a colored badge in HTML, and the notes behind it ("died; ...")."""
    state, _, notes = state.partition("; ")
    shown = pill(state, BADGES.get(state, BADGES["empty"]))
    return f"{shown} {html.escape(printable(notes))}".rstrip()


def pill(text: str, color: str) -> str:
    """Return a word in white on a rounded patch of color, as HTML."""
    return (f"<span style='background: {color}; color: #fff; border-radius: 9px; "
            f"padding: 1px 9px; font-size: 12px; white-space: nowrap'>"
            f"{html.escape(printable(text))}</span>")


def interval_half(stderr: float, documents: float) -> float:
    """Return half the 95 % interval over documents of a mean; NaN where it is unknown."""
    known = pd.notna(stderr) and pd.notna(documents) and 1 < documents < 2**53 and stderr >= 0
    return Estimate(0.0, stderr, int(documents)).half_width() if known else math.nan


def _card(run: str, folder: Path, row: pd.Series) -> Table:
    """Return the card of one run: what `results_table` and the run's results.json say."""
    found = read_mapping(folder / "results.json")
    measured = found["measured_on"] if isinstance(found.get("measured_on"), dict) else {}
    names = ["loss", "loss_stderr", "documents", "bits_per_byte", "accuracy", "perplexity"]
    columns = ["validation loss", "± standard error", "documents", "bits per byte", "accuracy",
               "perplexity"]
    scores = {"validation": (row[columns].tolist(), measured.get("scores"))}
    test = [_number(found.get(f"test_{name}")) for name in names]
    if np.isfinite(test[0]):
        scores["test"] = (test, measured.get("test"))
    lines, about = [], []
    for name, ((loss, error, documents, *others), text) in scores.items():
        half = interval_half(error, documents)
        interval = f" ± {half:.3f}" if np.isfinite(half) else ""
        lines.append([name, _cell(columns[0], loss) + interval, *map(_cell, columns[3:], others)])
        count = f"{documents:,.0f} documents" if pd.notna(documents) else ""
        parts = [part for part in (count, text) if isinstance(part, str) and part]
        about += [f"{name}: {', '.join(parts)}"] if parts else []
    state, _, notes = str(row["state"]).partition("; ")
    facts = [f"step {row['steps']:,}", f"{_cell('', row['parameters'])} parameters",
             f"{_cell('minutes', row['minutes'])} minutes"]
    if row["active"] is not pd.NA and row["active"] != row["parameters"]:
        facts.insert(2, f"{row['active']:,} active")
    if row["best"] < row["validation loss"]:
        facts.append(f"best validation loss {row['best']:.3f} at step {row['at step']:,}")
    table = pd.DataFrame(lines, columns=["", "loss (95 %)", "bits per byte", "accuracy",
                                         "perplexity"])
    text = [f"{run}: {state} | {' | '.join(facts)}", table.to_string(index=False), *about]
    text += [f"Note: {notes}"] if notes else []
    return Table(_card_html(run, state, facts, table, about, notes), printable("\n".join(text)))


def _card_html(run: str, state: str, facts: list[str], table: pd.DataFrame, about: list[str],
               notes: str) -> str:
    head = "".join(_td(name, not name, "th") for name in table)
    body = ""
    for name, *numbers in table.to_numpy():
        size = "font-size: 17px; font-weight: 600" if name == "validation" else ""
        cells = [f"<span style='{size}'>{html.escape(number)}</span>" for number in numbers]
        body += f"<tr>{_td(name, True)}{''.join(_td(cell, False) for cell in cells)}</tr>"
    small = "".join(f"<div style='opacity: .75; font-size: 12px'>{html.escape(printable(line))}"
                    "</div>" for line in about)
    return (f"<div style=\"{BOX}; border: 1px solid rgba(128, 128, 128, .4); border-radius: 8px; "
            f"padding: 10px 16px; max-width: 760px\"><b style='font-size: 15px'>"
            f"{html.escape(printable(run))}</b> {badge(state)} "
            f"<span style='opacity: .75'>{html.escape(' · '.join(facts))}</span>"
            f"<table style='border-collapse: collapse; margin: 6px 0'><thead><tr>{head}</tr>"
            f"</thead><tbody>{body}</tbody></table>{small}"
            f"{_warning('Note: ' + notes) if notes else ''}</div>")


def _cell(name: str, value: Any) -> str:
    """Return a value as text: thousands separators, no e-notation, an en dash for none."""
    if value is None:
        return "none"
    if isinstance(value, str | bool | list | dict | tuple):
        return printable(str(value))
    if pd.isna(value) or not np.isfinite(value):
        return MISSING
    if (name == "accuracy" and value > 0.99) or (name == "perplexity" and value < 10):
        return f"{value:.2%}".replace("%", " %") if name == "accuracy" else f"{value:.3f}"
    if name in FORMATS:
        return FORMATS[name].format(value).replace("-", "−").replace("%", " %")
    if name == "FLOPs" and value >= 1e6:
        power = int(math.log10(value))
        return f"{value / 10**power:.2f} × 10{str(power).translate(SUPERSCRIPTS)}"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return np.format_float_positional(value, precision=4, unique=False, fractional=False, trim="-")


def _number(value: Any) -> float:
    is_number = isinstance(value, int | float) and abs(value) < 1e100
    return float(value) if is_number else math.nan


def _best_rows(frame: pd.DataFrame, name: str) -> list[int]:
    """Return the numbers of the rows with a column's best value, if there are several to choose."""
    values = pd.to_numeric(frame[name], errors="coerce").astype(float) * BEST.get(name, 1)
    leaks = frame.iloc[:, 0].astype(str).str.endswith(LEAKY_NAME)
    verdicts = frame["verdict"] if "verdict" in frame else pd.Series("", frame.index)
    values = values.mask(leaks | verdicts.isin(["leaks", "other text"])).to_numpy()
    several = np.isfinite(values).sum() > 1
    return np.flatnonzero(values == np.nanmin(values)).tolist() if several else []


def _td(content: str, is_text: bool, tag: str = "td", wraps: bool = False) -> str:
    align, width = "left" if is_text else "right", "; min-width: 14em; max-width: 28em"
    style = f"text-align: {align}; padding: 3px 7px; vertical-align: baseline; {LINE}"
    style += width if wraps else "; white-space: nowrap"
    return f"<{tag} style='{style}'>{content}</{tag}>"


def _warning(text: str) -> str:
    return (f"<div style='border-left: 3px solid #D55E00; padding: 2px 8px; margin: 4px 0; "
            f"max-width: 800px'>{html.escape(printable(text))}</div>")
