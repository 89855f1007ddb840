"""Count the kernels that a training step launches and the scalars that it reads back.

    python benchmarks/launches.py [--recipe params/exp9.yaml] [--device cpu] [--width 64]

Each operator that torch dispatches counts as one kernel, views left out. A scalar that is read back
makes the host wait for the device. Both can be counted without a GPU: on a CPU some operators are
split that CUDA has as one kernel. The counts do not depend on the width, so `--width` may be small.
"""

import argparse
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmlib import optim, training
from lmlib.config import RunConfig
from lmlib.model.moe import update_router_bias
from lmlib.model.transformer import LanguageModel
from lmlib.run.device import numerics, pick_device, pick_dtype, send
from lmlib.run.gradients import clip_gradients
from lmlib.run.updates import Updates

READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}
NO_KERNEL = {
    *("aten::_unsafe_view", "aten::promote_types"),
    *("profiler::_record_function_enter_new", "profiler::_record_function_exit"),
}


@dataclass
class Counts(TorchDispatchMode):
    """Counts what is dispatched while it is active."""

    kernels: Counter = field(default_factory=Counter)  # by operator
    reads: int = 0

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name
        if name in READS:
            self.reads += 1
        elif not operator.is_view and name not in NO_KERNEL:
            self.kernels[name] += 1
        return operator(*args, **(kwargs or {}))


def count(config: RunConfig) -> dict[str, Counts]:
    """Count the second update of a run by part; "loop" is what the training loop adds."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model = LanguageModel(config).to(device).train()
    optimizers = optim.build_optimizers(model, config)
    updates = Updates(device, stays_blocked=True)
    shape = (config.batch_size, config.sequence_length + 1)
    windows = torch.randint(0, config.vocab_size, shape)
    ids, targets = windows[:, :-1], windows[:, 1:]

    def step_optimizers(found_inf: torch.Tensor):
        for optimizer in optimizers:
            optimizer.found_inf = found_inf
            optimizer.step()
        update_router_bias(model, found_inf)

    def update(step: int):
        loss = training.accumulate_gradients(
            model, ids, targets, len(ids), config.seed, step, dtype
        )
        norm = clip_gradients(model, config.grad_clip)
        step_optimizers(updates.add(step, loss, norm))

    with numerics(config, device), torch.autocast(device.type, dtype, dtype != torch.float32):
        update(1)  # creates the optimizers' state
        with Counts() as whole:
            update(2)
        parts = {name: Counts() for name in ("forward", "backward", "clip", "optimizer")}
        x, y = send(ids, device), send(targets, device)
        model.zero_grad(set_to_none=True)
        with parts["forward"]:
            loss = model.loss(x, y)
        with parts["backward"]:
            loss.backward()
        with parts["clip"]:
            clip_gradients(model, config.grad_clip)
        with parts["optimizer"]:
            step_optimizers(torch.zeros((), device=device))
    counted = sum((part.kernels for part in parts.values()), Counter())
    reads = sum(part.reads for part in parts.values())
    return {**parts, "loop": Counts(whole.kernels - counted, whole.reads - reads)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="params/exp9.yaml")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=64, help="hidden_size, 0: the recipe's")
    parser.add_argument("--operators", action="store_true", help="also list the operators")
    options = parser.parse_args()
    config = RunConfig.load(options.recipe, device=options.device)
    small = {"vocab_size": config.vocab_size if options.width == 0 else 512}
    config = replace(config, **small, hidden_size=options.width or config.hidden_size)
    parts = count(config)
    print(f"{options.recipe} on {options.device}, one update")
    print(f"{'':<10}{'kernels':>9}{'scalars read':>14}")
    for name, part in parts.items():
        print(f"{name:<10}{part.kernels.total():>9,}{part.reads:>14}")
        if options.operators:
            print(f"          {dict(part.kernels.most_common())}")
    kernels = sum(part.kernels.total() for part in parts.values())
    print(f"{'together':<10}{kernels:>9,}{sum(part.reads for part in parts.values()):>14}")


if __name__ == "__main__":
    main()
