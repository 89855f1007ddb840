"""A training step in several gloo processes on the CPU, beside plain DDP.

    python benchmarks/processes.py [--recipe params/quickstart.yaml] [--processes 2] [--steps 30]

One thread and one micro-batch per process. Plain DDP is torch's DistributedDataParallel with its own
all-reduce, and the whole optimizer on every process. lmlib gives each tensor's optimizer to one
process; with `deterministic` it sums the gradients in a fixed order; with `sharding: full` it
divides the parameters (FSDP2). The kinds take turns, step by step, so that a busy machine slows all
of them. Wall-clock medians of rank 0, in seconds: forward and backward with the reduction, the update
with clipping and what is sent for it, and both. Goal: with `deterministic` at most 1.1 of plain DDP.

The memory is measured in launches of their own, of three steps each: how far rank 0's peak rises above
what it had before its model was built.
"""

import argparse
import resource
import statistics
import sys
import time
from collections import defaultdict

import torch
from torch.nn.parallel import DistributedDataParallel

from lmlib import distributed, optim, training
from lmlib.cli.launch import run_processes
from lmlib.config import RunConfig
from lmlib.model.transformer import LanguageModel
from lmlib.run.gradients import clip_gradients
from lmlib.run.parallel import Replicas, Shards, hollow_model

KINDS = ("plain DDP", "lmlib", "lmlib, deterministic", "lmlib, sharding: full")


class Loss(torch.nn.Module):
    """A model whose forward pass is its loss."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model.loss(ids, targets)


class Step:
    """A model, its optimizers, and the way in which the processes train it."""

    def __init__(self, config: RunConfig, kind: str):
        torch.manual_seed(0)
        self.config, self.kind = config, kind
        is_divided, initial = kind == KINDS[3], None
        if distributed.is_first() or not is_divided:
            initial = LanguageModel(config)
        self.model = hollow_model(config, torch.device("cpu")) if is_divided else initial
        self.optimizers = optim.build_optimizers(self.model, config)
        if kind == "plain DDP":
            self.ddp = DistributedDataParallel(Loss(self.model))
            return
        owners = optim.owners(self.model, self.optimizers, distributed.world_size())
        owned = {p for p, owner in owners.items() if owner == distributed.rank()}
        self.optimizers = optim.build_optimizers(self.model, config, owned)
        self.parallel = (
            Shards(self.model, owners, initial) if is_divided else Replicas(self.model, owners)
        )
        self.parallel.sum_gradients(exact=kind == "lmlib, deterministic")

    def gradient(self, x: torch.Tensor, y: torch.Tensor, step: int):
        """Set the gradient of the batch (B, T), of which this process computes its part."""
        micro = len(x) // distributed.world_size()
        if self.kind != "plain DDP":
            training.accumulate_gradients(self.parallel.model, x, y, micro, 0, step, torch.float32)
            return
        part = slice(distributed.rank() * micro, (distributed.rank() + 1) * micro)
        self.model.zero_grad(set_to_none=True)
        self.ddp(x[part], y[part]).backward()

    def update(self):
        if self.kind == "plain DDP":
            clip_gradients(self.model, self.config.grad_clip)
        else:
            self.parallel.clip_gradients(self.config.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.kind != "plain DDP":
            self.parallel.send_parameters()


def batch(config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (config.batch_size, config.sequence_length + 1)
    ids = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


def measure_memory(config: RunConfig, kind: str):
    """Print the memory that three steps of one kind take on rank 0."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = Step(config, kind)
    for number in range(3):
        step.gradient(*batch(config), number)
        step.update()
    if distributed.is_first():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{kind:22}{(peak - before) / 1e6:10.3f} GB", flush=True)


def measure(config: RunConfig, count: int):
    """Print the table; in each of the processes."""
    seconds, kinds = defaultdict(list), {kind: Step(config, kind) for kind in KINDS}
    x, y = batch(config)
    for step in range(count + 1):
        for kind, trained in kinds.items():
            torch.use_deterministic_algorithms(kind == "lmlib, deterministic")
            distributed.gather(None)  # all begin together
            began = time.perf_counter()
            trained.gradient(x, y, step)
            middle = time.perf_counter()
            trained.update()
            ended = time.perf_counter()
            if step:  # the first warms up
                seconds[kind].append((middle - began, ended - middle, ended - began))
    if distributed.is_first():
        whole = {kind: [statistics.median(part) for part in zip(*seconds[kind], strict=True)]
                 for kind in KINDS}  # fmt: skip
        print(f"{'':22}{'gradient':>10}{'update':>10}{'step':>10}{'ratio':>8}")
        for kind, parts in whole.items():
            ratios = [a[2] / b[2] for a, b in zip(seconds[kind], seconds[KINDS[0]], strict=True)]
            print(f"{kind:22}" + "".join(f"{part:10.4f}" for part in parts)
                  + f"{statistics.median(ratios):8.2f}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="params/quickstart.yaml")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--memory", metavar="KIND", help="measure the memory of one kind alone")
    options = parser.parse_args()
    if not distributed.is_launched():
        print(f"{options.recipe}: {options.processes} processes, gloo, one thread each", flush=True)
        memory = [] if options.memory else [["--memory", kind] for kind in KINDS]
        results = [run_processes(options.processes, [*sys.argv, *more]) for more in [[], *memory]]
        return max(results)
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as in a run
    config = RunConfig.load(options.recipe, dropout=0.0)
    with distributed.join():
        if options.memory:
            measure_memory(config, options.memory)
        else:
            measure(config, options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
