"""train(config): the one training loop, a generator of records.

Notebook, terminal and tests all iterate over it. Update N trains on batch N; every random number
it needs derives from (seed, N), so a resumed run repeats the uninterrupted one bit for bit.
"""

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmlib import checkpoint, distributed, evaluation, optim
from lmlib.config import RunConfig
from lmlib.data.tokens import EvaluationText
from lmlib.data.verify import data_hash
from lmlib.errors import Held, Stopped, UserError
from lmlib.files import os_errors_as_value_errors, write_json
from lmlib.model import card
from lmlib.model.huggingface import model_tensors
from lmlib.model.moe import expert_load, update_router_bias
from lmlib.model.size import active_parameter_count, parameter_count
from lmlib.run.deadline import Deadline
from lmlib.run.device import numerics
from lmlib.run.follow import follow
from lmlib.run.gradients import accumulate_gradients
from lmlib.run.lock import heartbeat, hold_lock, stop_requests
from lmlib.run.prepare import ARITHMETIC_VERSION, Run, prepare, record_start
from lmlib.run.records import Record, measured_on, model_name
from lmlib.run.sample import sample
from lmlib.run.start import Start, find_start
from lmlib.run.together import open_together
from lmlib.run.updates import Update

SPIKE_WINDOW = 30  # recent losses that a spike is measured against


class NonFinite(UserError):
    """A loss or gradient norm was infinite or NaN; no weight was changed by it."""


def train(config: RunConfig, start: Start | None = None) -> Iterator[Record]:
    """Train the run that `config` describes, or resume it; yields each record once it is written.

    `start` is `find_start(config)`, if the caller has it: finding it verifies a checkpoint.

    A run resumes from its newest good checkpoint. A finished run yields its last record and changes
    nothing. Ctrl-C, SIGTERM, SIGHUP, `max_hours` and a file named `stop` in the run's folder end
    the step, save, and raise `Stopped`; so does closing the generator, which raises nothing. On
    CUDA a checkpoint's record comes while its files are being written. With `processes` above 1
    others train, and this one yields what they record.

    Raises:
        ValueError: parameters, corpus, folder or checkpoint cannot be used; nothing was changed.
        leaks.Leaky: the model or its split leaks and `allow_leaks` is false; nothing was changed.
        NonFinite: see `on_nonfinite`.
        Stopped: the run was asked to stop, and is saved.
    """
    began = time.monotonic()
    with distributed.join():
        start = start or distributed.agree(lambda: find_start(config))
        if start.results:
            yield Record("done", start.step, start.results, {})
            return
        if start.config.processes > 1 and not distributed.is_worker():
            yield from follow(start)
            return
        run_dir, is_first = start.config.run_dir, distributed.is_first()
        with (os_errors_as_value_errors(run_dir), numerics(start.config, start.device),
              ExitStack() as stack):
            store = open_together(start)  # before the lock, since tokenizing may take hours
            distributed.agree(lambda: _take(start, stack), only_first=True)
            stop_reason = stack.enter_context(stop_requests(run_dir, watches_file=is_first))
            run = prepare(start, store)
            distributed.agree(lambda: record_start(run), only_first=True)
            stack.enter_context(closing(run.metrics) if is_first else nullcontext())
            try:
                yield from _until_closed(run, training_steps(run, stop_reason, began))
            finally:
                run.saver.wait()


def _take(start: Start, stack: ExitStack):
    """Lock the run's folder for the time of `stack`."""
    run_dir = start.config.run_dir
    stack.enter_context(hold_lock(run_dir))
    stack.enter_context(heartbeat(run_dir))
    if checkpoint.checkpoint_steps(run_dir) != start.steps:
        raise Held(f"{run_dir} was trained by another process just now; run the same command "
                   "again.")


def _until_closed(run: Run, records: Iterator[Record]) -> Iterator[Record]:
    """Pass the records on. Where the consumer leaves early, the step is completed and saved."""
    try:
        for record in records:  # noqa: UP028 (`yield from` would close them too)
            yield record
    except GeneratorExit:
        run.is_closed = True
        with suppress(Stopped):
            deque(records, maxlen=0)  # makes the rest of the step
        raise


def training_steps(run: Run, stop_reason: Callable[[], str], began: float) -> Iterator[Record]:
    """Make every update that is left: evaluate, save and stop where due.

    `began` is the time on the monotonic clock from which `max_hours` counts.
    """
    config, progress, last = run.config, run.progress, run.config.total_steps
    deadline = Deadline(began, config.max_hours, run.checkpoint_bytes)
    # A resumed run is evaluated here only if total_steps was lowered to its step.
    if not run.start.resumes or progress.scored < progress.step == last:
        yield from evaluate(run)
    if run.is_audited:
        yield emit(run, "audit", run.audit)
    if run.is_closed and progress.step < last:
        return  # nothing to save yet
    for step in range(progress.step + 1, last + 1):
        run.saver.check()  # a failed save stops the run here, not at the next checkpoint
        lr_factor = optim.schedule(step, last, config.warmup_ratio, config.decay_ratio)
        apply_update(run, step, lr_factor)
        progress.step = step
        every = config.log_every, config.eval_every, config.checkpoint_every
        is_logged, is_scored, is_saved = (step % n == 0 or step == last for n in every)
        if is_logged or is_scored or is_saved:
            yield from read_updates(run, lr_factor if is_logged else None)
        if is_scored:
            yield from evaluate(run)
        if is_saved:
            record = emit(run, "checkpoint", {
                "path": f"checkpoints/checkpoint_step_{step}",
                "val_loss": progress.scores["val_loss"], "val_loss_step": progress.scored})
            save(run, scheduled=True)
            yield record
        if step < last and (reason := _why_stop(run, stop_reason, deadline)):
            if not is_saved:
                yield from read_updates(run)
                save(run, scheduled=False)
            run.saver.wait()
            raise Stopped(f"Stopped at step {step} of {last} ({reason}). The checkpoint is saved; "
                          "run the same command to resume.")
    run.saver.wait()
    yield finish(run)


def _why_stop(run: Run, stop_reason: Callable[[], str], deadline: Deadline) -> str:
    """Say why the run should stop after this step, or ""."""
    is_near = "max_hours" if deadline.is_near() else ""  # every step, to measure their length
    return distributed.first_reason(
        "its consumer has left" if run.is_closed else stop_reason() or is_near)


def emit(run: Run, kind: str, values: dict[str, Any], step: int | None = None,
         **timing: Any) -> Record:
    """Append a record of a step, by default the current one, to metrics.jsonl."""
    timing = {"seconds": round(run.throughput.seconds(), 3), **timing}
    record = Record(kind, run.progress.step if step is None else step, values, timing)
    if run.metrics is not None:  # rank 0's
        run.metrics.append(record)
    return record


def apply_update(run: Run, step: int, lr_factor: float) -> Tensor:
    """Make update `step` at `lr_factor` of the peak rates; returns its loss, () on the device.

    A loss or gradient norm that is not finite changes nothing, and where `on_nonfinite` is "stop"
    blocks all later updates. The device decides that: the host waits for it in `read_updates`
    alone. On CUDA, running out of memory halves the micro-batch until the batch fits.
    """
    progress = run.progress
    optim.set_learning_rates(run.optimizers, lr_factor)
    run.throughput.start_updates()
    while True:
        try:
            loss = accumulate_gradients(
                run.parallel.model, *run.store.batch(step), progress.micro_batch_size,
                run.config.seed, step, run.start.dtype)
            break
        except torch.cuda.OutOfMemoryError:
            if distributed.world_size() > 1 or run.config.deterministic:
                where = f" on rank {distributed.rank()}" if distributed.world_size() > 1 else ""
                raise UserError(
                    f"Out of memory at step {step} with micro_batch_size "
                    f"{progress.micro_batch_size}{where}: set a smaller one. Several processes and "
                    "deterministic runs never change it.") from None
            if progress.micro_batch_size == 1:
                raise
            progress.micro_batch_size = math.ceil(progress.micro_batch_size / 2)
            run.updates.out_of_memory.append((step, progress.micro_batch_size))
        torch.cuda.empty_cache()  # after the handler, whose traceback holds the tensors
    norm = run.parallel.clip_gradients(run.config.grad_clip)
    found_inf = run.updates.add(step, loss, norm)
    for optimizer in run.optimizers:
        optimizer.found_inf = found_inf
        optimizer.step()
    run.parallel.send_parameters()
    update_router_bias(run.parallel.model, found_inf)
    return loss


def read_updates(run: Run, lr_factor: float | None = None) -> Iterator[Record]:
    """Yield what the updates since the last reading have to report, in the order of their steps.

    With `lr_factor`, that of the last update, its loss is recorded. Raises `NonFinite` where
    `on_nonfinite` is "stop".
    """
    updates = run.updates.read()
    run.throughput.end_updates(len(updates))
    while run.updates.out_of_memory:
        step, size = run.updates.out_of_memory.pop(0)
        yield emit(run, "out_of_memory", {"micro_batch_size": size}, step)
    for update in updates:
        yield from _events(run, update)
    if lr_factor and updates[-1].is_finite:
        last, rate = updates[-1], lr_factor * run.config.learning_rate
        values = {"loss": last.loss, "learning_rate": rate, "grad_norm": last.grad_norm}
        if run.config.feed_forward == "moe":
            values["expert_load"] = expert_load(run.parallel.model)
        yield emit(run, "step", values, **run.throughput.since_last_log(run.progress.step))


def _events(run: Run, update: Update) -> Iterator[Record]:
    """Yield a record if an update was not finite or its loss is a spike."""
    progress, step, loss, norm = run.progress, update.step, update.loss, update.grad_norm
    if update.is_finite:
        recent = progress.recent_losses
        if is_spike(loss, recent):
            yield emit(run, "spike", {"loss": loss, "usual_loss": sum(recent) / len(recent),
                                      "grad_norm": norm}, step)
        progress.recent_losses = [*recent, loss][-SPIKE_WINDOW:]
        return
    yield emit(run, "nonfinite", {"loss": str(loss), "grad_norm": str(norm),
                                  "windows": run.store.window_indices(step).tolist()}, step)
    if run.config.on_nonfinite == "stop":
        raise NonFinite(
            f"The loss ({loss}) or gradient norm ({norm}) of step {step} is not finite. No weight "
            "was changed since. Start a run with another run_name: with a lower learning_rate, or "
            "from the last checkpoint (init_from, init_state: full) with on_nonfinite: skip.")
    progress.skipped = [*progress.skipped, step]


def is_spike(loss: float, recent: list[float]) -> bool:
    """Whether a loss is six standard deviations (and 0.1 nats) above the recent ones."""
    return len(recent) >= SPIKE_WINDOW and loss > np.mean(recent) + max(0.1, 6 * np.std(recent))


# ---- Evaluate, save, finish ----

def evaluate(run: Run) -> Iterator[Record]:
    """Score the validation windows and sample from the model."""
    progress = run.progress
    with run.parallel.gathered():
        scores = score(run, run.text)
        progress.scores, progress.scored = scores.summary(), progress.step
        if not math.isfinite(progress.scores["val_perplexity"]):
            raise NonFinite(f"The validation loss of step {progress.step} is "
                            f"{progress.scores['val_loss']}: the run has diverged.")
        yield emit(run, "eval", {**progress.scores, **run.leak_mark})
        if distributed.is_first():
            yield emit(run, "sample", sample(run.model, run.store.tokenizer, run.text.windows))
    if progress.step == run.config.total_steps:
        yield emit(run, "profile", evaluation.scores_by_position(scores.losses, scores.correct))


def score(run: Run, text: EvaluationText) -> evaluation.Scores:
    """Score the model on a text, and keep what comparing it with other runs needs."""
    step, folder = run.progress.step, run.config.run_dir / "evaluations"
    scores = evaluation.evaluate(run.model, text, run.token_bytes, run.progress.micro_batch_size,
                                 run.start.dtype)
    if distributed.is_first():
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{text.split}_step_{step}.json", scores.to_json(step), indent=None)
    return scores


def save(run: Run, scheduled: bool):
    """Save a checkpoint of the current step."""
    state = optim.state_tensors(run.model, run.optimizers)
    state = distributed.collect(state, optim.state_shapes(run.model, run.whole), run.owner_of_state)
    distributed.agree(run.store.wait_until_verified, patient=True)
    with run.parallel.gathered():
        distributed.agree(lambda: _save(run, state, scheduled), only_first=True, patient=True)


def _save(run: Run, optimizer_state: dict[str, Tensor], scheduled: bool):
    progress, store = run.progress, run.store
    progress.metrics_size, progress.timing = run.metrics.size(), run.throughput.state()
    run.saver.save(run.config.run_dir, model_tensors(run.model), optimizer_state, config=run.config,
                   tokenizer=store.tokenizer, scheduled=scheduled, leaks=run.audit["leaks"],
                   state={**asdict(progress), "arithmetic_version": ARITHMETIC_VERSION,
                          "sums_as_tree": True},
                   provenance={"data": data_hash(store.info), "lineage": run.lineage.state,
                               "streams": run.lineage.streams},
                   lineage=run.lineage.hashes)


def score_test(run: Run) -> dict[str, Any]:
    """Score the test text, which has chosen nothing; {} if the run has none or must not."""
    config = run.config
    if not (config.has_test and config.score_test):
        return {}
    with run.parallel.gathered():
        scores = score(run, run.store.evaluation_text("test")).summary("test")
    files = (config.run_dir / "evaluations").glob("test_step_*.json")
    return {**scores, "test_steps": sorted(int(file.stem.split("_")[-1]) for file in files)}


def finish(run: Run) -> Record:
    """Score the test text; write the last record and all results."""
    config, count = run.config, parameter_count(run.model)
    results = {
        **run.progress.scores, **score_test(run), "model_name": model_name(config),
        "parameter_count": count, "active_parameter_count": active_parameter_count(run.model),
        "parameters_millions": round(count / 1e6, 3), "total_steps": config.total_steps,
        "checkpoint_every": config.checkpoint_every, "eval_every": config.eval_every,
        "tokens_trained": config.total_steps * config.batch_size * config.sequence_length,
        "steps_skipped": run.progress.skipped, "lineage": run.lineage.state, **run.leak_mark}
    timing = {"training_time_minutes": round(run.throughput.seconds() / 60, 3),
              "tokens_per_second": round(run.throughput.tokens_per_second(), 1)}
    done = emit(run, "done", results, **timing)
    distributed.agree(lambda: _write_results(run, results, timing), only_first=True)
    return done


def _write_results(run: Run, results: dict[str, Any], timing: dict[str, float]):
    config, run_dir = run.config, run.config.run_dir
    folder = run_dir / "checkpoints" / f"checkpoint_step_{config.total_steps}"
    checkpoint.prune(run_dir, config.keep_checkpoints)  # the last save may have been killed in it
    card.write_card(folder, config, results)
    write_json(run_dir / "results.json", {
        **results, **timing, "measured_on": measured_on(config, run.store.info),
        "audit": run.audit})
    try:
        from lmlib.analysis import figures
        figures.save_curves(run_dir)
        card.add_curves(folder, run_dir / "training_curves.png")
    except ModuleNotFoundError:
        pass  # the notebook packages may not be installed
    except Exception as error:  # of any kind: the results stand without a picture
        warnings.warn(f"The curves cannot be drawn: {error}", stacklevel=2)
