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

from lmlib.analysis import comparison, figures, frames
from lmlib.analysis.verdict import Verdict, of_models
from lmlib.errors import UserError
from lmlib.files import display_path, resolve_path
from lmlib.intervals import Estimate, clustered_mean, student_t
from lmlib.leaks import LEAKY_NAME
from lmlib.run.lock import run_status

# Runs that differ in nothing but these are of one model.
NOT_THE_MODEL = {"seed", "run_name", "output_dir", "device", "log_every", "eval_every",
                 "checkpoint_every", "micro_batch_size", "score_test", "keep_checkpoints",
                 "max_hours"}
BEHIND = ["behind the best", "± seeds", "± documents"]
UNKNOWN = "lineage unknown"
CONDITIONS = ("95 % intervals for all pairs together; ± seeds: other seeds on these documents; "
              "± documents: other documents with these trained models.")


def sweep_runs(output_dir: str | Path) -> list[Path]:
    """Return the runs in a sweep's folder; if none is finished, raise a ValueError that says how.

    Nothing is trained here: a notebook that is run again must not start minutes of work.
    """
    folders = frames.find_runs(output_dir)
    if not any(run_status(folder) == "finished" for folder in folders):
        raise UserError(
            f"There is no finished run in {display_path(resolve_path(output_dir))}: train the "
            "models with `lmlib sweep params/exp8_small/*.yaml -p seed 0 1 2`, which takes about "
            "a quarter of an hour on two CPU cores, then run this notebook again.")
    return folders


def scores(run_dirs: Iterable[str | Path]) -> pd.DataFrame:
    """Return `results_table` with each run's seed, model, folder, and what it was evaluated on."""
    folders, rows = frames.named_folders(run_dirs), []
    for folder in folders.values():
        config = frames.whole_config(folder)
        kept = {name: value for name, value in config.items() if name not in NOT_THE_MODEL}
        # Losses on other windows, or in other tokens, cannot be compared.
        text = list(frames.evaluated_on(folder).values())
        rows.append([config.get("seed"), json.dumps(kept, sort_keys=True), json.dumps(text),
                     str(folder)])
    columns = ["seed", "model", "evaluated on", "folder"]
    found = pd.DataFrame(rows, list(folders), columns, dtype=object)
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


def finished(run_dirs: Iterable[str | Path] | pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `scores` of finished runs, one per model and seed.

    A table that it returned is returned as it is: reading many runs takes a second.
    """
    if isinstance(run_dirs, pd.DataFrame):
        return run_dirs
    table = scores(run_dirs)
    done = table["state"].astype(str).str.startswith("finished") & table["validation loss"].notna()
    return table[done].drop_duplicates(["model", "seed"], keep="last")  # a copy is no new seed


def ranking(run_dirs: Iterable[str | Path] | pd.DataFrame) -> pd.DataFrame:
    """Rank models by their mean validation loss after the last step, best first.

    Takes the runs' folders, or the table that `finished` made of them. "spread" is the standard
    deviation over seeds, "behind the best" the mean difference to the best model on the same seeds.
    Its two 95 % intervals hold for all pairs of models together (see `pairs`). "test loss" is
    reported beside and ranks nothing. Models that were scored on other text have no loss here, but
    bits per byte.

    "verdict" is "best", "worse" (behind by more than both intervals), "within the noise", "few
    documents" or "documents unknown" (no verdict), "one seed: unknown", "no two seeds in common:
    unknown", or, last and not compared, "other text" or "leaks".
    """
    runs, counts = finished(run_dirs), ["parameters", "active"]
    averaged = ["bits per byte", "test loss", "accuracy", *frames.COSTS]
    columns = ["verdict", "seeds", "validation loss", "spread", *BEHIND, "documents", *averaged,
               "notes"]
    if runs.empty:
        return pd.DataFrame(columns=columns)
    losses = _comparable(runs)
    paired = _common_seeds(losses)
    means = (paired if len(paired) else losses).mean(axis=1)
    best = means.idxmin() if len(means) else None
    groups = runs.astype(dict.fromkeys(averaged, float)).groupby("model")
    table = groups[["validation loss", *averaged]].mean()
    table["seeds"], table["spread"] = groups.size(), groups["validation loss"].std()
    unknown = runs["state"].str.contains(UNKNOWN).groupby(runs["model"]).any()
    table["notes"] = np.where(unknown, UNKNOWN, "")
    others = [(model, best) for model in paired.index if model != best]
    table, models = table.join(_differences(runs, paired, others).droplevel(1)), table.index
    table.loc[models == best, BEHIND[0]] = 0.0
    # The first verdict that applies to a model stands.
    table["verdict"] = np.select(
        [models.str.endswith(LEAKY_NAME), ~models.isin(losses.index), models == best,
         table["verdict"].notna(), table["seeds"] == 1],
        ["leaks", "other text", "best", table["verdict"], "one seed: unknown"],
        "no two seeds in common: unknown")
    table["apart"] = table["verdict"].isin(["other text", "leaks"])
    table = table.sort_values(["apart", "validation loss"], kind="stable")[columns]
    table.loc[table["verdict"] == "other text", ["validation loss", "spread", "test loss"]] = np.nan
    table = table.round(dict.fromkeys(counts, 0))
    return table.astype(dict.fromkeys([*counts, "documents"], "Int64"))


def pairs(run_dirs: Iterable[str | Path] | pd.DataFrame) -> pd.DataFrame:
    """Compare every two comparable models on the seeds that all of them have: a row per pair.

    "± seeds" is Student's t on the residuals of losses ~ model + seed: it holds for other seeds,
    scored on these documents. "± documents" is a t interval, clustered by document, of the mean
    over seeds: it holds for other documents, scored by these trained models. Both are corrected
    (Bonferroni), so that the intervals of all pairs hold together with 95 %.
    """
    runs = finished(run_dirs)
    paired = _common_seeds(_comparable(runs)) if len(runs) else pd.DataFrame()
    models = list(paired.mean(axis=1).sort_values(kind="stable").index)
    both = [(worse, better) for n, better in enumerate(models) for worse in models[n + 1 :]]
    table = _differences(runs, paired, both)
    return table.rename(columns={BEHIND[0]: "difference"})


def verdict(run_dirs: Iterable[str | Path] | pd.DataFrame) -> Verdict:
    """Return in one sentence which models are worse than others, and what is not known."""
    runs = finished(run_dirs)
    return of_models(ranking(runs), pairs(runs))


def best_two(run_dirs: Iterable[str | Path]) -> list[Path]:
    """Return one run folder of each of the two best models, on one seed; [] if there are none."""
    runs = finished(run_dirs)
    paired = _common_seeds(_comparable(runs)) if len(runs) else pd.DataFrame()
    models = list(paired.mean(axis=1).sort_values(kind="stable").index[:2])
    if len(models) < 2 or _differences(runs, paired, [models])["documents"].isna().any():
        return []
    chosen = runs[runs["seed"] == paired.columns[0]].set_index("model")["folder"]
    return [Path(chosen[model]) for model in models]


def _comparable(runs: pd.DataFrame) -> pd.DataFrame:
    """Return losses (models, seeds) on the same text: that of most models without leaks."""
    honest = runs[~runs["model"].str.endswith(LEAKY_NAME)]
    same = honest[honest["evaluated on"] == honest["evaluated on"].mode().get(0)]
    return same.pivot(index="model", columns="seed", values="validation loss")


def _common_seeds(losses: pd.DataFrame) -> pd.DataFrame:
    """Return the losses of models with two or more seeds, on the seeds that all of them have.

    Differences within a seed are less noisy than means. Empty if fewer than two seeds are left.
    """
    paired = losses[losses.notna().sum(axis=1) > 1].dropna(axis=1)
    return paired if paired.shape[1] > 1 else paired.iloc[:0]


def _differences(runs: pd.DataFrame, paired: pd.DataFrame, both: list) -> pd.DataFrame:
    """Return a row for each pair of models in `both`: difference, intervals, documents, verdict."""
    count = len(paired) * (len(paired) - 1) / 2
    level = 1 - 0.05 / max(1, count)
    models = dict.fromkeys(model for pair in both for model in pair)
    sums = {model: _mean_sums(runs, model, paired.columns) for model in models}
    rows = []
    for model, other in both:
        mean, seeds = (paired.loc[model] - paired.loc[other]).mean(), _half_interval(paired)
        estimate = _by_document(sums[model], sums[other])
        half = estimate.half_width(level) if estimate else None
        rows.append([_verdict(mean, seeds, half, estimate), mean, seeds,
                     math.nan if half is None else half,
                     estimate.clusters if estimate else math.nan])
    names = pd.MultiIndex.from_arrays([[pair[n] for pair in both] for n in (0, 1)],
                                      names=["model", "minus"])
    return pd.DataFrame(rows, names, ["verdict", *BEHIND, "documents"])


def _verdict(mean: float, seeds: float, documents: float | None, estimate: Estimate | None) -> str:
    """Return the verdict on a model that is `mean` nats behind another."""
    if estimate is None:
        return "documents unknown"
    if estimate.is_few:
        return "few documents"
    return "worse" if mean > max(seeds, documents) else "within the noise"


def _mean_sums(runs: pd.DataFrame, model: str, seeds: Iterable[float]) -> pd.DataFrame | None:
    """Return a model's nats and tokens per document, the mean over seeds; None if not recorded."""
    chosen = runs[(runs["model"] == model) & runs["seed"].isin(seeds)]
    try:
        found = [comparison.cluster_sums(comparison.read_evaluation(folder))
                 for folder in chosen["folder"]]
    except ValueError:  # an older version trained it, or the file is damaged
        return None
    same = all(sums["tokens"].equals(found[0]["tokens"]) for sums in found)
    return sum(found) / len(found) if same else None


def _by_document(sums: pd.DataFrame | None, other: pd.DataFrame | None) -> Estimate | None:
    """Return the difference of two models in nats per token, clustered; None if not recorded."""
    if sums is None or other is None or not sums["tokens"].equals(other["tokens"]):
        return None
    nats = sums["nats"] - other["nats"]
    return clustered_mean(zip(nats.tolist(), sums["tokens"].tolist(), strict=True))


def _half_interval(losses: pd.DataFrame | np.ndarray) -> float:
    """Return half the interval of a difference of two models' means: losses (models, seeds)."""
    losses = np.asarray(losses, float)
    models, seeds = losses.shape
    left = losses - losses.mean(1, keepdims=True) - losses.mean(0, keepdims=True) + losses.mean()
    freedom = (models - 1) * (seeds - 1)
    level = 1 - 0.05 / 2 / (models * (models - 1) / 2)  # two-sided, for each of the pairs
    return student_t(level, freedom) * math.sqrt((left**2).sum() / freedom * 2 / seeds)


def losses(run_dirs: Iterable[str | Path]) -> go.Figure:
    """Draw each seed's last validation loss as a dot, with the mean and its 95 % interval over
    seeds; the best model is on top.
    """
    runs, figure = finished(run_dirs), go.Figure()
    score, unit, warning = _score(runs)
    means, numbers = runs.groupby("model")[score].mean(), list(ranking(runs).index)
    for model in means.sort_values(ascending=False, kind="stable").index:  # Plotly draws upward
        number = numbers.index(model)  # the color that it has everywhere
        values = runs.loc[runs["model"] == model, score].dropna()
        mean, count = values.mean(), len(values)
        half = student_t(0.975, count - 1) * values.std() / math.sqrt(count) if count > 1 else 0.0
        drawn = [([mean - half, mean + half], "lines+markers", 2.5, "line-ns-open", 10),
                 (values.tolist(), "markers", 1, f"{figures.shape_of(number)}-open", 8),
                 ([mean], "markers", 1, figures.shape_of(number), 11)]
        for x, mode, width, symbol, size in drawn:
            figures.add_line(figure, number, x, [html.escape(model)] * len(x), model, mode=mode,
                             width=width, symbol=symbol, size=size, showlegend=False,
                             hoverinfo="x")
    figure.update_yaxes(type="category").update_xaxes(hoverformat=".3f")
    figure.update_xaxes(title_text=f"validation, {unit}, after the last step")
    figure.add_annotation(text=figures.titled("Every seed", "open; filled: the mean, with its 95 % "
                          "interval over seeds"), x=0.5, y=1, xref="paper", yref="paper",
                          yanchor="bottom", showarrow=False)
    figures.styled(figure, 120 + 34 * max(1, len(means)), 40, warning, showlegend=False)
    return figure.update_layout(margin={"l": 220})


def curves(run_dirs: Iterable[str | Path], x: str = "step") -> go.Figure:
    """Draw each model's mean validation loss over `x`, minus the mean over models at each step.

    So close curves can be told apart; the title says what the common mean is. The bars are the
    standard deviation over seeds of the same difference. One model alone is drawn as it is.
    """
    run_dirs, figure = list(run_dirs), go.Figure()
    runs, frame = finished(run_dirs), frames.read_runs(run_dirs)
    score, unit, warning = _score(runs)
    column = "val_loss" if score == "validation loss" else "val_bits_per_byte"
    evals = frame[(frame["kind"] == "eval") & frame["run"].isin(runs.index)]
    evals = evals.reindex(columns=list({"run", "step", x, column})).dropna(subset=column)
    evals = evals.join(runs[["model", "seed"]], on="run")
    means = evals.groupby(["step", "model"])[column].mean().unstack()
    common = means.dropna().mean(axis=1) if means.shape[1] > 1 else means.sum(axis=1) * 0
    apart = evals[column] - evals.groupby(["step", "seed"])[column].transform("mean")
    bars = apart.groupby([evals["step"], evals["model"]]).std().unstack().fillna(0)
    places = evals.groupby(["step", "model"])[x].mean().unstack()
    for number, model in enumerate(ranking(runs).index):
        if model in means:
            steps = common.index[means.loc[common.index, model].notna()]
            figures.add_line(figure, number, places.loc[steps, model].tolist(),
                             (means[model] - common).loc[steps].tolist(), model,
                             error=bars.loc[steps, model].tolist())
    said = ""
    if common.any():
        said = (f"the mean falls from {common.iloc[0]:.3f} (step {common.index[0]:,.0f}) to "
                f"{common.iloc[-1]:.3f} (step {common.index[-1]:,.0f})")
    title = "Difference to the mean over models" if said else "Validation"
    figure.add_annotation(text=figures.titled(title, said), x=0.5, y=1, xref="paper", yref="paper",
                          yanchor="bottom", showarrow=False)
    figure.update_yaxes(hoverformat="+.3f", title_text=f"validation, {unit}")
    figure.update_xaxes(title_text=frames.AXES[x], hoverformat=figures.HOVER_X[x],
                        unifiedhovertitle={"text": frames.AXES[x] + " %{x}"})
    return figures.styled(figure, 440, warning=warning, hovermode="x unified")


def _score(runs: pd.DataFrame) -> tuple[str, str, str]:
    """Return the column in which finished runs can be compared, its unit, and a warning or ""."""
    column, warning = frames.loss_column(runs["folder"] if len(runs) else [])
    return ("validation loss", figures.NATS, "") if column == "val_loss" else (
        "bits per byte", "bits per byte", warning)


def summary(run_dirs: Iterable[str | Path]) -> str:
    """Return the ranking as one sentence per model, and what its intervals hold for."""
    runs = finished(run_dirs)
    lines, table = [], ranking(runs)
    for model, row in table.iterrows():
        seeds, behind = f"{row['seeds']} seed{'s' * (row['seeds'] > 1)}", ""
        if pd.notna(row["± seeds"]):
            halves = [f" ± {row[f'± {of}']:.3f} ({of})" for of in ("seeds", "documents")
                      if pd.notna(row[f"± {of}"])]
            behind = f", {row['behind the best']:+.3f}{''.join(halves)} to the best"
        notes = f" ({row['notes']})" if row["notes"] else ""
        score = (f"{row['bits per byte']:.3f} bits per byte" if pd.isna(row["validation loss"])
                 else f"{row['validation loss']:.3f} nats")
        lines.append(f"{model}: {score} over {seeds}{behind}: {row['verdict']}{notes}")
    if table["± seeds"].notna().any():
        lines.append(CONDITIONS)
    if warning := frames.loss_column(runs["folder"])[1]:
        lines.append(warning)
    return "\n".join(lines) or "No run is finished yet."
