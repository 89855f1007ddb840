"""CPU time and peak memory of a training step, beside stock transformers' class.

    python benchmarks/train.py [--recipe params/quickstart.yaml] [--steps 3] [--rounds 3]

A step is forward, backward, clipping and the update, of the recipe's batch, in float32 and on one
thread. Each measurement has a process of its own; those of a round follow each other, so that a
busy machine slows all of them. The stock class starts from the same weights and is updated by the
same AdamW; lmlib's last row is its own step with Muon. Memory is the peak above what the imports
take. Goals: 0.90 (exp9) and 0.80 (quickstart) of the CPU time, 0.70 of the memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from lmlib import optim, training
from lmlib.config import RunConfig
from lmlib.model import huggingface
from lmlib.model.transformer import LanguageModel
from lmlib.run.device import numerics
from lmlib.run.gradients import clip_gradients

KINDS = ("sdpa", "eager", "lmlib", "lmlib, Muon")


def measure(config: RunConfig, kind: str, steps: int) -> dict:
    """Return the CPU seconds of each step, the last loss and the peak memory in bytes."""
    torch.set_num_threads(1)
    imports = _peak()
    config = replace(config, optimizer="muon" if kind == "lmlib, Muon" else "adamw")
    model = LanguageModel(config)
    optimizers = optim.build_optimizers(model, config)
    if kind in ("sdpa", "eager"):
        settings = huggingface.stock_config(config)
        stock = getattr(transformers, settings.architectures[0])
        weights = model.state_dict()
        model = stock._from_config(settings, attn_implementation=kind)
        model.load_state_dict(weights)
        del weights, optimizers
        optimizers = optim.build_optimizers(model, config)
    shape = (config.batch_size, config.sequence_length + 1)
    ids = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    x, y = ids[:, :-1], ids[:, 1:]
    seconds = []
    for step in range(steps + 1):
        began = time.process_time()
        if kind in ("sdpa", "eager"):
            model.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
            loss.backward()
        else:
            micro = config.micro_batch_size or len(x)
            with numerics(config, x.device):
                loss = training.accumulate_gradients(model, x, y, micro, 0, step, torch.float32)
        clip_gradients(model, config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        if step:  # the first warms up
            seconds.append(time.process_time() - began)
    return {"seconds": seconds, "loss": float(loss.detach()), "memory": _peak() - imports}


def _peak() -> int:
    """Return this process's peak resident memory; `ru_maxrss` would include its parent's."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="params/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, help="windows; the recipe's by default")
    parser.add_argument("--kind", choices=KINDS, help="measure one, and print it as JSON")
    options = parser.parse_args()
    config = RunConfig.load(options.recipe, dropout=0.0)
    config = replace(config, batch_size=options.batch or config.batch_size)
    if options.kind:
        print(json.dumps(measure(config, options.kind, options.steps)))
        return
    found = {kind: [] for kind in KINDS}
    command = [sys.executable, __file__, "--recipe", options.recipe, "--steps", str(options.steps)]
    command += ["--batch", str(config.batch_size)]
    for _ in range(options.rounds):
        for kind in KINDS:
            child = subprocess.run(
                [*command, "--kind", kind],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                check=True,
            )
            found[kind].append(json.loads(child.stdout))
    print(f"{options.recipe}: {config.batch_size} x {config.sequence_length} tokens, one thread")
    medians = {
        kind: (
            statistics.median(s for result in results for s in result["seconds"]),
            statistics.median(result["memory"] for result in results),
        )
        for kind, results in found.items()
    }
    seconds, memory = medians["sdpa"]
    print(f"{'':<13}{'CPU s a step':>13}{'ratio':>7}{'peak GB':>9}{'ratio':>7}{'loss':>10}")
    for kind, (median, peak) in medians.items():
        print(
            f"{kind:<13}{median:>13.3f}{median / seconds:>7.2f}{peak / 1e9:>9.2f}"
            f"{peak / memory:>7.2f}{found[kind][0]['loss']:>10.5f}"
        )


if __name__ == "__main__":
    main()
