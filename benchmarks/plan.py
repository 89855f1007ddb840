"""What `lmlib plan` says of a step on this CPU, beside a step that is measured.

    python benchmarks/plan.py [--recipes params/quickstart.yaml params/exp9.yaml] [--steps 2]

One thread. Each step is measured in a process of its own (`train.py --kind`), right after this
machine's matrix products and memory, which the plan is made of. Goal: within 20 %. Experiment 9 needs
8 GB and 4 minutes.

    python benchmarks/plan.py --table [h100]

prints docs/scale.md's table of larger models instead: arithmetic alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from lmlib.config import RunConfig
from lmlib.run.plan import MACHINES, largest_micro_batch, plan

KINDS = {"adamw": "lmlib", "muon": "lmlib, Muon"}
# Width, layers, heads and inner width of models with exp9_1b's other parameters.
SHAPES = {
    "148M": (512, 12, 8, 2048),
    "1.3B": (2048, 24, 16, 5120),
    "3B": (2560, 36, 20, 7168),
    "7B": (4096, 32, 32, 13312),
}


def print_table(gpu: str):
    """Print what the models need on 1, 8 and 64 GPUs, for steps of 2**20 tokens."""
    print(
        "| parameters | GPUs | sharding | micro-batch | memory | a step | 20 tokens a parameter |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (width, layers, heads, inner) in SHAPES.items():
        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        config = RunConfig.load("params/exp9_1b.yaml", **shape, intermediate_size=inner,
                                batch_size=512, micro_batch_size=16)  # fmt: skip
        for count in (1, 8, 64):
            for sharding in ("none", "full") if count > 1 else ("none",):
                divided = replace(config, sharding=sharding, micro_batch_size=min(8, 512 // count))
                needs = plan(divided, MACHINES[gpu], count)
                rows = largest_micro_batch(needs)
                if rows:
                    break
            if not rows:
                print(f"| {name} | {count} | | | does not fit | | |")
                continue
            needs = plan(replace(divided, micro_batch_size=min(8, rows)), MACHINES[gpu], count)
            days = 20 * needs.parameters / 2**20 * needs.step_seconds / 86400
            print(f"| {name} ({needs.parameters:,}) | {count} | {sharding} | {min(8, rows)} | "
                  f"{needs.peak / 1e9:.0f} GB | {needs.step_seconds:.2f} s | {days:.2g} days |")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipes = ["params/quickstart.yaml", "params/exp9_compact.yaml", "params/exp9.yaml"]
    parser.add_argument("--recipes", nargs="+", default=recipes)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--table", nargs="?", const="h100", choices=MACHINES)
    options = parser.parse_args()
    if options.table:
        print_table(options.table)
    else:
        compare(options.recipes, options.steps)


def compare(recipes: list[str], steps: int):
    """Print the plan of each recipe's step beside its measured time and memory."""
    torch.set_num_threads(1)
    script = str(Path(__file__).with_name("train.py"))
    print(f"{'':30}{'seconds: plan':>15}{'measured':>10}{'ratio':>7}{'GB: plan':>12}{'measured':>10}"
          f"{'ratio':>7}")  # fmt: skip
    for recipe in recipes:
        for optimizer, kind in KINDS.items():
            config = RunConfig.load(recipe, dropout=0.0, optimizer=optimizer)
            needs = plan(config)
            command = [sys.executable, script, "--recipe", recipe, "--kind", kind]
            done = subprocess.run(
                [*command, "--steps", str(steps)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                check=True,
            )
            found = json.loads(done.stdout)
            seconds, memory = statistics.median(found["seconds"]), found["memory"]
            print(f"{Path(recipe).stem + ', ' + optimizer:30}{needs.step_seconds:15.3f}"
                  f"{seconds:10.3f}{needs.step_seconds / seconds:7.2f}{needs.peak / 1e9:12.3f}"
                  f"{memory / 1e9:10.3f}{needs.peak / memory:7.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
