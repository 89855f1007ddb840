"""Prepare a run: everything that the training loop works with, built or loaded in one place."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lmlib import checkpoint, optim
from lmlib.config import RunConfig
from lmlib.data.tokenizer import token_bytes
from lmlib.data.tokens import TokenStore
from lmlib.files import read_mapping
from lmlib.model.transformer import LanguageModel
from lmlib.run.environment import record_session
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
    leaks: str = ""  # failed checks that allow_leaks permits
    metrics: Metrics | None = None  # opened by `record_start`
    saver: checkpoint.Saver | None = None


def prepare(start: Start, store: TokenStore | None = None) -> Run:
    """Build or load model and optimizers, open the data and audit them; writes nothing.

    Raises as `train` does.
    """
    store = store or open_store(start)
    config = replace(start.config, vocab_size=store.vocab_size)
    model = build_model(config, start.source).to(start.device)
    optimizers = optim.build_optimizers(model, config)
    if start.has_state:
        optim.load_state_tensors(model, optimizers, checkpoint.read_optimizer(start.source))
    checkpoint.check_space(config.run_dir, disk_needed(config, model, optimizers, start.step))

    progress = Progress(step=start.step, scored=start.step,
                        micro_batch_size=config.micro_batch_size or config.batch_size)
    if start.resumes:
        state = checkpoint.read_state(start.source)
        progress = Progress(**{name: state[name] for name in asdict(progress)})
    windows, parent = store.validation_windows(), None if start.resumes else start.source
    audit = None
    if not (start.resumes and read_mapping(config.run_dir / "environment.json").get("audit")):
        audit = before_training(config, model, store, windows, parent)
    throughput = Throughput(model, config.total_steps, config.batch_size * config.sequence_length,
                            start.dtype, progress.timing)
    return Run(start, config, store, model, optimizers, windows,
               token_bytes(store.tokenizer, config.vocab_size), progress, throughput, audit)


def record_start(run: Run):
    """Write config.json and environment.json, and open metrics.jsonl and the saver."""
    parent = None if run.start.resumes else run.start.source
    environment = record_session(run.config, run.store, run.model, run.start.device,
                                 run.progress.step, parent, run.audit)
    run.audit = environment["audit"]
    run.leaks = (run.audit or {}).get("leaks", "")
    run.metrics = Metrics(run.config.run_dir / "metrics.jsonl", run.progress.metrics_size)
    run.saver = checkpoint.Saver(background=run.start.device.type == "cuda")
