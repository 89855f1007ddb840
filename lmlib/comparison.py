"""Models compared over seeds: which is better, by how much, at what cost, and whether the difference is more than noise."""

import html
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lmlib import run_folder
from lmlib.config import printable
from lmlib.figures import COLOURS, dash, on_any_page
from lmlib.runs import AXES, COSTS, named_folders, read_file, read_runs, results_table

NOT_THE_MODEL = {"seed", "run_name", "output_dir", "device", "log_every", "eval_every", "checkpoint_every"}


def scores(run_dirs: Iterable[str | Path]) -> pd.DataFrame:
    """A row a run: the model it is of, its seed, what it was judged on, and `results_table`'s columns."""
    folders, table = named_folders(run_dirs), results_table(run_dirs)
    configs = {run: read_file(folder / "config.json") for run, folder in folders.items()}
    kinds = {
        run: json.dumps({k: v for k, v in c.items() if k not in NOT_THE_MODEL}, sort_keys=True) for run, c in configs.items()
    }
    prints = {run: read_file(folder / "environment.json").get("fingerprints") for run, folder in folders.items()}
    table["seed"] = [configs[run].get("seed") for run in table.index]
    table["model"] = _labels(kinds)
    table["judged on"] = [json.dumps(prints[run], sort_keys=True) for run in table.index]
    return table


def states(run_dirs: Iterable[str | Path]) -> str:
    """How many runs are in which state; those that are not finished, by name."""
    states = {run: run_folder.life(folder) for run, folder in named_folders(run_dirs).items()}
    counts = [f"{list(states.values()).count(state)} {state}" for state in sorted(set(states.values()))]
    others = [f"{run}: {state}" for run, state in states.items() if state != "finished"]
    return printable("\n".join([f"{len(states)} runs: {', '.join(counts) or 'none'}", *others]))


def first_seeds(run_dirs: Iterable[str | Path]) -> list[Path]:
    """One run of each model: that of its lowest seed."""
    folders = named_folders(run_dirs)
    table = scores(folders.values())
    return [folders[run] for run in table.sort_values("seed", kind="stable").drop_duplicates("model").index if run in folders]


def _labels(kinds: dict[str, str]) -> list[str]:
    """A name for each run's model: the run's, without its seed, told apart where two models would share one."""
    names = {run: re.sub(r"-seed\d+", "", run) for run in kinds}
    taken: dict[str, list[str]] = {}
    for run, kind in kinds.items():
        known = taken.setdefault(names[run], [])
        if kind not in known:
            known.append(kind)
    return [
        names[run] + (f" ({taken[names[run]].index(kind) + 1})" if len(taken[names[run]]) > 1 else "")
        for run, kind in kinds.items()
    ]


def ranking(run_dirs: Iterable[str | Path]) -> pd.DataFrame:
    """A row a model, best first: the mean last held-out loss of its finished runs, its spread over seeds, and its distance to the
    best model with an interval, from the differences between runs of the same seed. The intervals hold all together with
    95 % (Bonferroni), since the more models are compared the more would look worse by chance.

    `verdict` is "best", "worse" (the interval leaves out 0), "within the noise", "one seed: unknown", or "other text": a loss on
    another held-out text or tokenizer cannot be compared.
    """
    table = scores(run_dirs)
    done = table[table["state"].astype(str).str.startswith("finished") & table["held-out loss"].notna()]
    means = done.groupby("model")["held-out loss"].mean().sort_values()
    columns = ["seeds", "held-out loss", "spread", "behind the best", "± 95 %", "verdict", "accuracy", *COSTS]
    if means.empty:
        return pd.DataFrame(columns=columns)
    best, level = done[done["model"] == means.index[0]], 1 - 0.05 / 2 / max(1, len(means) - 1)
    rows: dict[str, dict[str, Any]] = {}
    for model in means.index:
        runs = done[done["model"] == model]
        behind, error, verdict = _against(best, runs, level) if model != means.index[0] else (0.0, math.nan, "best")
        rows[model] = {
            "seeds": len(runs),
            "held-out loss": means[model],
            "spread": runs["held-out loss"].std(),
            "behind the best": behind,
            "± 95 %": error,
            "verdict": verdict,
            **{name: runs[name].mean() for name in ("accuracy", *COSTS)},
        }
    ranked = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("model")
    return ranked.astype({"parameters": "Int64", "active": "Int64"})


def _against(best: pd.DataFrame, runs: pd.DataFrame, level: float) -> tuple[float, float, str]:
    """(mean difference, half of its interval, verdict) over the seeds that both have."""
    if set(best["judged on"]) != set(runs["judged on"]):
        return math.nan, math.nan, "other text"
    ours, theirs = (frame.groupby("seed")["held-out loss"].mean() for frame in (best, runs))
    differences = (theirs - ours).dropna()
    n = len(differences)
    if n < 2:
        return (differences.mean() if n else math.nan), math.nan, "one seed: unknown"
    error = student_t(level, n - 1) * differences.std() / math.sqrt(n)
    return differences.mean(), error, "worse" if differences.mean() > error else "within the noise"


def student_t(level: float, freedom: int) -> float:
    """The value that Student's t with so many degrees of freedom stays below with probability `level` (0.5 to 1)."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    # t = sqrt(freedom) tan(angle) makes the density scale * cos(angle) ** (freedom - 1), on a finite range
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = scale * np.cos(angles) ** (freedom - 1)
    share = 0.5 + np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * angles[1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(level, share, angles)))


def losses(run_dirs: Iterable[str | Path]) -> go.Figure:
    """A line a model, best below: a dot for each seed's last held-out loss, a bar at their mean."""
    table, order = scores(run_dirs), list(ranking(run_dirs).index)
    figure = go.Figure()
    for number, model in enumerate(order[::-1]):
        runs = table[table["model"] == model]
        values = [value for value in runs["held-out loss"] if value == value]
        color = COLOURS[(len(order) - 1 - number) % len(COLOURS)]
        name = html.escape(model)
        figure.add_scatter(x=values, y=[name] * len(values), mode="markers", marker={"color": color, "size": 9}, name=name)
        mean = sum(values) / len(values)
        figure.add_scatter(
            x=[mean], y=[name], mode="markers", marker={"color": color, "size": 20, "symbol": "line-ns-open"}, name=name
        )
    figure.update_layout(showlegend=False, xaxis_title="held-out loss after the last step (nats a token); a dot a seed")
    return on_any_page(figure, height=130 + 36 * max(1, len(order))).update_layout(margin={"l": 220, "t": 20})


def curves(run_dirs: Iterable[str | Path], x: str = "step") -> go.Figure:
    """The held-out loss of each model over steps, tokens, minutes or flops: the mean of its seeds, and their spread."""
    frame, models = read_runs(run_dirs), scores(run_dirs)["model"]
    evals = frame[frame["kind"] == "eval"].assign(model=lambda rows: rows["run"].map(models))
    order, figure = list(ranking(run_dirs).index), go.Figure()
    for number, model in enumerate(order):
        steps = evals[evals["model"] == model].groupby("step")
        color = COLOURS[number % len(COLOURS)]
        figure.add_scatter(
            x=steps[x].mean().tolist(),
            y=steps["val_loss"].mean().tolist(),
            error_y={"array": steps["val_loss"].std().fillna(0).tolist(), "thickness": 1, "width": 0},
            mode="lines+markers",
            line={"color": color, "dash": dash(number), "width": 2},
            marker={"size": 5, "color": color},
            name=html.escape(model),
        )
    figure.update_xaxes(title_text=AXES[x])
    figure.update_yaxes(title_text="held-out loss (nats a token)")
    return on_any_page(figure, height=420)


def difference(run_dirs: Iterable[str | Path]) -> str:
    """The ranking in a sentence a model."""
    lines = []
    for model, row in ranking(run_dirs).iterrows():
        loss = f"{model}: {row['held-out loss']:.3f} nats over {int(row['seeds'])} seed{'s' if row['seeds'] > 1 else ''}"
        if row["verdict"] in ("worse", "within the noise"):
            loss += f", {row['behind the best']:+.3f} ± {row['± 95 %']:.3f} to the best"
        lines.append(f"{loss}: {row['verdict']}")
    return printable("\n".join(lines)) or "No run is finished yet."
