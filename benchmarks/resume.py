"""Time saving and resuming at step 9,000 of a recipe: what a checkpoint costs.

    python benchmarks/resume.py [--recipe params/exp9.yaml]

exp9 needs 8 GB of memory and 5 GB of disk. The text is Shakespeare's, so no network is needed.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from unittest import mock

from lmlib import checkpoint, optim, training
from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT, resolve_path
from lmlib.model import huggingface
from lmlib.run.prepare import prepare, record_start
from lmlib.run.start import find_start

STEP, LAST = 9000, 10_000


class FirstStep(Exception):
    """Training has reached its first step."""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default=str(PROJECT_ROOT / "params" / "exp9.yaml"))
    parser.add_argument("--output-dir", default=str(PROJECT_ROOT / "outputs"))
    options = parser.parse_args()
    resolve_path(options.output_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=resolve_path(options.output_dir)) as output_dir:
        config = RunConfig.load(
            options.recipe,
            corpus="shakespeare",
            corpus_config=None,
            tokenizer="train",
            validation_fraction=0.1,
            total_steps=LAST,
            checkpoint_every=LAST,
            output_dir=output_dir,
            run_name="resumed",
        )
        seconds = time_save(config)
        recorded = RunConfig.recorded(config.run_dir)  # with the vocabulary's size filled in
        folder = config.run_dir / "checkpoints" / f"checkpoint_step_{STEP}"
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"Saving {size / 1e9:.2f} GB, flushed to disk: {seconds:.1f} s.")

        for _ in range(3):
            loading, resuming = time_loading(recorded, folder), time_resuming(config)
            print(
                f"Verifying and loading weights and state: {loading:.2f} s. "
                f"train() to its first step: {resuming:.2f} s."
            )
        shutil.rmtree(config.run_dir)


def time_save(config: RunConfig) -> float:
    """Start a run and save it as if at step STEP; returns the seconds that saving took."""
    run = prepare(find_start(config))
    record_start(run)
    for parameter in run.model.parameters():
        parameter.grad = parameter.detach().clone()
    for optimizer in run.optimizers:
        optimizer.step()  # creates the optimizer's state
    run.progress.step = run.progress.scored = STEP
    run.progress.scores = {"val_loss": 9.0}
    began = time.monotonic()
    training.save(run, scheduled=True)
    run.saver.wait()
    seconds = time.monotonic() - began
    run.metrics.close()
    return seconds


def time_loading(config: RunConfig, folder: Path) -> float:
    """Return the seconds to verify and load weights and optimizer state, and nothing else."""
    began = time.monotonic()
    checkpoint.verify_state(folder)
    model = huggingface.load_weights(folder, config)
    optimizers = optim.build_optimizers(model, config)
    optim.load_state_tensors(model, optimizers, checkpoint.read_optimizer(folder))
    return time.monotonic() - began


def time_resuming(config: RunConfig) -> float:
    """Return the seconds from calling train() to its first step, the batch included."""

    def first_step(*batch):
        raise FirstStep

    began = time.monotonic()
    try:
        with mock.patch.object(training, "accumulate_gradients", first_step):
            list(training.train(config))
    except FirstStep:
        return time.monotonic() - began
    raise AssertionError("no step was made")


if __name__ == "__main__":
    main()
