"""A run of transformers' Trainer like lmlib's, for survival.py to kill and corrupt as well."""

import hashlib
import json
from pathlib import Path

import torch
import transformers
from transformers import trainer_callback
from transformers.trainer_utils import get_last_checkpoint

STEPS, SAVE_EVERY = 60, 6
FILES = [
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
]
# The functions that a save writes with: (holder, name)
WRITES = [
    (transformers.modeling_utils, "safe_save_file"),
    (transformers.PreTrainedConfig, "save_pretrained"),
    (transformers.GenerationConfig, "save_pretrained"),
    (transformers.PreTrainedTokenizerBase, "save_pretrained"),
    (torch, "save"),
    (trainer_callback.TrainerState, "save_to_json"),
]


class Windows(torch.utils.data.Dataset):
    """Windows of tokens, (T,) each, as input and labels."""

    def __init__(self, tokens: torch.Tensor, length: int):
        self.windows = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class StopAfterSave(transformers.TrainerCallback):
    """End training after the save at a step."""

    def __init__(self, stop_at: int | None):
        self.stop_at = stop_at

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.stop_at
        return control


def run(folder: Path, plan: dict):
    """Train, or resume from the newest checkpoint as transformers' documentation says.

    Like lmlib's run, it has dropout, gradient accumulation and evaluations between checkpoints.

    Args:
        folder: of the run. Beside it, `model` is a checkpoint of lmlib whose shape and tokenizer
            the run takes.
        plan: may hold "stop_at", the step whose save ends training, and "nan_at", the step whose
            loss is made NaN.
    """
    model_folder, stop_at, nan_at = folder.parent / "model", plan.get("stop_at"), plan.get("nan_at")
    transformers.logging.set_verbosity_warning()
    transformers.set_seed(0)
    settings = transformers.AutoConfig.from_pretrained(model_folder, attention_dropout=0.1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    tokens = torch.randint(0, len(tokenizer), (9000,), generator=torch.Generator().manual_seed(0))
    model = transformers.AutoModelForCausalLM.from_config(settings)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        save_steps=SAVE_EVERY,
        eval_strategy="steps",
        eval_steps=7,
        logging_steps=1,
        save_total_limit=2 if nan_at else None,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=Windows(tokens, 32),
        eval_dataset=Windows(tokens[:320], 32),
        data_collator=transformers.default_data_collator,
        processing_class=tokenizer,
        callbacks=[StopAfterSave(stop_at)],
    )
    if nan_at:
        real = trainer.compute_loss

        def compute_loss(*args, **kwargs):
            loss = real(*args, **kwargs)
            return loss * float("nan") if trainer.state.global_step == nan_at - 1 else loss

        trainer.compute_loss = compute_loss
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=newest)


def fingerprint(folder: Path) -> tuple:
    """Return hashes of the last checkpoint's weights and optimizer state, and the untimed log."""
    last = folder / f"checkpoint-{STEPS}"
    hashes = [hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()]
    state = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    for moments in state.values():
        hashes += [
            hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in moments.values()
        ]
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second")
    return hashes, [{k: v for k, v in line.items() if not k.endswith(timed)} for line in log]
