"""The head of a training page as HTML: a run's state, its progress and its newest numbers."""

import html
import math
import os
from pathlib import Path
from typing import Any

from lmlib.analysis import render, tables
from lmlib.files import PROJECT_ROOT, display_path
from lmlib.intervals import Estimate
from lmlib.leaks import LEAKY_NAME, known_leaks
from lmlib.text import printable

# In JupyterLab the chart's image gives way to the live widget, and comes back where the widget is
# lost: on a page that was closed and opened again.
STYLE = render.LAB_STYLE + """<style>
.lmlib-head { font-family: var(--jp-ui-font-family, sans-serif); max-width: 864px;
  font-size: 13px; color: var(--jp-ui-font-color1, inherit); padding: 4px 0 }
.lmlib-head .run { font-weight: 600; margin-left: 8px }
.lmlib-head .bar { height: 6px; border-radius: 3px; margin: 10px 0; overflow: hidden;
  background: rgba(128, 128, 128, .25) }
.lmlib-head .bar div { height: 100% }
.lmlib-head .tiles { display: grid; gap: 8px;
  grid-template-columns: repeat(auto-fit, minmax(145px, 1fr)) }
.lmlib-head .tile { background: rgba(128, 128, 128, .1); border-radius: 6px; padding: 6px 10px }
.lmlib-head .tile b { display: block; font-size: 16px; white-space: nowrap;
  font-variant-numeric: tabular-nums }
.lmlib-head small { opacity: .75 }
.lmlib-head .note { min-height: 1.5em; margin-top: 8px }
.jp-OutputArea:has(.lmlib-live) > .jp-OutputArea-child:has(.jp-RenderedPlotly) { display: none }
.jp-OutputArea:has(.lmlib-head) > .jp-OutputArea-child:has(
  > .lm-Panel.jp-OutputArea-output):not(:has(.lmlib-live)) { display: none }
.lmlib-live { overflow-x: auto }
</style>"""


def header(run_dir: Path, state: str, latest: dict[str, dict[str, Any]], total: Any,
           note: str) -> dict[str, str]:
    """Return the head of a run's page as a notebook's output, HTML and plain text.

    `state` is a key of `tables.BADGES`, `latest` the newest record of each kind, `note` a line
    of HTML.
    """
    total = _number(total)
    step = max((_number(record.get("step")) or 0 for record in latest.values()), default=0)
    done = min(1.0, step / total) if total else 0.0
    rows = _tiles(step, total, state, latest)
    boxes = "".join(f"<div class='tile'><small>{label}</small><b>{value}</b><small>{more}"
                    "</small></div>" for label, value, more in rows)
    name = printable(run_dir.name) + (LEAKY_NAME if known_leaks(run_dir) else "")
    color = f"background: {tables.BADGES[state]}"
    plain = [state, *(f"{label} {value}" for label, value, _ in rows)]
    return {"text/html":
            f"{STYLE}<div class='lmlib-head'><span class='state'>{tables.badge(state)}</span>"
            f"<span class='run'>{html.escape(name)}</span><div class='bar' role='progressbar' "
            f"aria-valuenow='{done:.0%}'><div style='{color}; width: {done:.2%}'></div></div>"
            f"<div class='tiles'>{boxes}</div><div class='note'>{note}</div></div>",
            "text/plain": f"{name}: {' | '.join(plain)}"}


def _tiles(step: float, total: float | None, state: str,
           latest: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the tiles: label, value, and a line below it."""
    def last(kind: str, name: str) -> float | None:
        return _number(latest.get(kind, {}).get(name))

    loss, bits = last("eval", "val_loss"), last("eval", "val_bits_per_byte")
    speed, left = last("step", "tokens_per_second"), last("step", "seconds_left")
    spent = max((_number(record.get("seconds")) or 0 for record in latest.values()), default=0)
    scored = last("eval", "step")
    at = "" if scored is None else f"at step {scored:,.0f}"
    value, error = _loss(loss, last("eval", "val_loss_stderr"), last("eval", "val_documents"))
    is_running = state == "running"
    return [("Step", f"{step:,.0f}" + (f" / {total:,.0f}" if total else ""),
             f"{step / total:.0%}" if total else ""),
            ("Validation loss", value, error),
            ("Bits per byte", "–" if bits is None else f"{bits:.3f}", at),
            ("Speed", "–" if speed is None else f"{speed:,.0f}",
             "tokens/s" if is_running else "tokens/s, median"),
            ("Time left" if is_running else "Training took",
             "–" if is_running and left is None else duration(left if is_running else spent), "")]


def _loss(loss: float | None, stderr: float | None, documents: float | None) -> tuple[str, str]:
    """Return a loss with half its 95 % interval over documents, and what that says."""
    if loss is None:
        return "–", ""
    documents = int(documents or 1)
    estimate = Estimate(loss, stderr if documents > 1 else None, documents)
    if (half := estimate.half_width()) is None:
        return f"{loss:.3f}", "one document: no interval"
    few = ": few" if estimate.is_few else ""
    return f"{loss:.2f} ± {half:.2f}", f"95 %, {documents} documents{few}"


def _number(value: Any) -> float | None:
    """Return a finite number of a record, None for anything else."""
    is_number = isinstance(value, int | float) and abs(value) < 1e100  # False for NaN
    return value if is_number and math.isfinite(value) else None


def duration(seconds: float) -> str:
    """Show seconds as "40 s", "6 min" or "2 h 10 min"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def notebook_link(name: str, folder: Path) -> str:
    """Return a link to another notebook for a page in `folder`."""
    target = folder / name
    if not target.exists():
        target = PROJECT_ROOT / "notebooks" / name
    return f"<a href='{html.escape(os.path.relpath(target, folder))}'>{name}</a>"


def next_steps(run_dir: Path, folder: Path) -> str:
    """Say what to do with a run that has a checkpoint, as HTML for a page in `folder`."""
    run = html.escape(printable(display_path(run_dir)))
    return (f"<b>Next:</b> {notebook_link('curves.ipynb', folder)} shows its curves beside other "
            f"runs, {notebook_link('generate.ipynb', folder)} continues your prompts; in a "
            f"terminal, <code>lmlib generate {run}</code>. total_steps may change: run the cells "
            "again to train longer, or to finish earlier.")
