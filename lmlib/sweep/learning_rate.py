"""The search for a learning rate."""

import math
from dataclasses import dataclass, replace

from lmlib import checkpoint, optim, training
from lmlib.config import RunConfig
from lmlib.model.moe import update_router_bias
from lmlib.run.device import numerics, pick_device, pick_dtype
from lmlib.run.preflight import before_training
from lmlib.run.start import build_model, open_store


@dataclass(frozen=True)
class RangeTest:
    """Losses at rates that grow step by step; `factor` times the recipe's rates is what the curve suggests."""

    config: RunConfig
    factors: list[float]  # of the recipe's learning_rate and muon_learning_rate
    losses: list[float]  # nats, smoothed
    factor: float | None  # None: the loss never fell

    @property
    def suggestion(self) -> dict[str, float]:
        return rates(self.config, self.factor) if self.factor else {}


def rates(config: RunConfig, factor: float) -> dict[str, float]:
    """The recipe's learning rates times `factor`, to two digits."""
    names = ["learning_rate", "muon_learning_rate"] if config.optimizer == "muon" else ["learning_rate"]
    return {name: float(f"{getattr(config, name) * factor:.2g}") for name in names}


def find_learning_rate(config: RunConfig, steps: int = 100, low: float = 1e-3, high: float = 30.0) -> RangeTest:
    """A range test (Smith, arXiv:1506.01186; fastai's `lr_find`): train a copy of the model while its rates grow from `low`
    to `high` times the recipe's, until the loss leaves its lowest by half a nat; suggest where it falls most steeply.

    Nothing is written but the tokens' cache, and no state that training would use is touched.

    Raises:
        ValueError: the device, the corpus or the parent that `init_from` names cannot be used, or the run leaks.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    with numerics(config, device):
        store = open_store(config)
        parent = checkpoint.find_checkpoint(config.init_from, config.init_step) if config.init_from else None
        whole = replace(config, vocab_size=store.vocab_size)
        model = build_model(whole, parent).to(device)
        before_training(whole, model, store, store.validation_windows(), parent)
        optimizers = optim.build_optimizers(model, config)
        micro, factors, losses, mean = config.micro_batch_size or config.batch_size, [], [], 0.0
        for step in range(1, steps + 1):
            factor = low * (high / low) ** ((step - 1) / max(1, steps - 1))
            optim.set_learning_rates(optimizers, factor)
            loss = training.accumulate_gradients(model, *store.batch(step), micro, config.seed, step, dtype)
            norm = training.clip_gradients(model, config.grad_clip)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                break
            for optimizer in optimizers:
                optimizer.step()
            update_router_bias(model)
            mean = 0.9 * mean + 0.1 * loss
            factors.append(factor)
            losses.append(mean / (1 - 0.9**step))
            if losses[-1] > min(losses) + 0.5 and step > 10:
                break
    return RangeTest(config, factors, losses, _steepest(factors, losses))


def _steepest(factors: list[float], losses: list[float]) -> float | None:
    """The factor at which the loss falls fastest per doubling, before its lowest point."""
    lowest = losses.index(min(losses)) if losses else 0
    slopes = [losses[i + 1] - losses[i - 1] for i in range(1, lowest)]
    if not slopes or min(slopes) >= 0:
        return None
    return factors[slopes.index(min(slopes)) + 1]


def candidates(found: RangeTest, steps: int) -> list[RunConfig]:
    """Short runs, in a folder of their own, that confirm a suggestion: a third of it, itself and three times it, and the
    recipe's own rates."""
    factors = sorted({1.0, *((found.factor / 3, found.factor, found.factor * 3) if found.factor else ())})
    choices = {tuple(rates(found.config, factor).items()) for factor in factors}
    short = {"total_steps": steps, "eval_every": steps, "checkpoint_every": steps}
    short["output_dir"] = f"{found.config.output_dir}/{found.config.run_name}-rates"
    return [
        replace(found.config, **short, run_name=f"{steps}steps-rate" + "-".join(f"{r:g}" for _, r in chosen), **dict(chosen))
        for chosen in sorted(choices)
    ]
