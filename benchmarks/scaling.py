"""How time, memory and start-up grow, beside the arithmetic.

    python benchmarks/scaling.py [--only step|corpus|resume|records] [--steps 3] [--gigabytes 10]

`step`: CPU seconds and peak memory of a whole step while one of width, depth, window, batch and
vocabulary grows, one thread, each in a process of its own. GFLOP are those of the model's products
(forward and backward, attention included) and of Muon's. `growth` is the time's ratio to the row
above over the arithmetic's: above 1, time grows faster.
`corpus`: opening a token store and reading batches. The large stores are sparse files of zeros.
`resume`: saving at step 9,000, loading, and resuming to the next step. `records`: reading runs of
10,000 records, and drawing them.
"""

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import resume
import torch

from lmlib import optim, training
from lmlib.analysis import figures, frames
from lmlib.config import RunConfig
from lmlib.data.tokens import TokenStore
from lmlib.data.verify import STREAMS, damage, write_info
from lmlib.files import PROJECT_ROOT, read_json
from lmlib.model.size import flops_per_token, parameter_count
from lmlib.model.transformer import LanguageModel
from lmlib.run.gradients import clip_gradients
from lmlib.run.start import find_start, open_store

AXES = {
    "width": (128, 256, 512, 1024),
    "layers": (2, 4, 8, 16),
    "window": (64, 128, 256, 512, 1024),
    "batch": (1, 2, 4, 8, 16),
    "vocabulary": (2048, 8192, 32768),
}
BASE = {"width": 256, "layers": 4, "window": 256, "batch": 4, "vocabulary": 8192}


def sized(width: int, layers: int, window: int, batch: int, vocabulary: int) -> RunConfig:
    return RunConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        sequence_length=window,
        batch_size=batch,
        vocab_size=vocabulary,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        kv_lora_rank=width // 2,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        optimizer="muon",
        device="cpu",
    )


def measure_step(config: RunConfig, steps: int) -> dict:
    """Return the CPU seconds of a step (median), peak bytes above the imports, and arithmetic."""
    torch.set_num_threads(1)
    imports = _peak()
    model = LanguageModel(config)
    optimizers = optim.build_optimizers(model, config)
    shape = (config.batch_size, config.sequence_length + 1)
    ids = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    seconds = []
    for step in range(steps + 1):
        began = time.process_time()
        training.accumulate_gradients(
            model, ids[:, :-1], ids[:, 1:], len(ids), 0, step, torch.float32
        )
        clip_gradients(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seconds.append(time.process_time() - began)
    tokens = config.batch_size * config.sequence_length
    return {
        "seconds": statistics.median(seconds[1:]),
        "bytes": _peak() - imports,
        "parameters": parameter_count(model),
        "flops": flops_per_token(model) * tokens + muon_flops(optimizers),
    }


def muon_flops(optimizers: list) -> float:
    """Count Newton-Schulz's operations: five steps of three products for each matrix."""
    matrices = [p.shape for group in optimizers[0].param_groups for p in group["params"]]
    shorter = [(min(shape), max(shape)) for shape in matrices]
    return sum(5 * (4 * short**2 * long + 2 * short**3) for short, long in shorter)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_process(options: dict, steps: int) -> dict:
    """Measure in a process of its own, whose peak memory is that of this step alone."""
    command = [sys.executable, __file__, "--one", json.dumps(options), "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(found.stdout)


def step_tables(steps: int):
    for axis, values in AXES.items():
        print(f"\n{axis:>10}  parameters   GFLOP  CPU s  GFLOP/s  growth  peak MB  of state")
        before = None
        for value in values:
            found = in_process(BASE | {axis: value}, steps)
            rate = found["flops"] / found["seconds"]
            growth = "" if before is None else f"{before / rate:.2f}"
            before = rate
            state = 12 * found["parameters"] / 1e6  # weights, gradients, momentum: 4 bytes each
            print(
                f"{value:>10,}{found['parameters']:>12,}{found['flops'] / 1e9:>8.1f}"
                f"{found['seconds']:>7.2f}{rate / 1e9:>9.1f}{growth:>8}"
                f"{found['bytes'] / 1e6:>9,.0f}{state:>10,.0f}",
                flush=True,
            )


def corpus_table(gigabytes: float, folder: Path):
    """Enlarge a store's training stream by zeros, which take no space, and open it."""
    config = RunConfig(output_dir=str(folder), run_name="scaling", device="cpu")
    store = open_store(find_start(config))
    print("\n  GB of tokens  hashing s  opening s  first batch ms  1,000th batch ms  resident MB")
    for size in sorted({0.01, 0.1, 1.0, gigabytes}):
        large = folder / f"store-{size}"
        shutil.copytree(store.folder, large)
        info = {key: v for key, v in read_json(large / "store.json").items() if key != "digest"}
        with open(large / STREAMS["training"], "r+b") as file:
            file.truncate(int(size * 1e9))
        info["training"]["tokens"] = int(size * 1e9) // np.dtype(info["dtype"]).itemsize
        (large / "store.json").unlink()
        began = time.perf_counter()
        write_info(large, {key: v for key, v in info.items() if key != "sha256"})
        hashed = time.perf_counter()
        resident = _resident()
        assert damage(large) == ""
        opened = TokenStore.open(config, large)
        times = [hashed, time.perf_counter()]
        for step in (1, 1000):
            opened.batch(step)
            times.append(time.perf_counter())
        print(
            f"{size:>14}{hashed - began:>11.2f}{times[1] - times[0]:>11.2f}"
            f"{(times[2] - times[1]) * 1e3:>16.1f}{(times[3] - times[2]) * 1e3:>18.1f}"
            f"{(_resident() - resident) / 1e6:>13,.0f}",
            flush=True,
        )
        opened.wait_until_verified()
        shutil.rmtree(large)


def _resident() -> int:
    """Return this process's memory in bytes, without pages of files (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def resume_table(folder: Path):
    print("\n     width  parameters  checkpoint MB  saving s  loading s  resuming s")
    for width in AXES["width"]:
        sizes = sized(**BASE | {"width": width, "vocabulary": 4096})
        changes = {"total_steps": resume.LAST, "checkpoint_every": resume.LAST}
        changes |= {"output_dir": str(folder), "run_name": f"resumed-{width}"}
        config = replace(sizes, **changes)
        saving = resume.time_save(config)
        checkpoint = config.run_dir / "checkpoints" / f"checkpoint_step_{resume.STEP}"
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        loading = resume.time_loading(RunConfig.recorded(config.run_dir), checkpoint)
        resuming = resume.time_resuming(config)
        count = parameter_count(LanguageModel(sizes))
        print(
            f"{width:>10}{count:>12,}{size / 1e6:>15,.0f}{saving:>10.2f}{loading:>11.2f}"
            f"{resuming:>12.2f}",
            flush=True,
        )
        shutil.rmtree(config.run_dir)


def records_table(folder: Path):
    """Read and draw runs of 10,000 records: 9,900 log lines and 100 evaluations."""
    runs = []
    for number in range(20):
        run = folder / f"run-{number}"
        run.mkdir()
        with open(run / "metrics.jsonl", "w") as file:
            for step in range(1, 9901):
                loss = 8 * step**-0.2 + 0.01 * math.sin(step * (number + 1))
                timing = {"seconds": step / 10, "tokens_per_second": 9000.0, "utilization": 0.5}
                record = {"kind": "step", "step": step, "loss": loss, "grad_norm": 0.5}
                file.write(json.dumps(record | {"learning_rate": 0.01, "timing": timing}) + "\n")
                if step % 99 == 0:
                    values = {"val_loss": loss + 0.1, "val_accuracy": 0.3, "val_perplexity": 9.0}
                    record = {"kind": "eval", "step": step, **values, "timing": timing}
                    file.write(json.dumps(record) + "\n")
        runs.append(run)
    print("\n  runs  records  reading s  table s  drawing s")
    for count in (1, 5, 20):
        times = [time.perf_counter()]
        frame = frames.read_runs(runs[:count])
        times.append(time.perf_counter())
        frames.results_table(frame)
        times.append(time.perf_counter())
        figures.training_curves(frame)
        times.append(time.perf_counter())
        seconds = [after - before for before, after in zip(times, times[1:], strict=False)]
        print(f"{count:>6}{len(frame):>9,}{seconds[0]:>11.2f}{seconds[1]:>9.2f}{seconds[2]:>11.2f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("step", "corpus", "resume", "records"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of the largest store")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_step(sized(**json.loads(options.one)), options.steps)))
        return
    with tempfile.TemporaryDirectory(dir=PROJECT_ROOT / "outputs") as name:
        folder = Path(name)
        for kind, table in {
            "step": lambda: step_tables(options.steps),
            "corpus": lambda: corpus_table(options.gigabytes, folder),
            "resume": lambda: resume_table(folder),
            "records": lambda: records_table(folder),
        }.items():
            if options.only in (None, kind):
                table()


if __name__ == "__main__":
    main()
