"""Compare two runs on text that both were scored on: paired differences, clustered by document.

A hard document is hard for every model, so the difference of two models is more certain than either
loss. The tokens of a document depend on each other, so the document is the statistical unit.
"""

import html
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lmlib.analysis import figures, frames
from lmlib.errors import UserError
from lmlib.files import read_json, resolve_path
from lmlib.intervals import Estimate, clustered_mean
from lmlib.leaks import known_leaks
from lmlib.text import printable

HEADER = ["data", "sequence_length", "windows", "unit", "step"]
SAME_TOKENS = HEADER[:3]  # where these are equal, both runs were scored on the same tokens


@dataclass(frozen=True)
class Difference:
    """The paired difference of two trained models; below 0 the first is better.

    Its interval holds for other documents of this kind and for these two models: how much the
    difference varies over training seeds is not part of it (see `ranking`).
    """
    names: tuple[str, str]  # a run that leaks is marked in its name
    steps: tuple[int, int]
    unit: str  # "nats per token", or "bits per byte" where the tokens are not the same
    clustered_by: str  # "documents", "files" or "tenths of one file"
    estimate: Estimate
    table: pd.DataFrame  # a row per cluster: both scores, difference, size in tokens or bytes

    @property
    def clusters(self) -> int:
        return self.estimate.clusters

    @property
    def verdict(self) -> str:
        """Return "better", "worse" or "no difference found" (95 %), or "few documents"."""
        if self.estimate.is_few:
            return "few documents"
        if abs(self.estimate.mean) <= self.estimate.half_width():
            return "no difference found"
        return "better" if self.estimate.mean < 0 else "worse"

    def __str__(self) -> str:
        half = self.estimate.half_width()
        interval = "" if half is None else f" ± {half:.4f} (95 %)"
        at = " and ".join(map(str, dict.fromkeys(self.steps)))
        return (f"{self.names[0]} − {self.names[1]}: {self.estimate.mean:+.4f}{interval} "
                f"{self.unit}, {self.clusters} {self.clustered_by}, step {at}: {self.verdict}")


def compare(run: str | Path, other: str | Path, step: int | None = None) -> Difference:
    """Compare two runs by their last validation, or by that of `step`.

    Runs with the same validation tokens and windows are paired in nats per token, others by their
    common documents in bits per byte. Raises a ValueError if a comparison would mean nothing: a
    leaky run with an honest one, no text in common, no evaluation files.
    """
    named = frames.named_folders([run, other])
    if len(named) < 2:
        raise UserError(f"{run} and {other} are the same run: name two.")
    leaks = {name: checks for name, folder in named.items() if (checks := known_leaks(folder))}
    if len(leaks) == 1:
        [[leaky, checks]] = leaks.items()
        raise UserError(f"{' and '.join(named)} cannot be compared: {leaky} leaks, as it failed "
                        f"the checks {printable(checks)}. Compare honest runs, or two that leak.")
    first, second = (read_evaluation(folder, step) for folder in named.values())
    names, steps = tuple(named), (first.attrs["step"], second.attrs["step"])
    is_same = all(first.attrs[key] == second.attrs[key] for key in SAME_TOKENS)
    unit, size = ("nats per token", "tokens") if is_same else ("bits per byte", "bytes")
    table = _paired(first, second, size)
    if table.empty:
        counts = [frame["cluster"].nunique() for frame in (first, second)]
        raise UserError(f"{names[0]} and {names[1]} cannot be compared: of their {counts[0]} and "
                        f"{counts[1]} validation {first.attrs['unit']}, none is the same.")
    estimate = difference_of(table)
    table = table.rename(columns={"first": names[0], "second": names[1], "size": size})
    return Difference(names, steps, unit, first.attrs["unit"], estimate, table)


def read_evaluation(run_dir: str | Path, step: int | None = None) -> pd.DataFrame:
    """Return the rows of a run's last validation, or of that at `step`; HEADER is in `attrs`.

    A row is a document in a window: cluster (its name), nats, hits, tokens, bytes. Raises a
    ValueError if there is no such evaluation, or if its file is damaged.
    """
    folder = resolve_path(run_dir)
    matches = [(re.fullmatch(r"validation_step_(\d+)\.json", path.name), path)
               for path in (folder / "evaluations").glob("*.json")]
    files = {int(match[1]): path for match, path in matches if match}
    if not files:
        raise UserError(f"{folder} has no files of its evaluations: an older version trained it. "
                        "Train it again, or extend it by some steps (total_steps).")
    if step is not None and step not in files:
        raise UserError(f"{folder} has no validation of step {step}, but of the steps "
                        f"{', '.join(map(str, sorted(files)))}.")
    path = files[max(files) if step is None else step]
    content = read_json(path)
    try:
        return _rows(content)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): compare another step.") from error


def _rows(content: dict) -> pd.DataFrame:
    """Return an evaluation file's content as a frame; raise if it is not as it should be."""
    columns = ["cluster", "nats", "hits", "tokens", "bytes"]
    numbers = np.array([content[name] for name in columns], float)  # (columns, rows)
    if not numbers.size or not np.isfinite(numbers).all() or numbers.min() < 0:
        raise UserError("no rows, or numbers that are not finite")
    rows, names = pd.DataFrame(numbers.T, columns=columns), content["clusters"]
    rows["cluster"] = [printable(str(names[int(number)])) for number in rows["cluster"]]
    rows.attrs = {name: content[name] for name in HEADER}
    rows.attrs["unit"] = printable(str(content["unit"]))
    return rows


def cluster_sums(evaluation: pd.DataFrame) -> pd.DataFrame:
    """Return the sums of nats, tokens and bytes of each cluster."""
    return evaluation.groupby("cluster")[["nats", "tokens", "bytes"]].sum()


def _paired(first: pd.DataFrame, second: pd.DataFrame, size: str) -> pd.DataFrame:
    """Return the scores of the clusters that both have, per token (nats) or per byte (bits).

    The same windows give a cluster equal sizes; otherwise the smaller size is its weight.
    """
    first, second = cluster_sums(first), cluster_sums(second)
    first, second = first[first[size] > 0], second[second[size] > 0]
    names, per = first.index.intersection(second.index), math.log(2) if size == "bytes" else 1.0
    first, second = first.loc[names], second.loc[names]
    table = pd.DataFrame({"first": first["nats"] / first[size] / per,
                          "second": second["nats"] / second[size] / per})
    return table.assign(difference=table["first"] - table["second"],
                        size=np.minimum(first[size], second[size]))


def difference_of(table: pd.DataFrame) -> Estimate:
    """Return the mean of `difference`, weighted by `size`, with its error over clusters."""
    totals = table["difference"] * table["size"]
    return clustered_mean(zip(totals.tolist(), table["size"].tolist(), strict=True))


def figure(difference: Difference) -> go.Figure:
    """Draw each document's difference, sorted, with the mean and its 95 % interval."""
    values, estimate = sorted(difference.table["difference"]), difference.estimate
    half, few = estimate.half_width(), " (few documents)" if estimate.is_few else ""
    lines = [("no difference", 6, 1.5, [0.0]), ("mean", 1, 2.5, [estimate.mean])]
    if half is not None:  # the eighth color is the mean's, dashed
        lines.append((f"95 % interval{few}", 8, 1.5, [estimate.mean - half, estimate.mean + half]))
    drawn, title = go.Figure(), html.escape(" − ".join(difference.names))
    for name, number, width, heights in lines:
        for height in heights:
            figures.add_line(drawn, number, [0.5, len(values) + 0.5], [height] * 2, name,
                             mode="lines", width=width, showlegend=height == heights[0])
    figures.add_line(drawn, 0, [*range(1, len(values) + 1)], values,
                     difference.clustered_by, mode="markers", size=8)
    drawn.add_annotation(x=0.5, y=1.02, xref="paper", yref="paper", yanchor="bottom",
                         showarrow=False, text=f"<b>{title}</b>")
    figures.styled(drawn, height=380, top=90).update_layout(margin={"l": 80})
    drawn.update_xaxes(title_text=f"{difference.clustered_by}, sorted by their difference",
                       showticklabels=False)
    return drawn.update_yaxes(title_text=f"difference ({difference.unit})")
