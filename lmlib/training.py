"""train(config): the one loop, a generator of records.

The notebook, the terminal and the tests all run it. Update N uses batch N and leaves record N behind; whatever
chance it needs comes from (seed, N), so that a resumed run repeats the uninterrupted one.
"""

import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmlib import checkpoint, data, evaluation, optim, run_folder
from lmlib.config import RunConfig, shown
from lmlib.meter import Meter
from lmlib.model import LanguageModel, parameter_count
from lmlib.run_folder import Metrics, Record


class NonFinite(ValueError):
    """A loss or gradient was infinite or not a number; no weight was changed by it."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; its checkpoint is saved."""


def train(config: RunConfig) -> Iterator[Record]:
    """Train the run that `config` describes, or go on with it; yields each record once it is written.

    A run folder that has a checkpoint is continued from the newest good one; a finished run yields its last
    record again and changes nothing. Ctrl-C, SIGTERM and a file named `stop` in the run's folder end the step
    at hand, save, and raise `Stopped`. On CUDA a checkpoint's record comes while its files are being written.

    Raises:
        ValueError: parameters, corpus, folder or checkpoint cannot be used; nothing on disk was changed.
        NonFinite: see `on_nonfinite`.
        Stopped: the run was asked to stop, and is saved.
    """
    config, device = run_folder.continued(config), pick_device(config.device)
    if (results := run_folder.finished(config)) is not None:
        yield Record("done", config.total_steps, results, {})
        return
    with one_sentence(config.run_dir), numerics(config, device):
        parent, store = parent_of(config), open_store(config)
        config = replace(config, vocab_size=store.vocab_size, init_step=step_of(parent))
        with run_folder.one_writer(config.run_dir), stop_requests(config.run_dir) as stop_asked:
            yield from _loop(config, store, device, parent, stop_asked)


def _loop(
    config: RunConfig, store: data.TokenStore, device: torch.device, parent: Path | None, stop_asked: Callable[[], str]
) -> Iterator[Record]:
    # Where the run stands
    run_dir, dtype = config.run_dir, pick_dtype(config.dtype, device)
    last = checkpoint.newest_good(run_dir, with_state=True)
    state = checkpoint.verify_state(last) if last else {"step": 0, "metrics_size": 0, "timing": {}}
    model = build_model(config, last or parent).to(device)
    optimizers = optim.build_optimizers(model, config)
    if last:
        if state["run"] != run_folder.run_key(config):
            raise checkpoint.CheckpointError(f"{last} belongs to another run than the one in {run_dir}.")
        optim.load_state_tensors(model, optimizers, checkpoint.read_optimizer(last))
    micro, skipped = state.get("micro_batch_size", config.micro_batch_size or config.batch_size), state.get("skipped", [])
    to_save = math.ceil((config.total_steps - state["step"]) / config.checkpoint_every)
    checkpoint.check_space(run_dir, checkpoint.model_tensors(model), optim.state_bytes(optimizers), to_save)
    record_environment(config, store, device, state["step"], parent)

    metrics = Metrics(run_dir / "metrics.jsonl", state["metrics_size"])
    saver = checkpoint.Saver(background=device.type == "cuda")
    meter = Meter(model, config.total_steps, config.batch_size * config.sequence_length, dtype, state["timing"])
    windows, token_bytes = store.validation_windows(), data.token_bytes(store.tokenizer, config.vocab_size)

    def emit(kind: str, step: int, values: dict[str, Any], timing: dict[str, Any] | None = None) -> Record:
        record = Record(kind, step, values, {"seconds": round(meter.seconds(), 3), **(timing or {})})
        metrics.append(record)
        return record

    def evaluate() -> dict[str, Any]:
        return evaluation.evaluate(model, windows, token_bytes, micro, dtype)

    def save(step: int):
        saver.save(
            run_dir,
            step,
            checkpoint.model_tensors(model),
            optim.state_tensors(model, optimizers),
            config=config,
            tokenizer=store.tokenizer,
            val_loss=scores["val_loss"],
            state={
                "run": run_folder.run_key(config),
                "val_loss": scores["val_loss"],
                "metrics_size": metrics.size(),
                "micro_batch_size": micro,
                "skipped": skipped,
                "timing": meter.state(),
            },
        )

    try:
        scores = evaluate() if state["step"] in (0, config.total_steps) else {"val_loss": state["val_loss"]}
        if state["step"] == 0:
            yield emit("eval", 0, scores)

        for step in range(state["step"] + 1, config.total_steps + 1):
            share = optim.schedule(step, config.total_steps, config.warmup_ratio)
            optim.set_rate(optimizers, share)
            saver.check()

            meter.start_update()
            while True:
                try:
                    loss = gradients(model, *store.batch(step), micro, config.seed, step, dtype)
                    break
                except torch.cuda.OutOfMemoryError:
                    if micro == 1:
                        raise
                    micro = math.ceil(micro / 2)
                torch.cuda.empty_cache()
                yield emit("out_of_memory", step, {"micro_batch_size": micro})
            norm = clip(model, config.grad_clip)
            is_finite = math.isfinite(loss) and math.isfinite(norm)
            if is_finite:
                for optimizer in optimizers:
                    optimizer.step()
            meter.end_update()

            if not is_finite:
                drawn = store.drawn(step).tolist()
                yield emit("nonfinite", step, {"loss": str(loss), "grad_norm": str(norm), "windows": drawn})
                if config.on_nonfinite == "stop":
                    raise NonFinite(
                        f"The loss ({loss}) or gradient norm ({norm}) of step {step} is not finite. No weight was changed. "
                        "Start a run of another name with a lower learning_rate, or this one with on_nonfinite: skip."
                    )
                skipped = [*skipped, step]
            is_last = step == config.total_steps
            if is_finite and (step % config.log_every == 0 or is_last):
                values = {"loss": loss, "learning_rate": share * config.learning_rate, "grad_norm": norm}
                yield emit("step", step, values, meter.speed(step))
            if step % config.eval_every == 0 or is_last:
                scores = evaluate()
                yield emit("eval", step, scores)
            is_saved = step % config.checkpoint_every == 0 or is_last
            if is_saved:
                record = emit("checkpoint", step, {"path": f"checkpoints/checkpoint_step_{step}", **scores})
                save(step)
                yield record
            if not is_last and (reason := stop_asked()):
                if not is_saved:
                    save(step)
                saver.wait()
                raise Stopped(
                    f"Stopped at step {step} of {config.total_steps} ({reason}). Its checkpoint is saved: "
                    "start the same run again and it goes on from there."
                )
        saver.wait()
        results = {**scores, **summary(config, model, skipped)}
        timing = {
            "training_time_minutes": round(meter.seconds() / 60, 3),
            "tokens_per_second": round(meter.tokens_per_second(), 1),
        }
        measured_on = what_was_measured(config, store, windows)
        run_folder.write_json(run_dir / "results.json", {**results, **timing, "measured_on": measured_on})
        yield emit("done", config.total_steps, results, timing)
    finally:
        metrics.close()


# ---------------------------------------------------------------------------------------------------
# One update


def gradients(model: LanguageModel, ids: Tensor, targets: Tensor, micro: int, seed: int, step: int, dtype: torch.dtype) -> float:
    """Put the gradient of a batch's mean loss into the parameters, `micro` windows at a time; returns the loss."""
    device = next(model.parameters()).device
    model.train()
    model.zero_grad(set_to_none=True)
    loss = 0.0
    for number, (x, y) in enumerate(zip(ids.split(micro), targets.split(micro), strict=True)):
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(dropout_seed(seed, step, number))
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                part = model.loss(x.to(device), y.to(device)) * (len(x) / len(ids))
            part.backward()
        loss += part.item()
    return loss


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    return int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def clip(model: LanguageModel, limit: float) -> float:
    """Scale the gradient down to norm `limit` (0: leave it); returns its norm before."""
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf))


# ---------------------------------------------------------------------------------------------------
# Before the first update


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
    theirs = checkpoint.config_of(source)
    names = ["attention", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    names += ["attention_bias", "tie_word_embeddings", "rope_theta"]
    names += sorted(run_folder.ONLY_MLA) if config.attention == "mla" else []
    different = [f"{name} to {getattr(theirs, name)!r}" for name in names if getattr(theirs, name) != getattr(config, name)]
    if different:
        raise ValueError(f"The model in {source} has another shape. To start from it, set {', '.join(different)}.")
    return checkpoint.load_weights(source, config)


def parent_of(config: RunConfig) -> Path | None:
    """The model folder that the run starts from; None for random weights."""
    return checkpoint.find_checkpoint(config.init_from, config.init_step) if config.init_from else None


def open_store(config: RunConfig) -> data.TokenStore:
    """The tokens that a run trains and is judged on, in its own tokenizer or, with `init_from`, in its parent's."""
    return data.prepare(config, tokenizer=tokenizer_of(config, parent_of(config)))


def greeting(config: RunConfig) -> str:
    """What `train(config)` is about to do, in a line; ValueError if the folder holds another run."""
    config = run_folder.continued(config)
    folder, recorded = shown(config.run_dir), run_folder.read_json(config.run_dir / "config.json")
    steps = checkpoint.checkpoint_steps(config.run_dir)
    if run_folder.finished(config):
        return f"{folder} is finished: {config.total_steps} steps. To go on, raise total_steps."
    if not steps:
        return f"A new run of {config.total_steps} steps in {folder}."
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


def step_of(folder: Path | None) -> int | None:
    return checkpoint.verify(folder)["step"] if folder and (folder / "checkpoint.json").exists() else None


def record_environment(config: RunConfig, store: data.TokenStore, device: torch.device, step: int, parent: Path | None):
    """Write config.json and environment.json; when going on, warn of what makes that inexact."""
    run_dir = config.run_dir
    now, before = run_folder.environment(store, device), run_folder.read_json(run_dir / "environment.json")
    if before:
        for change in run_folder.changes(before, now):
            warnings.warn(f"Going on may not be bit for bit: {change}.", stacklevel=2)
    now["init_from"] = str(parent) if parent else None
    session = {"from_step": step, "total_steps": config.total_steps, "started": run_folder.now()}
    now["sessions"] = [*(before["sessions"] if before else []), session]
    run_dir.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(run_dir / "environment.json", now)
    run_folder.write_json(run_dir / "config.json", config.to_dict())


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


# ---------------------------------------------------------------------------------------------------
# Results


def summary(config: RunConfig, model: LanguageModel, skipped: list[int]) -> dict[str, Any]:
    """What results.json says of the run beside its scores and times."""
    count = parameter_count(model)
    return {
        "model_name": f"{'attention_' if config.attention == 'mla' else ''}mlp_{config.hidden_size}d",
        "parameter_count": count,
        "parameters_millions": round(count / 1e6, 3),
        "total_steps": config.total_steps,
        "checkpoint_every": config.checkpoint_every,
        "eval_every": config.eval_every,
        "tokens_trained": config.total_steps * config.batch_size * config.sequence_length,
        "steps_skipped": skipped,
    }


def what_was_measured(config: RunConfig, store: data.TokenStore, windows: Tensor) -> dict[str, Any]:
    """What the scores in results.json were measured on, in words and numbers."""
    source = config.validation_corpus or f"documents of {config.corpus} that training never sees"
    return {
        "scores": f"held-out text ({source}), {len(windows)} windows of {config.sequence_length} tokens, after the last step",
        "held_out_share_of_tokens": store.info["held_out_share"],
        "held_out_documents": store.info["held-out"]["documents"],
        "training_documents": store.info["training"]["documents"],
        "training_tokens": store.info["training"]["tokens"],
    }
