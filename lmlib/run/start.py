"""Where a run starts, decided in one place: anew, from another model, or from its own checkpoint.

A finished run starts nowhere: training it again changes nothing.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lmlib import checkpoint, files, optim
from lmlib.config import RunConfig
from lmlib.data.prepare import prepare
from lmlib.data.tokenizer import load_tokenizer
from lmlib.data.tokens import TokenStore
from lmlib.model import huggingface
from lmlib.model.size import parameter_count
from lmlib.model.transformer import LanguageModel
from lmlib.run.device import pick_device, pick_dtype


@dataclass(frozen=True)
class Start:
    """How `train(config)` starts."""
    config: RunConfig  # with what it leaves open taken from the run's folder
    device: torch.device
    dtype: torch.dtype
    step: int  # updates made so far
    source: Path | None  # verified model folder with the weights; None: random weights
    resumes: bool  # the source is a checkpoint of this run, with its training state
    tokenizer: str | None  # folder of the tokenizer that the weights need; None: config.tokenizer
    results: dict[str, Any] | None  # results.json if the run is finished, else None
    steps: list[int]  # of the run's checkpoints when this was decided

    @property
    def parent(self) -> Path | None:
        """The model folder that a new run is initialized from, if any."""
        return None if self.resumes else self.source


def find_start(config: RunConfig) -> Start:
    """Decide how the run of `config` starts, reading its folder and its parent's; writes nothing.

    Raises a ValueError if the folder has a run with other parameters, no checkpoint is usable, the
    parent or its tokenizer does not fit, or the device is not there.
    """
    config, device = merge_recorded(config), pick_device(config.device)
    run_dir, steps = config.run_dir, checkpoint.checkpoint_steps(config.run_dir)
    results, step, source = finished_results(config), 0, None
    if results:
        step = config.total_steps
    elif steps:
        source = checkpoint.newest_good(run_dir, with_state=True, run=config.key())
        step = checkpoint.read_state(source)["step"]
    elif (run_dir / "results.json").exists():
        raise ValueError(f"{run_dir} is a finished run whose checkpoints are gone, so it cannot "
                         "resume: choose another run_name.")
    elif config.init_from:
        config, source, step = _start_from_parent(config)
    if step > config.total_steps:
        raise ValueError(f"{source} is at step {step}, beyond total_steps {config.total_steps}.")
    return Start(config, device, pick_dtype(config.dtype, device), step, source,
                 resumes=bool(steps) and not results,
                 tokenizer=str(source) if source and config.init_from else None,
                 results=results, steps=steps)


def finished_results(config: RunConfig) -> dict[str, Any] | None:
    """Return results.json if the run in the folder has made all the steps of `config`."""
    results = files.read_json(config.run_dir / "results.json")
    is_finished = isinstance(results, dict) and results.get("total_steps") == config.total_steps
    return results if is_finished else None


def merge_recorded(config: RunConfig) -> RunConfig:
    """Fill in what `config` leaves open from the run in its folder, if there is one.

    Raises a ValueError that names each parameter in which that run differs, with both values.
    """
    recorded = files.read_json(config.run_dir / "config.json")
    if recorded is None:
        return config
    for name in ("vocab_size", "init_step"):
        if getattr(config, name) is None and recorded.get(name) is not None:
            config = replace(config, **{name: recorded[name]})
    recorded = {**RunConfig().to_dict(), **recorded}  # parameters newer than the run: defaults
    different = [f"{name} is {value!r} and was {recorded[name]!r}"
                 for name, value in config.fixed_parameters().items() if value != recorded[name]]
    if config.total_steps < recorded["total_steps"]:
        different.append(f"total_steps is {config.total_steps} and was "
                         f"{recorded['total_steps']}; it may only grow")
    if different:
        lines = "\n  - ".join([f"{config.run_dir} has a run with other parameters:", *different])
        raise ValueError(f"{lines}\nChoose another run_name, or set these to the values they had.")
    return config


def _start_from_parent(config: RunConfig) -> tuple[RunConfig, Path, int]:
    """Return the config with its `init_step`, the model folder to start from, and the step."""
    source = checkpoint.find_checkpoint(config.init_from, config.init_step)
    if config.tokenizer != "train":
        asked, known = load_tokenizer(config.tokenizer), load_tokenizer(str(source))
        if asked.get_vocab() != known.get_vocab():
            raise ValueError(
                f"The tokenizer {config.tokenizer} is not the one that {config.init_from} was "
                "trained with; leave `tokenizer` at 'train' to use that one.")
    if source != files.resolve_path(config.init_from):  # a run, of which a step was chosen
        manifest = files.read_mapping(source / "checkpoint.json")
        config = replace(config, init_step=manifest["step"])
    if config.init_state == "weights":
        return config, source, 0
    if not (source / "training_state").exists():
        raise ValueError(f"{source} has no training state any more (only the newest "
                         f"{checkpoint.STATES_KEPT} checkpoints of a run keep theirs), so its "
                         "optimizer cannot resume; use init_state: weights.")
    return config, source, checkpoint.verify_state(source)["step"]


def open_store(start: Start) -> TokenStore:
    """Return the run's tokens, preparing them if no run before has."""
    config, tokenizer = start.config, start.tokenizer
    if start.results and config.init_from:  # finished: its checkpoints have the parent's tokenizer
        own = checkpoint.newest_good(config.run_dir)
        tokenizer = str(own or checkpoint.find_checkpoint(config.init_from, config.init_step))
    with files.os_errors_as_value_errors(config.run_dir):
        return prepare(config, tokenizer=tokenizer)


def build_model(config: RunConfig, source: Path | None) -> LanguageModel:
    """Return a model with random weights, or with those in `source`, whose shape must be equal."""
    if source is None:
        return LanguageModel(config)
    theirs = huggingface.read_config(source)
    if different := [f"{name} to {getattr(theirs, name)!r}" for name in config.model_parameters()
                     if getattr(theirs, name) != getattr(config, name)]:
        raise ValueError(f"The model in {source} has another shape. To start from it, set "
                         f"{', '.join(different)}.")
    return huggingface.load_weights(source, config)


def disk_needed(config: RunConfig, model: LanguageModel,
                optimizers: list[torch.optim.Optimizer], step: int) -> int:
    """Return the bytes that the checkpoints of a run will take from `step` on."""
    count = math.ceil((config.total_steps - step) / config.checkpoint_every)
    tokenizer = 1_000_000  # roughly
    each = sum(tensor.nbytes for tensor in huggingface.model_tensors(model).values()) + tokenizer
    states = min(count, checkpoint.STATES_KEPT + 1)  # one is being written
    return count * each + states * optim.state_bytes(optimizers)


def greeting(start: Start) -> str:
    """Say in one line what `train(config)` is about to do."""
    config, folder = start.config, files.display_path(start.config.run_dir)
    if start.results:
        return f"{folder} is finished: {config.total_steps} steps. To continue, raise total_steps."
    if start.resumes:
        line = f"Resuming from step {start.step} of {config.total_steps} in {folder}."
        ended = (files.read_json(config.run_dir / "config.json") or {}).get("total_steps", math.inf)
        if ended < config.total_steps:
            line += f" The cosine that ended at step {ended} is stretched to the new end."
        return line
    line = f"A new run of {config.total_steps} steps in {folder}."
    if config.vocab_size is not None:
        with torch.device("meta"):
            model = LanguageModel(config)
        needed = disk_needed(config, model, optim.build_optimizers(model, config), start.step)
        line += f" {parameter_count(model):,} parameters; checkpoints: {needed / 1e9:.2g} GB."
    return line
