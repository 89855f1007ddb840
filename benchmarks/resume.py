"""What a checkpoint costs: how long saving holds up training, and how long going on takes, at step 9,000 of exp9's shape.

`python benchmarks/resume.py`; needs 8 GB of memory and 5 GB of disk. The text is Shakespeare's, so that no network is needed.
"""

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from lmlib import checkpoint, optim, training
from lmlib.config import RunConfig
from lmlib.files import PROJECT_ROOT, resolve_path, write_json
from lmlib.model import huggingface
from lmlib.model.transformer import LanguageModel
from lmlib.run.start import open_store

STEP = 9000


class FirstStep(Exception):
    """Training has come to its first step."""


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", default=str(PROJECT_ROOT / "params" / "exp9.yaml"))
    options.add_argument("--output-dir", default=str(PROJECT_ROOT / "outputs"))
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory(dir=resolve_path(arguments.output_dir)) as name:
        text = {"corpus": "shakespeare", "corpus_config": None, "tokenizer": "train", "validation_fraction": 0.1}
        config = RunConfig.load(arguments.recipe, **text, output_dir=name, run_name="resumed")
        store = open_store(config)
        config = replace(config, vocab_size=config.vocab_size or store.vocab_size)
        model = LanguageModel(config)
        optimizers = optim.build_optimizers(model, config)
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        for optimizer in optimizers:
            optimizer.step()  # makes its state
        config.run_dir.mkdir()
        write_json(config.run_dir / "config.json", config.to_dict())

        began = time.monotonic()
        checkpoint.Saver(background=False).save(
            config.run_dir,
            STEP,
            huggingface.model_tensors(model),
            optim.state_tensors(model, optimizers),
            config=config,
            tokenizer=store.tokenizer,
            val_loss=9.0,
            val_loss_step=STEP,
            scheduled=True,
            state={
                **{"metrics_size": 0, "timing": {}, "skipped": [], "recent_losses": []},
                **{"scores": {"val_loss": 9.0}, "scored": STEP},
            },
        )
        saving = time.monotonic() - began
        folder = config.run_dir / "checkpoints" / f"checkpoint_step_{STEP}"
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"Saving {size / 1e9:.2f} GB, flushed to disk: {saving:.1f} s.")
        del model, optimizers

        def first_step(*batch):
            raise FirstStep

        training.accumulate_gradients = first_step
        for _ in range(3):
            floor, whole = loading(config, folder), going_on(config)
            print(f"Verifying and loading weights and state: {floor:.2f} s. train() to its first step: {whole:.2f} s.")
        shutil.rmtree(config.run_dir)


def loading(config: RunConfig, folder: Path) -> float:
    """Seconds to verify and load weights and optimiser state and nothing else."""
    began = time.monotonic()
    checkpoint.verify_state(folder)
    model = huggingface.load_weights(folder, config)
    optim.load_state_tensors(model, optim.build_optimizers(model, config), checkpoint.read_optimizer(folder))
    return time.monotonic() - began


def going_on(config: RunConfig) -> float:
    """Seconds from calling train() to the first step's gradients, its batch drawn."""
    began = time.monotonic()
    try:
        list(training.train(config))
    except FirstStep:
        return time.monotonic() - began
    raise AssertionError("no step was made")


if __name__ == "__main__":
    main()
