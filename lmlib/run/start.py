"""Where a run starts."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lmlib import checkpoint, optim
from lmlib.config import RunConfig
from lmlib.data.prepare import prepare
from lmlib.data.tokenizer import load_tokenizer
from lmlib.data.tokens import TokenStore
from lmlib.files import display_path, os_errors_as_value_errors, read_json, resolve_path
from lmlib.model import huggingface
from lmlib.model.size import parameter_count
from lmlib.model.transformer import LanguageModel


def merge_recorded(config: RunConfig) -> RunConfig:
    """`config`, with what it leaves open taken from the run that stands in its folder, if one does.

    Raises:
        ValueError: that run was made with other parameters; each is named with both values.
    """
    recorded = read_json(config.run_dir / "config.json")
    if recorded is None:
        return config
    for name in ("vocab_size", "init_step"):
        if getattr(config, name) is None and recorded.get(name) is not None:
            config = replace(config, **{name: recorded[name]})
    recorded = {**RunConfig().to_dict(), **recorded}  # a parameter that came later had its default
    different = [
        f"{name} is {value!r} and was {recorded[name]!r}" for name, value in config.fixed_parameters().items() if value != recorded[name]
    ]
    if config.total_steps < recorded["total_steps"]:
        different.append(f"total_steps is {config.total_steps} and was {recorded['total_steps']}; it may only grow")
    if different:
        raise ValueError(
            f"{config.run_dir} holds a run made with other parameters:\n"
            + "\n".join(f"  - {line}" for line in different)
            + "\nChoose another run_name, or give these the values they had."
        )
    return config


def finished_results(config: RunConfig) -> dict[str, Any] | None:
    """results.json, if the run in the folder has made all the steps that are asked for."""
    results = read_json(config.run_dir / "results.json")
    return results if isinstance(results, dict) and results.get("total_steps") == config.total_steps else None


def build_model(config: RunConfig, source: Path | None) -> LanguageModel:
    """Random weights by the seed, or those of a checkpoint, whose shape must be this run's."""
    if source is None:
        return LanguageModel(config)
    theirs = huggingface.config_of(source)
    names = config.model_parameters()
    different = [f"{name} to {getattr(theirs, name)!r}" for name in names if getattr(theirs, name) != getattr(config, name)]
    if different:
        raise ValueError(f"The model in {source} has another shape. To start from it, set {', '.join(different)}.")
    return huggingface.load_weights(source, config)


def parent_of(config: RunConfig) -> Path | None:
    """The model folder that the run starts from; None for random weights and for a run that has a checkpoint."""
    if checkpoint.checkpoint_steps(config.run_dir):
        return None
    return checkpoint.find_checkpoint(config.init_from, config.init_step) if config.init_from else None


def open_store(config: RunConfig) -> TokenStore:
    """The tokens that a run trains and is judged on, in its own tokenizer or, with `init_from`, in its parent's."""
    with os_errors_as_value_errors(config.run_dir):
        own = checkpoint.newest_good(config.run_dir) if config.init_from else None
        return prepare(config, tokenizer=str(own) if own else tokenizer_of(config, parent_of(config)))


def greeting(config: RunConfig) -> str:
    """What `train(config)` is about to do, in a line; ValueError if the folder holds another run."""
    config = merge_recorded(config)
    folder, recorded = display_path(config.run_dir), read_json(config.run_dir / "config.json")
    steps = checkpoint.checkpoint_steps(config.run_dir)
    if finished_results(config):
        return f"{folder} is finished: {config.total_steps} steps. To go on, raise total_steps."
    if not steps:
        line = f"A new run of {config.total_steps} steps in {folder}."
        if config.vocab_size is not None:
            with torch.device("meta"):
                model = LanguageModel(config)
            needed = disk_needed(config, model, optim.build_optimizers(model, config), 0)
            line += f" {parameter_count(model):,} parameters; its checkpoints will take {needed / 1e9:.2g} GB."
        return line
    line = f"Going on after step {steps[-1]} of {config.total_steps} in {folder}."
    if recorded and recorded["total_steps"] < config.total_steps:
        line += f" The cosine that was to end at step {recorded['total_steps']} is stretched to the new end."
    return line


def tokenizer_of(config: RunConfig, parent: Path | None) -> str | None:
    """The folder whose tokenizer a run must use because its weights were trained with it.

    Raises:
        ValueError: another tokenizer was asked for.
    """
    if parent is None:
        return None
    if config.tokenizer != "train":
        asked, known = load_tokenizer(config.tokenizer), load_tokenizer(str(parent))
        if asked.get_vocab() != known.get_vocab():
            raise ValueError(
                f"The tokenizer {config.tokenizer} is not the one that {config.init_from} was trained with; "
                "leave `tokenizer` at 'train' to use that one."
            )
    return str(parent)


def disk_needed(config: RunConfig, model: LanguageModel, optimizers: list[torch.optim.Optimizer], step: int) -> int:
    """Bytes that the checkpoints of a run will take from `step` on."""
    count = math.ceil((config.total_steps - step) / config.checkpoint_every)
    return checkpoint.disk_needed(huggingface.model_tensors(model), optim.state_bytes(optimizers), count)


def step_of(config: RunConfig, parent: Path | None) -> int | None:
    """The step of its parent run that a run starts from, if `init_from` names a run and not one model."""
    if parent is None or parent == resolve_path(config.init_from):
        return config.init_step
    return checkpoint.verify(parent)["step"]
