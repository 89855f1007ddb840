"""Speed of a training step on any device: eager, compiled, and beside stock models of its size.

    python benchmarks/step.py [--recipe params/exp9.yaml] [--device cuda] [--steps 20] [--batch N]

Each row: seconds a step (forward, backward, clipping, update), tokens/s, peak memory, and on the
rows of lmlib the time of the step's own matrix products, measured alone in this run. The stock
models are transformers' class with the same weights and a GPT-2 of about as many parameters, both
with fused AdamW. `compare` returns the rows; gpu.py keeps them.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from lmlib import optim, training
from lmlib.config import RunConfig
from lmlib.model import huggingface
from lmlib.model.size import parameter_count
from lmlib.model.transformer import LanguageModel
from lmlib.run.compiled import compile_loss
from lmlib.run.device import numerics, pick_device, pick_dtype
from lmlib.run.gradients import clip_gradients
from lmlib.run.updates import Updates

PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "mv", "_grouped_mm")


class Products(TorchDispatchMode):
    """Collects the matrix products of what runs in it: operator, shapes and types."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator._schema.name.removeprefix("aten::") in PRODUCTS:
            tensors = tuple((tuple(t.shape), t.dtype) for t in args if isinstance(t, torch.Tensor))
            self.found[operator, tensors] += 1
        return operator(*args, **(kwargs or {}))

    def seconds(self, device: torch.device) -> float:
        """Time each product alone, and return the sum."""
        total = 0.0
        for (operator, tensors), count in self.found.items():
            made = [torch.randn(shape, device=device).to(dtype) for shape, dtype in tensors]
            total += count * median_seconds(lambda op=operator, made=made: op(*made), device, 5)
        return total


def median_seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ours(config: RunConfig, device, dtype, batch) -> tuple[Callable[[], object], str, int]:
    """Return one step of lmlib as a function, why it stays eager, and the parameters."""
    model = LanguageModel(config).to(device)
    why = compile_loss(model, config, *batch, dtype)
    optimizers, updates = optim.build_optimizers(model, config), Updates(device, True)
    step = iter(range(1, 10**9))

    def update():
        number = next(step)
        loss = training.accumulate_gradients(
            model, *batch, len(batch[0]), config.seed, number, dtype
        )
        norm = clip_gradients(model, config.grad_clip)
        for optimizer in optimizers:
            optimizer.found_inf = updates.add(number, loss, norm)
            optimizer.step()

    return update, why, parameter_count(model)


def stock(model, config: RunConfig, device, dtype, batch) -> tuple[Callable[[], object], str, int]:
    """Return one step of a transformers model with fused AdamW."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, fused=True)
    ids, targets = (part.to(device) for part in batch)

    def update():
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(ids).logits
        F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or 1e9)
        optimizer.step()

    return update, "", sum(p.numel() for p in model.parameters())


def gpt2(config: RunConfig, parameters: int):
    """Return a GPT-2 of 12 layers whose width brings it nearest to so many parameters."""

    def settings(width: int):
        return transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.sequence_length,
            n_embd=width,
            n_layer=config.num_hidden_layers,
            n_head=max(1, width // 64),
        )

    def size(width: int) -> int:
        layers = 12 * config.num_hidden_layers * width**2
        return layers + (config.vocab_size + config.sequence_length) * width

    width = min(range(64, 2049, 64), key=lambda width: abs(size(width) - parameters))
    return transformers.GPT2LMHeadModel._from_config(settings(width), attn_implementation="sdpa")


def compare(config: RunConfig, steps: int, names: tuple[str, ...] = ()) -> list[dict]:
    """Measure each kind of step in turn; returns a row per kind."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    shape = (config.batch_size, config.sequence_length + 1)
    windows = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    batch, size = (windows[:, :-1], windows[:, 1:]), parameter_count(LanguageModel(config))
    made = {
        "lmlib": lambda: ours(replace(config, compile=False), device, dtype, batch),
        "lmlib, compiled": lambda: ours(replace(config, compile=True), device, dtype, batch),
        "transformers": lambda: stock(stock_class(config), config, device, dtype, batch),
        "GPT-2": lambda: stock(gpt2(config, size), config, device, dtype, batch),
    }
    rows = []
    for name in names or made:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with numerics(config, device):
            try:
                update, why, parameters = made[name]()
                seconds = median_seconds(update, device, steps)
            except (ValueError, RuntimeError) as error:
                rows.append({"step": name, "error": str(error)[:300]})
                continue
            row = {"step": name, "seconds": seconds, "parameters": parameters}
            row["tokens_per_second"] = windows[:, 1:].numel() / seconds
            if device.type == "cuda":
                row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            if name == "lmlib":
                with Products() as products:
                    update()
                row["products_alone"] = products.seconds(device)
            rows.append(row)
        del update
    return rows


def stock_class(config: RunConfig):
    settings = huggingface.stock_config(config)
    kind = getattr(transformers, settings.architectures[0])
    return kind._from_config(settings, attn_implementation="sdpa")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="params/exp9.yaml")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, help="windows; the recipe's by default")
    parser.add_argument("--only", nargs="*", default=())
    options = parser.parse_args()
    config = RunConfig.load(options.recipe, device=options.device)
    config = replace(config, batch_size=options.batch or config.batch_size)
    for row in compare(config, options.steps, tuple(options.only)):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
