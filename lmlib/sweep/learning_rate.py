"""Search for a learning rate by a range test."""

from dataclasses import dataclass, replace

from lmlib.config import RunConfig
from lmlib.run.device import numerics
from lmlib.run.prepare import prepare
from lmlib.run.start import find_start
from lmlib.training import apply_update


@dataclass(frozen=True)
class RangeTest:
    """The losses of a range test, and the factor of the learning rates that they suggest."""
    config: RunConfig
    factors: list[float]  # of the recipe's learning_rate and muon_learning_rate
    losses: list[float]  # nats per token, smoothed
    factor: float | None  # None: the loss never fell

    @property
    def suggestion(self) -> dict[str, float]:
        """The suggested learning rates by parameter; empty if the loss never fell."""
        return _rates(self.config, self.factor) if self.factor else {}


def _rates(config: RunConfig, factor: float) -> dict[str, float]:
    """Return the recipe's learning rates times `factor`, to two digits."""
    is_muon = config.optimizer == "muon"
    names = ["learning_rate", "muon_learning_rate"] if is_muon else ["learning_rate"]
    return {name: float(f"{getattr(config, name) * factor:.2g}") for name in names}


def find_learning_rate(config: RunConfig, steps: int = 100, low: float = 1e-3,
                       high: float = 30.0) -> RangeTest:
    """Train a copy of the model while its learning rates grow; suggest where the loss falls most.

    The rates grow from `low` to `high` times the recipe's, until the loss is half a nat above its
    lowest: Smith's range test (arXiv:1506.01186), as in fastai's `lr_find`. Only the token cache
    is written, and no state that training would use is changed. A ValueError says why the device,
    the corpus or `init_from` cannot be used, or that the run leaks.
    """
    # Under a name without a folder: the copy must not start from the run's own checkpoint.
    copy = replace(config, run_name=f"{config.run_name[:80]}-range-test", init_state="weights",
                   score_test=False)
    start, factors, losses, mean = find_start(copy), [], [], 0.0
    with numerics(copy, start.device):
        run = prepare(start)
        for step in range(1, steps + 1):
            factor = low * (high / low) ** ((step - 1) / max(1, steps - 1))
            apply_update(run, step, factor)
            [update] = run.updates.read()
            if not update.is_finite:
                break
            mean = 0.9 * mean + 0.1 * update.loss
            factors.append(factor)
            losses.append(mean / (1 - 0.9**step))  # without the bias of a mean that began at 0
            # The first steps are noise: the smoothed loss is a mean of few values.
            if losses[-1] > min(losses) + 0.5 and step > 10:
                break
    return RangeTest(config, factors, losses, _steepest(factors, losses))


def _steepest(factors: list[float], losses: list[float]) -> float | None:
    """Return the factor where the loss falls fastest per step, before its minimum."""
    lowest = losses.index(min(losses)) if losses else 0
    slopes = {i: losses[i + 1] - losses[i - 1] for i in range(1, lowest)}
    steepest = min(slopes, key=slopes.get, default=None)
    return None if steepest is None or slopes[steepest] >= 0 else factors[steepest]


def candidates(found: RangeTest, steps: int) -> list[RunConfig]:
    """Return short runs, in a folder of their own, that test a suggestion.

    Their rates are a third of the suggestion, itself, three times it, and the recipe's own.
    """
    config = found.config
    around = (found.factor / 3, found.factor, found.factor * 3) if found.factor else ()
    short = {"total_steps": steps, "eval_every": steps, "checkpoint_every": steps,
             "score_test": False, "output_dir": f"{config.output_dir}/{config.run_name}-rates"}
    choices = {tuple(_rates(config, factor).items()) for factor in (1.0, *around)}
    names = {rates: "-".join(f"{rate:g}" for _, rate in rates) for rates in choices}
    return [replace(config, **short, **dict(rates), run_name=f"{steps}steps-rate{names[rates]}")
            for rates in sorted(choices)]
