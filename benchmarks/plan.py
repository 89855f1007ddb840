"""What `lmlib plan` says of a step on this CPU, beside a step that is measured.

    python benchmarks/plan.py [--recipes params/quickstart.yaml params/exp9.yaml] [--steps 2]

One thread. Each step is measured in a process of its own (`train.py --kind`), right after this
machine's matrix products and memory, which the plan is made of. Goal: within 20 %. Experiment 9 needs
8 GB and 4 minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from lmlib.config import RunConfig
from lmlib.run.plan import plan

KINDS = {"adamw": "lmlib", "muon": "lmlib, Muon"}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipes = ["params/quickstart.yaml", "params/exp9_compact.yaml", "params/exp9.yaml"]
    parser.add_argument("--recipes", nargs="+", default=recipes)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    script = str(Path(__file__).with_name("train.py"))
    print(f"{'':30}{'seconds: plan':>15}{'measured':>10}{'ratio':>7}{'GB: plan':>12}{'measured':>10}"
          f"{'ratio':>7}")  # fmt: skip
    for recipe in options.recipes:
        for optimizer, kind in KINDS.items():
            config = RunConfig.load(recipe, dropout=0.0, optimizer=optimizer)
            needs = plan(config)
            command = [sys.executable, script, "--recipe", recipe, "--kind", kind]
            done = subprocess.run(
                [*command, "--steps", str(options.steps)],
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
