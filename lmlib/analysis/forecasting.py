"""Forecast the validation loss at a run's last step, with an interval, from its records so far.

The loss is taken as a parabola in the logarithm of the learning rates summed so far, u, plus a term
in how far the learning rate has fallen. Its coefficients get a Bayesian linear regression, whose
prior is what small runs of many kinds showed: `benchmarks/forecast.py` measures how often the
intervals contain the end.
"""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd

from lmlib.analysis import frames
from lmlib.config import RunConfig

EARLIEST = 0.3  # of the steps: before, no forecast is made
SKIPPED = 0.05  # of the steps, at the start, say nothing of the end
# Of validation: 1, u, u², fall of the learning rate; of training less validation: 1, u. All are in
# units of the newest validation loss.
PRIOR_MEAN = np.array([1.0, -0.08, 0.006, -0.04, 0.0, 0.0])
PRIOR_SD = np.array([0.5, 0.065, 0.02, 0.03, 0.5, 0.03])
MISFIT = 0.01  # standard deviation of an evaluation around the curve
OVERFITTING = 0.02  # standard deviation per epoch that repeats the text
WIDENING = 1.1  # of all standard deviations: so that 90 % intervals contain 90 % of the ends
GRID, BINS, POINTS = 2000, 24, 30  # of the schedule, of training losses, and of the curve


@dataclass(frozen=True)
class Forecast:
    """The validation loss expected at `step`, the last, in nats per token, and its interval.

    `curve` has the columns step, loss, low and high, from the newest record to the last step.
    """
    step: int
    loss: float
    low: float
    high: float
    curve: pd.DataFrame = field(compare=False)


def forecast(run: str | Path, level: float = 0.9) -> Forecast | None:
    """Forecast the end of the run in a folder; the interval contains it with probability `level`.

    None where there is nothing to forecast: the run has ended, has made less than EARLIEST of its
    steps, or has no evaluation after the first steps.
    """
    frame = frames.read_runs(run)
    return forecast_from(frame, *frame.attrs["runs"].values(), level=level)


def forecast_from(frame: pd.DataFrame, folder: str | Path, level: float = 0.9) -> Forecast | None:
    """Forecast the end of a run from its records; see `forecast`."""
    config = RunConfig.recorded(Path(folder))
    now = frame["step"].max() if len(frame) else 0
    if config is None or not EARLIEST * config.total_steps <= now < config.total_steps:
        return None
    features = _Features(config, frame)
    first = max(SKIPPED, config.warmup_ratio) * config.total_steps
    steps, losses = _values(frame, "eval", "val_loss", first)
    if not len(steps):
        return None
    scale = losses[-1]
    rows, values, noise = [features(steps)], [losses], [np.full(len(steps), MISFIT)]
    steps, losses = _values(frame, "step", "loss", first)
    scatter = np.sqrt(np.mean(np.diff(losses) ** 2) / 2) / scale if len(losses) > 2 else 0.05
    for part in np.array_split(np.arange(len(steps)), min(len(steps), BINS) or 1):
        if len(part):
            rows.append(features(steps[part], is_training=True).mean(0, keepdims=True))
            values.append(losses[part].mean(keepdims=True))
            noise.append(np.array([np.hypot(MISFIT, scatter / len(part) ** 0.5)]))
    mean, covariance = _regress(np.concatenate(rows), np.concatenate(values) / scale,
                                np.concatenate(noise))
    ahead = np.linspace(max(now, first), config.total_steps, POINTS)
    at = features(ahead)
    tokens = frames.environment(Path(folder), "corpus", "training").get("tokens")
    epochs = config.batch_size * config.sequence_length / tokens if tokens else 0  # of a step
    repeated = [np.maximum(0, steps * epochs - 1) for steps in (now, ahead)]  # after the first
    variance = np.einsum("ni,ij,nj->n", at, covariance, at) + MISFIT**2
    variance += (OVERFITTING * (repeated[1] - repeated[0])) ** 2
    half = NormalDist().inv_cdf((1 + level) / 2) * WIDENING * scale * np.sqrt(variance)
    loss = scale * (at @ mean)
    curve = pd.DataFrame({"step": ahead, "loss": loss, "low": loss - half, "high": loss + half})
    return Forecast(config.total_steps, *map(float, curve.iloc[-1][["loss", "low", "high"]]), curve)


class _Features:
    """The rows of the regression at given steps, from the learning rates recorded and planned."""
    def __init__(self, config: RunConfig, frame: pd.DataFrame):
        from lmlib.optim import schedule  # here, since it takes torch
        total = config.total_steps
        self.grid = np.unique(np.linspace(0, total, GRID + 1).round())[1:]
        self.factors = np.array([schedule(int(step), total, config.warmup_ratio, config.decay_ratio)
                                 for step in self.grid])
        steps, rates = _values(frame, "step", "learning_rate", 0)
        if len(steps):  # what an extension has stretched since is not what was used
            past = self.grid <= steps[-1]
            self.factors[past] = np.interp(self.grid[past], steps, rates / config.learning_rate)
        passed = np.cumsum(self.factors * np.diff(self.grid, prepend=0))
        self.passed = passed / passed[-1]

    def __call__(self, steps: np.ndarray, is_training: bool = False) -> np.ndarray:  # (N,), (N, 6)
        u = np.log(np.interp(steps, self.grid, self.passed))
        fall, one = 1 - np.interp(steps, self.grid, self.factors), np.ones(len(u))
        return np.stack([one, u, u * u, fall, one * is_training, u * is_training], 1)


def _values(frame: pd.DataFrame, kind: str, column: str, first: float
            ) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps after `first` and finite values of a column, in the order of steps."""
    if column not in frame:
        return np.empty(0), np.empty(0)
    rows = frame[(frame["kind"] == kind) & (frame["step"] > first)]
    rows = rows[np.isfinite(rows[column])].sort_values("step")
    return rows["step"].to_numpy(float), rows[column].to_numpy(float)


def _regress(rows: np.ndarray, values: np.ndarray, noise: np.ndarray
             ) -> tuple[np.ndarray, np.ndarray]:
    """Return the posterior mean and covariance of the coefficients: (6,), (6, 6).

    As in Bishop, Pattern Recognition and Machine Learning, equations 3.50 and 3.51.
    """
    precision = np.diag(PRIOR_SD**-2.0)
    covariance = np.linalg.inv(precision + rows.T @ (rows / noise[:, None] ** 2))
    return covariance @ (precision @ PRIOR_MEAN + rows.T @ (values / noise**2)), covariance
