"""Around the loop: device, starting weights and tokenizer, what is written down first, and how a run is stopped."""

import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lmlib import checkpoint, data, optim, pretrained, run_folder
from lmlib.config import LEAKY, RunConfig, resolve_path, shown
from lmlib.model import LanguageModel, active_parameter_count, flops_per_token, parameter_count


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, and torch finds {torch.cuda.device_count()} CUDA devices here.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def build_model(config: RunConfig, source: Path | None) -> LanguageModel:
    """Random weights by the seed, or those of a checkpoint, whose shape must be this run's."""
    if source is None:
        return LanguageModel(config)
    theirs = pretrained.config_of(source)
    names = ["attention", "feed_forward", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
    names += ["attention_bias", "tie_word_embeddings", "rope_theta", "causal_mask"]
    names += sorted(run_folder.ONLY_MLA) if config.attention == "mla" else []
    names += sorted(run_folder.ONLY_MOE) if config.feed_forward == "moe" else ["intermediate_size"]
    different = [f"{name} to {getattr(theirs, name)!r}" for name in names if getattr(theirs, name) != getattr(config, name)]
    if different:
        raise ValueError(f"The model in {source} has another shape. To start from it, set {', '.join(different)}.")
    return pretrained.load_weights(source, config)


def parent_of(config: RunConfig) -> Path | None:
    """The model folder that the run starts from; None for random weights and for a run that has a checkpoint."""
    if checkpoint.checkpoint_steps(config.run_dir):
        return None
    return checkpoint.find_checkpoint(config.init_from, config.init_step) if config.init_from else None


def open_store(config: RunConfig) -> data.TokenStore:
    """The tokens that a run trains and is judged on, in its own tokenizer or, with `init_from`, in its parent's."""
    with one_sentence(config.run_dir):
        own = checkpoint.newest_good(config.run_dir) if config.init_from else None
        return data.prepare(config, tokenizer=str(own) if own else tokenizer_of(config, parent_of(config)))


def greeting(config: RunConfig) -> str:
    """What `train(config)` is about to do, in a line; ValueError if the folder holds another run."""
    config = run_folder.continued(config)
    folder, recorded = shown(config.run_dir), run_folder.read_json(config.run_dir / "config.json")
    steps = checkpoint.checkpoint_steps(config.run_dir)
    if run_folder.finished(config):
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
        asked, known = data.load_tokenizer(config.tokenizer), data.load_tokenizer(str(parent))
        if asked.get_vocab() != known.get_vocab():
            raise ValueError(
                f"The tokenizer {config.tokenizer} is not the one that {config.init_from} was trained with; "
                "leave `tokenizer` at 'train' to use that one."
            )
    return str(parent)


def disk_needed(config: RunConfig, model: LanguageModel, optimizers: list[torch.optim.Optimizer], step: int) -> int:
    """Bytes that the checkpoints of a run will take from `step` on."""
    count = math.ceil((config.total_steps - step) / config.checkpoint_every)
    return checkpoint.disk_needed(pretrained.model_tensors(model), optim.state_bytes(optimizers), count)


def step_of(config: RunConfig, parent: Path | None) -> int | None:
    """The step of its parent run that a run starts from, if `init_from` names a run and not one model."""
    if parent is None or parent == resolve_path(config.init_from):
        return config.init_step
    return checkpoint.verify(parent)["step"]


def record_environment(
    config: RunConfig,
    store: data.TokenStore,
    model: LanguageModel,
    device: torch.device,
    step: int,
    parent: Path | None,
    audited: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write config.json and environment.json, and return the latter; when going on, warn of what makes that inexact.

    Args:
        audited: what the audit found before step 1; None keeps what it found when the run began.
    """
    run_dir = config.run_dir
    now, before = run_folder.environment(store, device), run_folder.read_json(run_dir / "environment.json")
    if before:
        for change in run_folder.changes(before, now):
            warnings.warn(f"Going on may not be bit for bit: {change}.", stacklevel=2)
    now["init_from"] = str(parent) if parent else (before or {}).get("init_from")
    now["model"] = {
        "parameter_count": parameter_count(model),
        "active_parameter_count": active_parameter_count(model),
        "flops_per_token": flops_per_token(model),
    }
    now["audit"] = audited or (before or {}).get("audit")
    leaks = (now["audit"] or {}).get("leaks")
    session = {"from_step": step, "total_steps": config.total_steps, "started": run_folder.now()}
    now["sessions"] = [*(before["sessions"] if before else []), session]
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "results.json").unlink(missing_ok=True)  # those of fewer steps, if any
    run_folder.write_json(run_dir / "environment.json", now)
    run_folder.write_json(run_dir / "config.json", {**config.to_dict(), **({LEAKY: leaks} if leaks else {})})
    return now


@contextmanager
def one_sentence(run_dir: Path) -> Iterator[None]:
    """Turn the system's refusals (a full disk, a folder that may not be written) into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{run_dir} cannot be used ({error}): free some space or choose another output_dir.") from error


@contextmanager
def numerics(config: RunConfig, device: torch.device) -> Iterator[None]:
    """TF32 on CUDA where float32 products remain; only repeatable algorithms if `deterministic`. Undone after."""
    precision, was_deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    change = config.deterministic and not was_deterministic  # the call alone imports a compiler, for seconds
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if change:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what repeatable CUDA products need
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if change:
            torch.use_deterministic_algorithms(False)


@contextmanager
def stop_requests(run_dir: Path) -> Iterator[Callable[[], str]]:
    """Yields a function that says why the run should stop, or "". A second Ctrl-C interrupts at once."""
    asked: list[str] = []
    (run_dir / "stop").unlink(missing_ok=True)  # meant for an earlier session

    def note(number: int, frame: Any):
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    def reason() -> str:
        if (run_dir / "stop").exists():
            (run_dir / "stop").unlink(missing_ok=True)
            asked.append("python -m lmlib stop")
        return asked[0] if asked else ""

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM) if in_main}
    try:
        yield reason
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
