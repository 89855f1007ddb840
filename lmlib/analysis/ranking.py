"""Models compared over seeds: which is better, by how much, at what cost, and whether the difference is more than noise."""

import html
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lmlib.analysis import figures, frames
from lmlib.files import read_mapping
from lmlib.leaks import LEAKY_NAME
from lmlib.run.lock import run_status

NOT_THE_MODEL = {"seed", "run_name", "output_dir", "device", "log_every", "eval_every", "checkpoint_every"}


def scores(run_dirs: Iterable[str | Path]) -> pd.DataFrame:
    """A row a run: the model it is of, its seed, what it was judged on, and `results_table`'s columns.

    Runs are of one model if they differ in their seed alone, whatever their folders are called.
    """
    folders = frames.named_folders(run_dirs)
    configs = {run: frames.whole_config(folder) for run, folder in folders.items()}
    kinds = {
        run: json.dumps({k: v for k, v in c.items() if k not in NOT_THE_MODEL}, sort_keys=True) for run, c in configs.items()
    }
    table, labels = frames.results_table(folders.values()), _labels(kinds)
    table["seed"] = pd.to_numeric(
        pd.Series({run: config.get("seed") for run, config in configs.items()}, dtype=object), errors="coerce"
    )
    table["model"] = [labels[run] for run in table.index]
    table["judged on"] = [_judged_on(folders[run], configs[run]) for run in table.index]
    return table


def _labels(kinds: dict[str, str]) -> dict[str, str]:
    """A name for each run's model: what its runs' names have in common, without the seed."""
    labels: dict[str, str] = {}
    for kind in dict.fromkeys(kinds.values()):
        names = [re.sub(r"[-_.]seed\d+", "", name) for name, other in kinds.items() if other == kind]
        mark = LEAKY_NAME if any(name.endswith(LEAKY_NAME) for name in names) else ""
        names = [name.removesuffix(LEAKY_NAME) for name in names]
        common = os.path.commonprefix(names).rstrip("-_./") or names[0]
        label, number = common + mark, 2
        while label in labels.values():
            label, number = f"{common} ({number}){mark}", number + 1
        labels[kind] = label
    return {run: labels[kind] for run, kind in kinds.items()}


def _judged_on(folder: Path, config: dict[str, Any]) -> str:
    """What decides the held-out windows: their tokens, length and number. Losses on others cannot be compared."""
    prints = read_mapping(folder / "environment.json").get("fingerprints")
    prints = prints if isinstance(prints, dict) else {}
    files = [prints.get(name) for name in ("validation.bin", "tokenizer.json")]
    return json.dumps([*files, config.get("sequence_length"), config.get("validation_windows")])


def states(run_dirs: Iterable[str | Path]) -> str:
    """How many runs are in which state; those that are not finished, by name."""
    states = {run: run_status(folder) for run, folder in frames.named_folders(run_dirs).items()}
    counts = [f"{list(states.values()).count(state)} {state}" for state in sorted(set(states.values()))]
    others = [f"{run}: {state}" for run, state in states.items() if state != "finished"]
    return "\n".join([f"{len(states)} runs: {', '.join(counts) or 'none'}", *others])


def first_seeds(run_dirs: Iterable[str | Path]) -> list[Path]:
    """One run of each model: that of its lowest seed."""
    folders = frames.named_folders(run_dirs)
    table = scores(folders.values())
    return [folders[run] for run in table.sort_values("seed", kind="stable").drop_duplicates("model").index]


def finished(run_dirs: Iterable[str | Path]) -> pd.DataFrame:
    """The rows of `scores` that have a last loss, one a model and seed."""
    table = scores(run_dirs)
    done = table[table["state"].astype(str).str.startswith("finished") & table["held-out loss"].notna()]
    return done.drop_duplicates(["model", "seed"], keep="last")


def ranking(run_dirs: Iterable[str | Path]) -> pd.DataFrame:
    """A row a model, best first: the mean last held-out loss of its finished runs, its spread over seeds, and its distance to the
    best model with an interval.

    The intervals hold for all pairs of models together with 95 %: Student's t, corrected for every pair since the best is
    known only afterwards (Bonferroni), on what is left of the losses when each model's and each seed's mean is taken away.

    `verdict` is "best", "worse" (the interval leaves out 0), "within the noise", "one seed: unknown", "no two seeds in common:
    unknown", "other text" (a loss on other held-out windows or another tokenizer cannot be compared), or "leaks".
    """
    return _ranked(finished(run_dirs))


def _ranked(done: pd.DataFrame) -> pd.DataFrame:
    """The `ranking` of what `finished` gives."""
    columns = ["seeds", "held-out loss", "spread", "behind the best", "± 95 %", "verdict", "accuracy", *frames.COSTS]
    if done.empty:
        return pd.DataFrame(columns=columns)
    honest = done[~done["model"].str.endswith(LEAKY_NAME)]
    here = honest[honest["judged on"] == honest["judged on"].mode().get(0)]
    losses = here.pivot(index="model", columns="seed", values="held-out loss")  # models x seeds
    several = losses[losses.notna().sum(axis=1) > 1].dropna(axis=1)  # the seeds that all of them have
    means = (several if len(several) and several.shape[1] > 1 else losses).mean(axis=1)
    best = means.idxmin() if len(means) else None
    error = _half_interval(several.to_numpy()) if min(several.shape) > 1 else math.nan
    rows: dict[str, dict[str, Any]] = {}
    for model, runs in done.groupby("model"):
        row = {"seeds": len(runs), "held-out loss": runs["held-out loss"].mean(), "spread": runs["held-out loss"].std()}
        why = "one seed" if len(runs) == 1 else "no two seeds in common"
        row |= {"behind the best": math.nan, "± 95 %": math.nan, "verdict": f"{why}: unknown"}
        if str(model).endswith(LEAKY_NAME):
            row["verdict"] = "leaks"
        elif model not in losses.index:
            row["verdict"] = "other text"
        elif model == best:
            row |= {"behind the best": 0.0, "verdict": "best"}
        elif model in several.index and error == error:
            behind = float((several.loc[model] - several.loc[best]).mean())
            row |= {"behind the best": behind, "± 95 %": error, "verdict": "worse" if behind > error else "within the noise"}
        rows[str(model)] = row | {name: runs[name].astype(float).mean() for name in ("accuracy", *frames.COSTS)}
    ranked = pd.DataFrame.from_dict(rows, orient="index", columns=columns).sort_values("held-out loss", kind="stable")
    apart = ranked["verdict"].isin(["other text", "leaks"])
    ranked = pd.concat([ranked[~apart], ranked[apart]])
    return ranked.rename_axis("model").round({"parameters": 0, "active": 0}).astype({"parameters": "Int64", "active": "Int64"})


def _half_interval(losses: np.ndarray) -> float:
    """Half of the interval of a difference between two models' means, from their losses (models x seeds), both at least 2."""
    models, seeds = losses.shape
    left = losses - losses.mean(1, keepdims=True) - losses.mean(0, keepdims=True) + losses.mean()
    freedom = (models - 1) * (seeds - 1)
    level = 1 - 0.05 / 2 / (models * (models - 1) / 2)
    return student_t(level, freedom) * math.sqrt((left**2).sum() / freedom * 2 / seeds)


def student_t(level: float, freedom: int) -> float:
    """The value that Student's t with so many degrees of freedom stays below with probability `level` (0.5 to 1)."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    # t = sqrt(freedom) tan(angle) makes the density scale * cos(angle) ** (freedom - 1), on a finite range
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = scale * np.cos(angles) ** (freedom - 1)
    share = 0.5 + np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * angles[1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(level, share, angles)))


def losses(run_dirs: Iterable[str | Path]) -> go.Figure:
    """A line a model, best above: a dot for each seed's last held-out loss, a bar at their mean."""
    done = finished(run_dirs)
    order = list(_ranked(done).index)
    figure = go.Figure()
    for number, model in reversed(list(enumerate(order))):
        values = done[done["model"] == model]["held-out loss"].tolist()
        color, name = figures.color_of(number), html.escape(model)
        dots = {"color": color, "size": 9, "symbol": figures.symbols(number)[0]}
        figure.add_scatter(x=values, y=[name] * len(values), mode="markers", marker=dots, name=name)
        bar = {"color": color, "size": 20, "symbol": "line-ns-open"}
        figure.add_scatter(x=[sum(values) / len(values)], y=[name], mode="markers", marker=bar, name=name)
    figure.update_layout(showlegend=False, xaxis_title="held-out loss after the last step (nats a token); a dot a seed")
    return figures.on_any_page(figure, height=130 + 36 * max(1, len(order)), top=20).update_layout(margin={"l": 220})


def curves(run_dirs: Iterable[str | Path], x: str = "step") -> go.Figure:
    """The held-out loss of each model over steps, tokens, minutes or flops: the mean of its finished seeds, and their spread."""
    run_dirs = list(run_dirs)
    done, frame = finished(run_dirs), frames.read_runs(run_dirs)
    models = done["model"]
    evals = frame[(frame["kind"] == "eval") & frame["run"].isin(models.index)].assign(model=lambda rows: rows["run"].map(models))
    figure = go.Figure()
    for number, model in enumerate(_ranked(done).index):
        steps = evals[evals["model"] == model].groupby("step")
        color = figures.color_of(number)
        figure.add_scatter(
            x=steps[x].mean().tolist(),
            y=steps["val_loss"].mean().tolist(),
            error_y={"array": steps["val_loss"].std().fillna(0).tolist(), "thickness": 1, "width": 0},
            mode="lines+markers",
            line={"color": color, "dash": figures.dash_of(number), "width": 2},
            marker={"size": 5, "color": color},
            name=html.escape(model),
        )
    figure.update_xaxes(title_text=frames.AXES[x])
    figure.update_yaxes(title_text="held-out loss (nats a token)")
    return figures.on_any_page(figure, height=440, top=90)


def difference(run_dirs: Iterable[str | Path]) -> str:
    """The ranking in a sentence a model."""
    lines = []
    for model, row in ranking(run_dirs).iterrows():
        loss = f"{model}: {row['held-out loss']:.3f} nats over {int(row['seeds'])} seed{'s' if row['seeds'] > 1 else ''}"
        if row["verdict"] in ("worse", "within the noise"):
            loss += f", {row['behind the best']:+.3f} ± {row['± 95 %']:.3f} to the best"
        lines.append(f"{loss}: {row['verdict']}")
    return "\n".join(lines) or "No run is finished yet."
