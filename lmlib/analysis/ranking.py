"""Compare models over seeds: which is better, by how much, at what cost, and is it only noise?"""

import html
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from lmlib.analysis import figures, frames
from lmlib.leaks import LEAKY_NAME
from lmlib.run.lock import run_status

# Runs that differ in nothing but these are of one model.
NOT_THE_MODEL = {"seed", "run_name", "output_dir", "device", "log_every", "eval_every",
                 "checkpoint_every"}


def scores(run_dirs: Iterable[str | Path]) -> pd.DataFrame:
    """Return `results_table` with each run's seed, model, and the text it was evaluated on."""
    folders, rows = frames.named_folders(run_dirs), []
    for folder in folders.values():
        config, hashes = frames.whole_config(folder), frames.environment(folder, "fingerprints")
        kept = {name: value for name, value in config.items() if name not in NOT_THE_MODEL}
        # Losses on other windows, or in other tokens, cannot be compared.
        text = [hashes.get("validation.bin"), hashes.get("tokenizer.json"),
                config.get("sequence_length"), config.get("validation_windows")]
        rows.append([config.get("seed"), json.dumps(kept, sort_keys=True), json.dumps(text)])
    found = pd.DataFrame(rows, list(folders), ["seed", "model", "evaluated on"], dtype=object)
    found["seed"] = pd.to_numeric(found["seed"], errors="coerce")
    found["model"] = found["model"].map(_model_names(found["model"]))
    return frames.results_table(folders.values()).join(found)


def _model_names(configs: pd.Series) -> dict[str, str]:
    """Return a name per model's configuration: what its runs' names share, without the seed."""
    names: dict[str, str] = {}
    for config, group in configs.groupby(configs, sort=False):
        mark = LEAKY_NAME if group.index.str.endswith(LEAKY_NAME).any() else ""
        runs = [re.sub(r"[-_.]seed\d+", "", run).removesuffix(LEAKY_NAME) for run in group.index]
        shared = os.path.commonprefix(runs).rstrip("-_./") or runs[0]
        name, number = shared + mark, 2  # "(2)" for another model of the same name
        while name in names.values():
            name, number = f"{shared} ({number}){mark}", number + 1
        names[config] = name
    return names


def count_states(run_dirs: Iterable[str | Path]) -> str:
    """Return how many runs are in which state, and the names of those that are not finished."""
    states = {run: run_status(folder) for run, folder in frames.named_folders(run_dirs).items()}
    counts = pd.Series(states, dtype=object).value_counts().sort_index()
    counted = ", ".join(f"{count} {state}" for state, count in counts.items()) or "none"
    others = [f"{run}: {state}" for run, state in states.items() if state != "finished"]
    return "\n".join([f"{len(states)} runs: {counted}", *others])


def first_seeds(run_dirs: Iterable[str | Path]) -> list[Path]:
    """Return one run folder per model, that of its lowest seed."""
    folders = frames.named_folders(run_dirs)
    table = scores(folders.values()).sort_values("seed", kind="stable").drop_duplicates("model")
    return [folders[run] for run in table.index]


def finished(run_dirs: Iterable[str | Path]) -> pd.DataFrame:
    """Return the rows of `scores` of finished runs, one per model and seed."""
    table = scores(run_dirs)
    done = table["state"].astype(str).str.startswith("finished") & table["validation loss"].notna()
    return table[done].drop_duplicates(["model", "seed"], keep="last")  # a copy is no new seed


def ranking(run_dirs: Iterable[str | Path] | pd.DataFrame) -> pd.DataFrame:
    """Rank models by their mean validation loss after the last step, best first.

    Takes the runs' folders, or the table that `finished` made of them. "spread" is the standard
    deviation over seeds, "behind the best" the mean difference to the best model on the same seeds.
    Its 95 % intervals hold for all pairs of models together: Student's t on the residuals of
    losses ~ model + seed, with Bonferroni's correction, as the best is known only afterwards.

    "verdict" is "best", "worse" (the interval excludes 0), "within the noise", "one seed: unknown",
    "no two seeds in common: unknown", or, last and not compared, "other text" or "leaks".
    """
    runs = run_dirs if isinstance(run_dirs, pd.DataFrame) else finished(run_dirs)
    counts, averaged = ["parameters", "active"], ["accuracy", *frames.COSTS]
    columns = ["seeds", "validation loss", "spread", "behind the best", "± 95 %", "verdict",
               *averaged]
    if runs.empty:
        return pd.DataFrame(columns=columns)
    # Only losses on the same text are compared: that of most models without leaks.
    honest = runs[~runs["model"].str.endswith(LEAKY_NAME)]
    comparable = honest[honest["evaluated on"] == honest["evaluated on"].mode().get(0)]
    losses = comparable.pivot(index="model", columns="seed", values="validation loss")
    # Differences within a seed are less noisy than means: keep the seeds that all models have.
    paired = losses[losses.notna().sum(axis=1) > 1].dropna(axis=1)
    means = (paired if len(paired) and paired.shape[1] > 1 else losses).mean(axis=1)
    best = means.idxmin() if len(means) else None
    groups = runs.astype(dict.fromkeys(averaged, float)).groupby("model")
    table = groups[["validation loss", *averaged]].mean()
    table["seeds"], table["spread"] = groups.size(), groups["validation loss"].std()
    table["behind the best"] = table["± 95 %"] = math.nan
    if min(paired.shape) > 1:
        table["behind the best"] = (paired - paired.loc[best]).mean(axis=1)
        table.loc[paired.index, "± 95 %"] = _half_interval(paired.to_numpy())
    models, behind = table.index, table["behind the best"]
    table.loc[models == best, ["behind the best", "± 95 %"]] = 0.0, math.nan
    # The first verdict that applies to a model stands.
    table["verdict"] = np.select(
        [models.str.endswith(LEAKY_NAME), ~models.isin(losses.index), models == best,
         behind > table["± 95 %"], behind.notna(), table["seeds"] == 1],
        ["leaks", "other text", "best", "worse", "within the noise", "one seed: unknown"],
        "no two seeds in common: unknown")
    table["apart"] = table["verdict"].isin(["other text", "leaks"])
    table = table.sort_values(["apart", "validation loss"], kind="stable")[columns]
    return table.round(dict.fromkeys(counts, 0)).astype(dict.fromkeys(counts, "Int64"))


def _half_interval(losses: np.ndarray) -> float:
    """Return half the interval of a difference of two models' means: losses (models, seeds)."""
    models, seeds = losses.shape
    left = losses - losses.mean(1, keepdims=True) - losses.mean(0, keepdims=True) + losses.mean()
    freedom = (models - 1) * (seeds - 1)
    level = 1 - 0.05 / 2 / (models * (models - 1) / 2)  # two-sided, for each of the pairs
    return student_t(level, freedom) * math.sqrt((left**2).sum() / freedom * 2 / seeds)


def student_t(level: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution at `level` (0.5 to 1), without SciPy."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    # On the finite range of t = sqrt(freedom) tan(angle), the density is that of `angle`.
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = scale * np.cos(angles) ** (freedom - 1)
    below = 0.5 + np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * angles[1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(level, below, angles)))


def losses(run_dirs: Iterable[str | Path]) -> go.Figure:
    """Draw each seed's last validation loss as a dot and their mean as a bar, best model on top."""
    runs, figure = finished(run_dirs), go.Figure()
    models = list(ranking(runs).index)
    for number, model in reversed([*enumerate(models)]):  # Plotly draws upward
        values = runs[runs["model"] == model]["validation loss"].tolist()
        mean = [sum(values) / len(values)]
        for x, symbol, size in ((values, figures.shape_of(number), 9), (mean, "line-ns-open", 20)):
            figures.add_line(figure, number, x, [html.escape(model)] * len(x), model,
                             mode="markers", symbol=symbol, size=size)
    title = "validation loss after the last step (nats per token), one dot per seed"
    figures.styled(figure, 130 + 36 * max(1, len(models)), 20, showlegend=False, xaxis_title=title)
    return figure.update_layout(margin={"l": 220})


def curves(run_dirs: Iterable[str | Path], x: str = "step") -> go.Figure:
    """Draw the mean validation loss of each model's seeds over `x`, with its standard deviation."""
    run_dirs, figure = list(run_dirs), go.Figure()
    runs, frame = finished(run_dirs), frames.read_runs(run_dirs)
    evals = frame[frame["kind"] == "eval"]
    for number, model in enumerate(ranking(runs).index):
        steps = evals[evals["run"].isin(runs.index[runs["model"] == model])].groupby("step")
        loss = steps["val_loss"]
        figures.add_line(figure, number, steps[x].mean().tolist(), loss.mean().tolist(), model,
                         error=loss.std().fillna(0).tolist())
    return figures.styled(figure, height=440, top=90, xaxis_title_text=frames.AXES[x],
                          yaxis_title_text="validation loss (nats per token)")


def summary(run_dirs: Iterable[str | Path]) -> str:
    """Return the ranking as one sentence per model."""
    lines = []
    for model, row in ranking(run_dirs).iterrows():
        seeds, behind = f"{row['seeds']} seed{'s' * (row['seeds'] > 1)}", ""
        if row["verdict"] in ("worse", "within the noise"):
            behind = f", {row['behind the best']:+.3f} ± {row['± 95 %']:.3f} to the best"
        lines.append(f"{model}: {row['validation loss']:.3f} nats over {seeds}{behind}: "
                     f"{row['verdict']}")
    return "\n".join(lines) or "No run is finished yet."
