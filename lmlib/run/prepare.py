"""Prepare a run: everything that the training loop works with, built or loaded in one place."""

import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lmlib import checkpoint, optim
from lmlib.config import RunConfig
from lmlib.data.tokenizer import token_bytes
from lmlib.data.tokens import TokenStore
from lmlib.files import read_json, read_mapping, utc_now, write_json
from lmlib.leaks import LEAKY
from lmlib.model.size import active_parameter_count, flops_per_token, parameter_count
from lmlib.model.transformer import LanguageModel
from lmlib.run.environment import differences, environment
from lmlib.run.preflight import before_training
from lmlib.run.records import Metrics
from lmlib.run.start import Start, build_model, disk_needed, open_store
from lmlib.run.throughput import Throughput


@dataclass
class Progress:
    """Where a run is: what state.json holds beside the tensors."""
    step: int = 0  # updates made
    scores: dict[str, Any] = field(default_factory=dict)  # of the last evaluation
    scored: int = 0  # the step of that evaluation
    metrics_size: int = 0  # bytes of metrics.jsonl that belong to this state
    micro_batch_size: int = 0  # smaller than the config's after running out of memory
    skipped: list[int] = field(default_factory=list)  # steps without an update
    recent_losses: list[float] = field(default_factory=list)
    timing: dict[str, float] = field(default_factory=dict)


@dataclass
class Run:
    """Everything that the loop works with."""
    start: Start
    config: RunConfig
    store: TokenStore
    model: LanguageModel
    optimizers: list[torch.optim.Optimizer]
    windows: Tensor  # of validation, (W, T + 1)
    token_bytes: Tensor  # (V,)
    progress: Progress
    throughput: Throughput
    audit: dict[str, Any] | None  # None: audited in an earlier session
    metrics: Metrics | None = None  # it and the saver are opened by `record_start`
    saver: checkpoint.Saver | None = None

    @property
    def leaks(self) -> str:
        """The failed checks that `allow_leaks` permits."""
        return (self.audit or {}).get("leaks", "")

    @property
    def leak_mark(self) -> dict[str, str]:
        """What every config, result and score of a leaky run holds; else empty."""
        return {LEAKY: self.leaks} if self.leaks else {}


def prepare(start: Start, store: TokenStore | None = None) -> Run:
    """Build or load model and optimizers, open the data and audit them; raises as `train` does."""
    store = store or open_store(start)
    config = replace(start.config, vocab_size=store.vocab_size)
    model = build_model(config, start.source).to(start.device)
    optimizers = optim.build_optimizers(model, config)
    if start.resumes or (start.source and config.init_state == "full"):
        optim.load_state_tensors(model, optimizers, checkpoint.read_optimizer(start.source))
    progress = Progress(step=start.step, scored=start.step,
                        micro_batch_size=config.micro_batch_size or config.batch_size)
    if start.resumes:
        state = checkpoint.read_state(start.source)
        progress = Progress(**{name: state[name] for name in asdict(progress)})
    windows, audit = store.validation_windows(), None
    if not (start.resumes and read_mapping(config.run_dir / "environment.json").get("audit")):
        audit = before_training(config, model, store, windows, start.parent)
    return Run(start, config, store, model, optimizers, windows,
               token_bytes(store.tokenizer, config.vocab_size), progress,
               Throughput(model, start.dtype, progress.timing), audit)


def record_start(run: Run):
    """Write config.json and environment.json, and open metrics.jsonl and the saver.

    On resume, warn of each difference of the environment that makes it inexact.
    """
    config, model, run_dir = run.config, run.model, run.config.run_dir
    needed = disk_needed(config, model, run.optimizers, run.progress.step)
    checkpoint.check_space(run_dir, needed)
    before = read_json(run_dir / "environment.json") or {}
    current = environment(run.store, run.start.device)
    for difference in differences(before, current) if before else []:
        warnings.warn(f"Resuming may not be bit-identical: {difference}.", stacklevel=2)
    run.audit, parent = run.audit or before.get("audit"), run.start.parent
    session = {"from_step": run.progress.step, "total_steps": config.total_steps,
               "started": utc_now()}
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "results.json").unlink(missing_ok=True)  # those of fewer steps
    write_json(run_dir / "environment.json", {
        **current, "init_from": str(parent) if parent else before.get("init_from"),
        "model": {"parameter_count": parameter_count(model),
                  "active_parameter_count": active_parameter_count(model),
                  "flops_per_token": flops_per_token(model)},
        "audit": run.audit, "sessions": [*before.get("sessions", []), session]})
    write_json(run_dir / "config.json", {**config.to_dict(), **run.leak_mark})
    run.metrics = Metrics(run_dir / "metrics.jsonl", run.progress.metrics_size)
    run.saver = checkpoint.Saver(background=run.start.device.type == "cuda")
