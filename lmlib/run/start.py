"""Where a run starts, decided in one place: anew, from another model, or from its own checkpoint.

A finished run starts nowhere: training it again changes nothing.
"""

import math
import textwrap
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lmlib import checkpoint, distributed, files, optim
from lmlib.config import ABSENT, RunConfig, unused_parameters
from lmlib.data.prepare import prepare
from lmlib.data.tokenizer import load_tokenizer, tokenizer_identity
from lmlib.data.tokens import TokenStore
from lmlib.errors import Stopped, UserError
from lmlib.model import huggingface
from lmlib.model.size import parameter_count
from lmlib.model.transformer import LanguageModel
from lmlib.run.device import pick_device, pick_dtype
from lmlib.text import printable


@dataclass(frozen=True)
class Start:
    """How `train(config)` starts."""
    config: RunConfig  # with what it leaves open taken from the run's folder
    device: torch.device
    dtype: torch.dtype
    step: int  # updates made so far
    source: Path | None  # verified model folder with the weights; None: random weights
    resumes: bool  # the source is a checkpoint of this run, with its training state
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
        _check_sources(config, source)
    elif (run_dir / "results.json").exists():
        raise UserError(f"{run_dir} is a finished run whose checkpoints are gone, so it cannot "
                        "resume: choose another run_name.")
    elif config.init_from:
        config, source, step = _start_from_parent(config)
    if step > config.total_steps:
        raise UserError(
            f"{source} is at step {step}, beyond total_steps {config.total_steps}. "
            f"Set total_steps to {step}, to finish there, or to more.")
    return Start(config, device, pick_dtype(config.dtype, device), step, source,
                 resumes=bool(steps) and not results, results=results, steps=steps)


def finished_results(config: RunConfig) -> dict[str, Any] | None:
    """Return results.json if the run in the folder has made all the steps of `config`."""
    results = files.read_json(config.run_dir / "results.json")
    is_finished = isinstance(results, dict) and results.get("total_steps") == config.total_steps
    return results if is_finished else None


def merge_recorded(config: RunConfig) -> RunConfig:
    """Fill in what `config` leaves open from the run in its folder, if that has a checkpoint.

    Raises a ValueError that names each parameter in which that run differs, with both values.
    """
    run_dir = config.run_dir
    if not (checkpoint.checkpoint_steps(run_dir) or (run_dir / "results.json").exists()):
        return config  # before the first checkpoint anything may change
    recorded = files.read_json(run_dir / "config.json")
    if recorded is None:
        return config  # its checkpoints know which run they belong to
    if not isinstance(recorded, dict):
        raise UserError(f"{run_dir}/config.json holds no parameters: restore it, or choose "
                        "another run_name.")
    for name, left_open in (("vocab_size", [None]), ("init_step", [None, "best"])):
        if getattr(config, name) in left_open and recorded.get(name) is not None:
            config = replace(config, **{name: recorded[name]})
    recorded = {**RunConfig().to_dict(), **ABSENT, **recorded}
    different = {name: value for name, value in config.fixed_parameters().items()
                 if value != recorded[name]}
    # A path may change, as its content is compared; whether there is one may not.
    given = {"tokenizer": "train", "validation_corpus": None, "init_from": None}
    different |= {name: getattr(config, name) for name, none in given.items()
                  if (getattr(config, name) == none) != (recorded[name] == none)}
    if different:
        lines = "\n  - ".join([
            f"{run_dir} has a run with other parameters:",
            *(f"{name} is {value!r} and was {recorded[name]!r}"
              for name, value in different.items())])
        raise UserError(f"{lines}\nChoose another run_name, or set these to the values they had.")
    return config


def _check_sources(config: RunConfig, source: Path):
    """Raise a ValueError if a path names another tokenizer or parent than the run had.

    `source` is the checkpoint that it resumes from. A parent that is not here any more is fine.
    """
    run_dir, parent = config.run_dir, config.init_from
    recorded = files.read_mapping(run_dir / "config.json")
    if config.tokenizer not in ("train", recorded.get("tokenizer")):
        theirs = tokenizer_identity(load_tokenizer(str(source)))
        if tokenizer_identity(load_tokenizer(config.tokenizer)) != theirs:
            raise UserError(f"The tokenizer {config.tokenizer} is not the one that {run_dir} was "
                            f"trained with, {recorded.get('tokenizer')}: choose another run_name.")
    was = files.read_mapping(run_dir / "environment.json").get("init_weights")
    moved = parent and parent != recorded.get("init_from") and files.resolve_path(parent).exists()
    if was and moved and weights_hash(checkpoint.find_checkpoint(parent, config.init_step)) != was:
        raise UserError(f"init_from {parent} is not the model that {run_dir} was started from, "
                        f"{recorded.get('init_from')}: choose another run_name.")


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of a model folder's weights, or of their index if they are in shards."""
    listed = files.read_mapping(folder / "checkpoint.json").get("files", {})
    if "model.safetensors" in listed:
        return listed["model.safetensors"]["sha256"]
    single = folder / "model.safetensors"
    return files.file_sha256(single if single.exists() else folder / f"{single.name}.index.json")


def _start_from_parent(config: RunConfig) -> tuple[RunConfig, Path, int]:
    """Return the config with its `init_step`, the model folder to start from, and the step."""
    source = checkpoint.find_checkpoint(config.init_from, config.init_step)
    if config.tokenizer != "train":
        asked, known = load_tokenizer(config.tokenizer), load_tokenizer(str(source))
        if asked.get_vocab() != known.get_vocab():
            raise UserError(
                f"The tokenizer {config.tokenizer} is not the one that {config.init_from} was "
                "trained with; leave `tokenizer` at 'train' to use that one.")
    if source != files.resolve_path(config.init_from):  # a run, of which a step was chosen
        manifest = files.read_mapping(source / "checkpoint.json")
        config = replace(config, init_step=manifest["step"])
    if config.init_state == "weights":
        return config, source, 0
    if not (source / "training_state").exists():
        raise UserError(f"{source} has no training state any more (only the newest "
                        f"{checkpoint.STATES_KEPT} checkpoints of a run keep theirs), so its "
                        "optimizer cannot resume; use init_state: weights.")
    return config, source, checkpoint.verify_state(source)["step"]


def open_store(start: Start) -> TokenStore:
    """Return the run's tokens, preparing them if no run before has; Ctrl-C raises `Stopped`."""
    config, source = start.config, start.source
    if start.results:
        source = checkpoint.newest_good(config.run_dir) or source
    try:
        with files.os_errors_as_value_errors(config.run_dir):
            return prepare(config, tokenizer=str(source) if source else None)
    except KeyboardInterrupt:
        raise Stopped("Stopped while the text was being prepared, before the first step. Nothing "
                      "was trained; the same command continues.") from None


def build_model(config: RunConfig, source: Path | None) -> LanguageModel:
    """Return a model with random weights, or with those in `source`, whose shape must be equal."""
    if source is None:
        return LanguageModel(config)
    theirs = huggingface.read_config(source)
    if different := [f"{name} to {getattr(theirs, name)!r}" for name in config.model_parameters()
                     if getattr(theirs, name) != getattr(config, name)]:
        raise UserError(f"The model in {source} has another shape. To start from it, set "
                        f"{', '.join(different)}.")
    return huggingface.load_weights(source, config)


def disk_needed(config: RunConfig, model: LanguageModel,
                optimizers: list[torch.optim.Optimizer], step: int) -> int:
    """Return the bytes that the checkpoints of a run will take from `step` on."""
    count = math.ceil((config.total_steps - step) / config.checkpoint_every)
    if config.keep_checkpoints:
        count = min(count, config.keep_checkpoints + 2)  # the best, and one being written
    tokenizer = 1_000_000  # roughly
    each = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + tokenizer
    states = min(count, checkpoint.STATES_KEPT + 1)  # one is being written
    return count * each + states * optim.state_bytes(optimizers)


def greeting(start: Start, recipe: str | Path | None = None) -> str:
    """Say what `train(config)` is about to do, and how it differs from its recipe and defaults."""
    return "\n".join([_plan(start), *_processes(start), *_differences(start.config, recipe)])


def _differences(config: RunConfig, recipe: str | Path | None) -> list[str]:
    """Name the parameters in use that differ from the recipe's, and from the defaults."""
    values, defaults, lines = config.to_dict(), RunConfig().to_dict(), []
    unused = unused_parameters(config.attention, config.feed_forward)
    for name in {"run_name", "output_dir", *unused}:
        del values[name]
    theirs = values
    if recipe:
        with suppress(UserError):  # it may be valid only with what was added to it
            theirs = RunConfig.load(recipe).to_dict()
        changed = [f"{name}\xa0{_value(value)}\xa0(recipe:\xa0{_value(theirs[name])})"
                   for name, value in values.items() if value != theirs[name]]
        name = printable(files.display_path(files.resolve_path(recipe).absolute()))
        lines.append(f"Recipe {name}, "
                     + (f"changed: {', '.join(changed)}." if changed else "unchanged."))
    unlike = [name for name in values if values[name] != defaults[name]]
    if any(theirs[name] != defaults[name] for name in values):  # else the same list again
        listed = ", ".join(f"{name}\xa0{_value(values[name])}" for name in unlike)
        lines.append(f"Unlike the defaults: {listed or 'nothing'}.")
    return [line.replace("\xa0", " ") for text in lines  # which has kept each item on one line
            for line in textwrap.wrap(text, 100, subsequent_indent="  ")]


def _value(value: Any) -> str:
    return "null" if value is None else printable(str(value))


def _processes(start: Start) -> list[str]:
    """Say what trains, if there are several processes or CUDA devices."""
    count = torch.cuda.device_count() if start.device.type == "cuda" else 0
    processes = distributed.world_size() if distributed.is_worker() else start.config.processes
    if start.results or (processes == 1 and count < 2):
        return []
    if processes == 1:
        return [f"One of the {count} CUDA devices trains; see the parameter processes."]
    where = "each on a CUDA device of its own" if count else "all on the CPU"
    divided = "; they divide the model" if start.config.sharding == "full" else ""
    return [f"{processes} processes train, {where}{divided}."]


def _plan(start: Start) -> str:
    """Say in one line what `train(config)` is about to do."""
    config, folder = start.config, files.display_path(start.config.run_dir)
    if start.results:
        return f"{folder} is finished: {config.total_steps} steps. To continue, raise total_steps."
    if start.resumes:
        line = f"Resuming from step {start.step} of {config.total_steps} in {folder}."
        ended = files.read_mapping(config.run_dir / "config.json").get("total_steps")
        if ended not in (None, config.total_steps):
            verb = "stretched" if ended < config.total_steps else "shortened"
            line += f" The learning-rate schedule, which ended at step {ended}, is {verb} to it."
            rates = [config.learning_rate
                     * optim.schedule(step, total, config.warmup_ratio, config.decay_ratio)
                     for step, total in ((start.step, ended), (start.step + 1, config.total_steps))]
            if start.step < config.total_steps and not 0.9 < rates[1] / rates[0] < 1.1:
                line += f" With its next step the rate jumps from {rates[0]:.2g} to {rates[1]:.2g}."
        return line
    line = f"A new run of {config.total_steps} steps in {folder}."
    if config.vocab_size is not None:
        with torch.device("meta"):
            model = LanguageModel(config)
        needed = disk_needed(config, model, optim.build_optimizers(model, config), start.step)
        line += f" {parameter_count(model):,} parameters; checkpoints: {needed / 1e9:.2g} GB."
    return line
