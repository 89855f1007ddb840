"""train(config): the one loop, a generator of records.

The notebook, the terminal and the tests all run it. Update N uses batch N and leaves record N behind; whatever
chance it needs comes from (seed, N), so that a resumed run repeats the uninterrupted one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmlib import checkpoint, evaluation, optim
from lmlib.config import RunConfig
from lmlib.data.tokenizer import token_bytes
from lmlib.data.tokens import TokenStore
from lmlib.files import os_errors_as_value_errors, read_json, write_json
from lmlib.generation.settings import Settings
from lmlib.generation.text import complete, generate_ids
from lmlib.leaks import LEAKY
from lmlib.model import huggingface
from lmlib.model.moe import expert_load, reset_router_load, update_router_bias
from lmlib.model.size import active_parameter_count, parameter_count
from lmlib.model.transformer import LanguageModel
from lmlib.run.device import numerics, pick_device, pick_dtype
from lmlib.run.environment import record_environment
from lmlib.run.lock import heartbeat, hold_lock, stop_requests
from lmlib.run.preflight import before_training
from lmlib.run.records import Metrics, Record
from lmlib.run.start import build_model, disk_needed, finished_results, merge_recorded, open_store, parent_of, step_of
from lmlib.run.throughput import Throughput


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
        audit.Leaky: the model or its split leaks, and `allow_leaks` is false; nothing on disk was changed.
        NonFinite: see `on_nonfinite`.
        Stopped: the run was asked to stop, and is saved.
    """
    config, device = merge_recorded(config), pick_device(config.device)
    if (results := finished_results(config)) is not None:
        yield Record("done", config.total_steps, results, {})
        return
    with os_errors_as_value_errors(config.run_dir), numerics(config, device):
        parent, store = parent_of(config), open_store(config)
        config = replace(config, vocab_size=store.vocab_size, init_step=step_of(config, parent))
        alone, alive = hold_lock(config.run_dir), heartbeat(config.run_dir)
        with alone, alive, stop_requests(config.run_dir) as stop_asked:
            yield from _loop(config, store, device, parent, stop_asked)


def _loop(
    config: RunConfig, store: TokenStore, device: torch.device, parent: Path | None, stop_asked: Callable[[], str]
) -> Iterator[Record]:
    # Where the run stands
    run_dir, dtype = config.run_dir, pick_dtype(config.dtype, device)
    last = checkpoint.newest_good(run_dir, with_state=True, run=config.key())
    state = {"step": 0, "metrics_size": 0, "timing": {}, "skipped": [], "recent_losses": []}
    if last:
        state = checkpoint.read_state(last)
    elif (run_dir / "results.json").exists():
        raise ValueError(
            f"{run_dir} is a finished run whose checkpoints are gone, so it cannot be continued: choose a new run_name."
        )
    elif parent and config.init_state == "full":
        if not (parent / "training_state").exists():
            raise ValueError(
                f"{parent} has no training state any more (the newest two checkpoints of a run keep theirs), so the "
                "optimiser cannot go on from it; init_state: weights can start there."
            )
        state |= {"step": checkpoint.verify_state(parent)["step"]}
    begin = state["step"]
    if begin > config.total_steps:
        raise ValueError(f"{parent} is at step {begin}, beyond total_steps {config.total_steps}.")
    model = build_model(config, last or parent).to(device)
    optimizers = optim.build_optimizers(model, config)
    if last or config.init_state == "full":
        optim.load_state_tensors(model, optimizers, checkpoint.read_optimizer(last or parent))
    checkpoint.check_space(run_dir, disk_needed(config, model, optimizers, begin))
    windows, sizes = store.validation_windows(), token_bytes(store.tokenizer, config.vocab_size)
    known = last and (read_json(run_dir / "environment.json") or {}).get("audit")
    audited = None if known else before_training(config, model, store, windows, parent)
    environment = record_environment(config, store, model, device, begin, parent, audited)
    leaks = (environment["audit"] or {}).get("leaks", "")
    micro, skipped, recent = (
        state.get("micro_batch_size", config.micro_batch_size or config.batch_size),
        state["skipped"],
        state["recent_losses"],
    )

    metrics = Metrics(run_dir / "metrics.jsonl", state["metrics_size"])
    saver = checkpoint.Saver(background=device.type == "cuda")
    meter = Throughput(model, config.total_steps, config.batch_size * config.sequence_length, dtype, state["timing"])

    def emit(kind: str, step: int, values: dict[str, Any], timing: dict[str, Any] | None = None) -> Record:
        record = Record(kind, step, values, {"seconds": round(meter.seconds(), 3), **(timing or {})})
        metrics.append(record)
        return record

    def evaluate(step: int) -> Iterator[Record]:
        nonlocal scores, scored
        losses, correct = evaluation.score_windows(model, windows, micro, dtype)
        scores, scored = evaluation.summarize(losses, correct, windows[:, 1:], sizes), step
        if not math.isfinite(scores["val_perplexity"]):
            raise NonFinite(f"The held-out loss of step {step} is {scores['val_loss']}: the run has diverged.")
        yield emit("eval", step, {**scores, **({LEAKY: leaks} if leaks else {})})
        yield emit("sample", step, sample(model, store.tokenizer, windows))
        if step == config.total_steps:
            yield emit("profile", step, evaluation.scores_by_position(losses, correct))

    def save(step: int, scheduled: bool):
        saver.save(
            run_dir,
            step,
            huggingface.model_tensors(model),
            optim.state_tensors(model, optimizers),
            config=config,
            tokenizer=store.tokenizer,
            val_loss=scores["val_loss"],
            val_loss_step=scored,
            scheduled=scheduled,
            leaks=leaks,
            state={
                "scores": scores,
                "scored": scored,
                "metrics_size": metrics.size(),
                "micro_batch_size": micro,
                "skipped": skipped,
                "recent_losses": recent,
                "timing": meter.state(),
            },
        )

    try:
        scores, scored = (state["scores"], state["scored"]) if last else ({}, begin)
        if not last:
            yield from evaluate(begin)
            yield emit("audit", begin, audited)

        for step in range(begin + 1, config.total_steps + 1):
            share = optim.schedule(step, config.total_steps, config.warmup_ratio)
            optim.set_learning_rates(optimizers, share)
            saver.check()

            meter.start_update()
            while True:
                try:
                    loss = accumulate_gradients(model, *store.batch(step), micro, config.seed, step, dtype)
                    break
                except torch.cuda.OutOfMemoryError:
                    if micro == 1:
                        raise
                    micro = math.ceil(micro / 2)
                torch.cuda.empty_cache()
                yield emit("out_of_memory", step, {"micro_batch_size": micro})
            norm = clip_gradients(model, config.grad_clip)
            is_finite = math.isfinite(loss) and math.isfinite(norm)
            if is_finite:
                for optimizer in optimizers:
                    optimizer.step()
                update_router_bias(model)
            meter.end_update()

            if not is_finite:
                drawn = store.window_indices(step).tolist()
                yield emit("nonfinite", step, {"loss": str(loss), "grad_norm": str(norm), "windows": drawn})
                if config.on_nonfinite == "stop":
                    raise NonFinite(
                        f"The loss ({loss}) or gradient norm ({norm}) of step {step} is not finite. No weight was changed. "
                        "Start a run of another name: anew with a lower learning_rate, or from this one's last checkpoint "
                        "(init_from, init_state: full) with on_nonfinite: skip."
                    )
                skipped = [*skipped, step]
            elif is_spike(loss, recent):
                yield emit("spike", step, {"loss": loss, "usual_loss": sum(recent) / len(recent), "grad_norm": norm})
            recent = [*recent, loss][-SPIKE_WINDOW:] if is_finite else recent
            is_last = step == config.total_steps
            if is_finite and (step % config.log_every == 0 or is_last):
                values = {"loss": loss, "learning_rate": share * config.learning_rate, "grad_norm": norm}
                if config.feed_forward == "moe":
                    values["expert_load"] = expert_load(model)
                yield emit("step", step, values, meter.speed(step))
            if step % config.eval_every == 0 or is_last:
                yield from evaluate(step)
            is_saved = step % config.checkpoint_every == 0 or is_last
            if is_saved:
                record = emit(
                    "checkpoint",
                    step,
                    {"path": f"checkpoints/checkpoint_step_{step}", "val_loss": scores["val_loss"], "val_loss_step": scored},
                )
                save(step, scheduled=True)
                yield record
            if not is_last and (reason := stop_asked()):
                if not is_saved:
                    save(step, scheduled=False)
                saver.wait()
                raise Stopped(
                    f"Stopped at step {step} of {config.total_steps} ({reason}). Its checkpoint is saved: "
                    "start the same run again and it goes on from there."
                )
        saver.wait()
        results = {**scores, **summary(config, model, skipped), **({LEAKY: leaks} if leaks else {})}
        timing = {
            "training_time_minutes": round(meter.seconds() / 60, 3),
            "tokens_per_second": round(meter.tokens_per_second(), 1),
        }
        measured_on = what_was_measured(config, store, windows)
        done = emit("done", config.total_steps, results, timing)
        draw_curves(run_dir)
        write_json(run_dir / "results.json", {**results, **timing, "measured_on": measured_on, "audit": environment["audit"]})
        yield done
    finally:
        try:
            saver.wait()
        finally:
            metrics.close()


def accumulate_gradients(
    model: LanguageModel, ids: Tensor, targets: Tensor, micro: int, seed: int, step: int, dtype: torch.dtype
) -> float:
    """Put the gradient of a batch's mean loss into the parameters, `micro` windows at a time; returns the loss."""
    device = next(model.parameters()).device
    model.train()
    model.zero_grad(set_to_none=True)
    reset_router_load(model)
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


def clip_gradients(model: LanguageModel, limit: float) -> float:
    """Scale the gradient down to norm `limit` (0: leave it); returns its norm before."""
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf))


SPIKE_WINDOW = 30  # steps whose losses say what is usual


def is_spike(loss: float, recent: list[float]) -> bool:
    """Whether a loss stands further above the recent ones than six of their standard deviations (and 0.1 nats)."""
    if len(recent) < SPIKE_WINDOW:
        return False
    return loss > np.mean(recent) + max(0.1, 6 * np.std(recent))


PROMPTS, PROMPT_TOKENS, SAMPLE_TOKENS = 3, 16, 24  # what each evaluation lets the model write


def sample(model: LanguageModel, tokenizer: Any, windows: Tensor) -> dict[str, list[str]]:
    """How the model goes on from the beginnings of the first held-out windows, greedily: always the same prompts."""
    prompt = min(PROMPT_TOKENS, windows.shape[1] // 2)
    new = min(SAMPLE_TOKENS, windows.shape[1] - prompt)
    model.eval()
    ids = windows[:PROMPTS, :prompt].tolist()
    texts = complete(generate_ids(model, tokenizer, ids, Settings(new, temperature=0)))
    return {"prompts": [tokenizer.decode(row) for row in ids], "texts": [text.text for text in texts]}


def summary(config: RunConfig, model: LanguageModel, skipped: list[int]) -> dict[str, Any]:
    """What results.json says of the run beside its scores and times."""
    count = parameter_count(model)
    return {
        "model_name": model_name(config),
        "parameter_count": count,
        "active_parameter_count": active_parameter_count(model),
        "parameters_millions": round(count / 1e6, 3),
        "total_steps": config.total_steps,
        "checkpoint_every": config.checkpoint_every,
        "eval_every": config.eval_every,
        "tokens_trained": config.total_steps * config.batch_size * config.sequence_length,
        "steps_skipped": skipped,
    }


def model_name(config: RunConfig) -> str:
    """As Experiment 8 names its models: attention_mlp_512d, moe_8e_2k_512d."""
    experts = f"moe_{config.num_experts}e_{config.num_experts_per_tok}k"
    kind = "mlp" if config.feed_forward == "mlp" else experts
    return f"{'attention_' if config.attention == 'mla' else ''}{kind}_{config.hidden_size}d"


def draw_curves(run_dir: Path):
    """training_curves.png and .html, where the packages that draw are installed; the core trains without them."""
    try:
        from lmlib.analysis import figures
    except ImportError:
        return
    figures.save_curves(run_dir)


def what_was_measured(config: RunConfig, store: TokenStore, windows: Tensor) -> dict[str, Any]:
    """What the scores in results.json were measured on, in words and numbers."""
    source = f"held-out text ({config.validation_corpus or f'documents of {config.corpus} that training never sees'})"
    if config.split == "windows":
        source = f"NOT held out (windows of {config.corpus} that overlap training windows)"
    return {
        "scores": f"{source}, {len(windows)} windows of {config.sequence_length} tokens, after the last step",
        "held_out_share_of_tokens": store.info["held_out_share"],
        "held_out_documents": store.info["held-out"]["documents"],
        "training_documents": store.info["training"]["documents"],
        "training_tokens": store.info["training"]["tokens"],
    }
