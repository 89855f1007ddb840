"""How often the forecast's 90 % intervals contain the end of a run.

    python benchmarks/forecast.py [--runs 80] [--keep FOLDER] [RUN ...]

Trains small runs of many kinds, drawn at random: widths, depths, vocabularies, schedules, rates,
lengths, two corpora and training texts short enough to be overfitted. Then it forecasts each from
its records up to 30, 50, 70 and 90 % of the steps. Given RUNs are taken instead. The prior in
`analysis/forecasting.py` was set by the first 40; the others, and any RUN, test it.
"""

import argparse
import random
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from lmlib.analysis import frames
from lmlib.analysis.forecasting import EARLIEST, forecast_from
from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.files import PROJECT_ROOT
from lmlib.training import train

SET_BY = 40  # runs that set the prior


def draw(number: int, folder: Path) -> RunConfig:
    """Draw a run's parameters from its number."""
    pick = random.Random(number).choice
    steps, is_muon = pick([100, 150, 200, 300, 400, 600, 800]), pick([True, True, False])
    return RunConfig(
        run_name=f"run-{number}",
        output_dir=str(folder),
        seed=number,
        corpus=pick(["shakespeare", "shakespeare", str(folder / "code.txt")]),
        max_tokens=pick([None, None, None, 50_000]),
        vocab_size=pick([512, 1024, 2048]),
        sequence_length=pick([32, 64, 128]),
        batch_size=pick([4, 8, 16]),
        hidden_size=(width := pick([32, 48, 64, 96, 128])),
        intermediate_size=2 * width,
        num_hidden_layers=pick([1, 2, 3]),
        num_attention_heads=2,
        attention=pick(["mla", "mha"]),
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        optimizer="muon" if is_muon else "adamw",
        learning_rate=pick([0.5, 1, 2]) * (0.01 if is_muon else 0.004),
        muon_learning_rate=pick([0.01, 0.02, 0.03]),
        warmup_ratio=pick([0.02, 0.05, 0.1]),
        decay_ratio=pick([0, 0.2, 0.6, 0.6, 1.0]),
        dropout=pick([0, 0, 0.1]),
        validation_windows=pick([32, 64, 128]),
        test_fraction=0.0,
        total_steps=steps,
        log_every=max(1, steps // pick([30, 100])),
        eval_every=max(1, steps // pick([10, 20, 50])),
        checkpoint_every=steps,
        device="cpu",
    )


def coverage(run_dirs: list[Path], fraction: float) -> str:
    """Forecast runs from a fraction of their steps; returns a row of the table."""
    inside, errors, widths = [], [], []
    for run_dir in run_dirs:
        frame = frames.read_runs(run_dir)
        total = RunConfig.recorded(run_dir).total_steps
        ends = frame.loc[(frame["kind"] == "eval") & (frame["step"] == total), "val_loss"]
        # A log line may come shortly before the fraction, where no forecast is made.
        until = np.ceil(fraction * total) if fraction > EARLIEST else (fraction + 0.04) * total
        expected = forecast_from(frame[frame["step"] <= until], run_dir)
        if expected is None or not len(ends):
            continue
        end = ends.iloc[-1]
        inside.append(expected.low <= end <= expected.high)
        errors.append(expected.loss / end - 1)
        widths.append((expected.high - expected.low) / 2 / end)
    error = np.sqrt(np.mean(np.square(errors)))
    return (
        f"{fraction:>6.0%}{len(inside):>8}{np.mean(inside):>12.1%}{np.mean(widths):>14.1%}"
        f"{error:>10.1%}"
    )


def table(name: str, run_dirs: list[Path]):
    if run_dirs:
        print(f"\n{name}\n steps    runs   contained    half width  error (rms)")
        for fraction in (0.3, 0.5, 0.7, 0.9):
            print(coverage(run_dirs, fraction), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="*", type=Path)
    parser.add_argument("--runs", type=int, default=80)
    parser.add_argument("--keep", type=Path, help="train the runs in this folder and keep them")
    options = parser.parse_args()
    if options.run:
        table("given runs", options.run)
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=PROJECT_ROOT / "outputs") as name:
        folder = (options.keep or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        sources = sorted((PROJECT_ROOT / "lmlib").rglob("*.py"))
        (folder / "code.txt").write_text("\n\n".join(file.read_text() for file in sources))
        found = []
        for number in range(options.runs):
            try:
                config = draw(number, folder)
                list(train(config))
            except UserError as error:  # such as too little text for so many windows
                print(f"run {number} cannot be trained: {error}")
                continue
            shutil.rmtree(config.run_dir / "checkpoints")
            found.append((number, config.run_dir))
        table("runs that set the prior", [folder for n, folder in found if n < SET_BY])
        table("other runs", [folder for n, folder in found if n >= SET_BY])


if __name__ == "__main__":
    main()
