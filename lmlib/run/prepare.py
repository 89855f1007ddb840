"""Prepare a run: everything that the training loop works with, built or loaded in one place."""

import re
import shutil
import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lmlib import checkpoint, distributed, optim
from lmlib.config import RunConfig
from lmlib.data.tokenizer import token_bytes
from lmlib.data.tokens import EvaluationText, TokenStore
from lmlib.files import read_mapping, utc_now, write_json
from lmlib.leaks import LEAKY
from lmlib.model.size import active_parameter_count, flops_per_token, parameter_count
from lmlib.model.transformer import LanguageModel
from lmlib.run.compiled import check_device, compile_loss
from lmlib.run.environment import check_data, code_version, differences, environment
from lmlib.run.lineage import Lineage, lineage_of
from lmlib.run.parallel import Replicas, Shards, hollow_model
from lmlib.run.preflight import before_training
from lmlib.run.records import Metrics
from lmlib.run.start import Start, build_model, disk_needed, open_store, weights_hash
from lmlib.run.throughput import Throughput
from lmlib.run.updates import Updates

# Raised when a change of the code changes what a step computes or which text scores it, so that a
# run of the version before cannot resume bit for bit. 2: validation windows at equal distances.
# 3: fewer operators for norms, rotary positions and Muon.
ARITHMETIC_VERSION = 3


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
    model: LanguageModel  # whole; with sharding: full inside `parallel.gathered()` alone
    parallel: Replicas | Shards  # its `model` computes losses and gradients
    optimizers: list[torch.optim.Optimizer]  # of the parameters that this process updates
    whole: list[torch.optim.Optimizer]  # of all parameters
    owners: dict[Tensor, int]  # which process updates each parameter
    text: EvaluationText  # of validation
    token_bytes: Tensor  # (V,)
    lineage: Lineage
    progress: Progress
    throughput: Throughput
    updates: Updates  # not read yet
    audit: dict[str, Any]
    is_audited: bool  # in this session; False: the audit of an earlier one holds
    is_compiled: bool
    is_closed: bool = False  # the consumer of the records has left
    metrics: Metrics | None = None  # of rank 0; it and the saver are opened by `record_start`
    saver: checkpoint.Saver = field(default_factory=lambda: checkpoint.Saver(background=False))

    def owner_of_state(self, key: str) -> int:
        """Return which process has a tensor of `optim.state_tensors`."""
        return self.owners[self.model.get_parameter(key.rsplit("/", 1)[0])]

    @property
    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint with its training state, but for the tokenizer."""
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        return weights + optim.state_bytes(self.whole)

    @property
    def leak_mark(self) -> dict[str, str]:
        """What every config, result and score of a run with leaks that were allowed holds."""
        return {LEAKY: leaks} if (leaks := self.audit["leaks"]) else {}


def prepare(start: Start, store: TokenStore | None = None) -> Run:
    """Build or load model and optimizers, open the data and audit them; raises as `train` does."""
    store = store or open_store(start)
    config = replace(start.config, vocab_size=store.vocab_size)
    if start.resumes:
        check_data(config.run_dir, start.source, store)
    model, optimizers, whole, owners, initial = distributed.agree(lambda: _build(start, config))
    is_whole = model is initial
    parallel = Replicas(model, owners) if is_whole else Shards(model, owners, initial)
    del initial
    text = store.evaluation_text("validation")
    lineage = distributed.agree(lambda: lineage_of(start.source, store, is_own=start.resumes))

    def audit_unless_done() -> tuple[dict[str, Any], bool]:
        # The audit of an earlier session holds for the same code.
        done = read_mapping(config.run_dir / "environment.json").get("audit")
        code = code_version(model)
        if start.resumes and isinstance(done, dict) and done.get("code") == code:
            return done, False
        return {**before_training(start, config, model, store, lineage), "code": code}, True

    with parallel.gathered():
        audit, is_new = distributed.agree(audit_unless_done, only_first=True, patient=True)
    if start.device.type == "mps":
        check_device(model, *(part[:2] for part in store.batch(start.step + 1)))
    why_eager = distributed.agree(lambda: compile_loss(
        model, config, *store.batch(start.step + 1), start.dtype), patient=True)
    if why_eager and config.compile == "auto" and start.device.type == "cuda":
        warnings.warn(f"The model is not compiled, and slower than it could be: {why_eager}",
                      stacklevel=2)
    parallel.sum_gradients(exact=config.deterministic)
    progress = _progress(start, config)
    return Run(start, config, store, model, parallel, optimizers, whole, owners, text,
               token_bytes(store.tokenizer, config.vocab_size), lineage, progress,
               Throughput(model, start.dtype, progress.timing),
               Updates(start.device, config.on_nonfinite == "stop"), audit, is_new, not why_eager)


def _build(start: Start, config: RunConfig) -> tuple:
    """Return the model, its optimizers of this process and of all, who owns each parameter, and the
    model with the initial weights: the same, or with sharding: full another, on rank 0's CPU.
    """
    is_sharded = config.sharding == "full" and distributed.world_size() > 1
    initial = None
    if distributed.is_first() or not is_sharded:
        initial = build_model(config, start.source)
    model = hollow_model(config, start.device) if is_sharded else initial.to(start.device)
    optimizers = whole = optim.build_optimizers(model, config)
    owners = optim.owners(model, whole, distributed.world_size())
    if distributed.world_size() > 1:
        owned = {parameter for parameter, owner in owners.items() if owner == distributed.rank()}
        optimizers = optim.build_optimizers(model, config, owned)
    if start.resumes or (start.source and config.init_state == "full"):
        optim.load_state_tensors(model, optimizers, checkpoint.read_optimizer(start.source), whole)
    return model, optimizers, whole, owners, initial


def _progress(start: Start, config: RunConfig) -> Progress:
    """Return where the run starts, and warn of what makes resuming inexact."""
    micro_batch_size = config.micro_batch_size or config.batch_size // distributed.world_size()
    progress = Progress(start.step, scored=start.step, micro_batch_size=micro_batch_size)
    if not start.resumes:
        return progress
    state = checkpoint.read_state(start.source)
    progress = Progress(**{name: state[name] for name in asdict(progress) if name in state})
    found = []
    if (version := state.get("arithmetic_version", 1)) != ARITHMETIC_VERSION:
        found.append(f"the code computes differently since step {start.step} (arithmetic version "
                     f"{version}, now {ARITHMETIC_VERSION}), and later validation scores may be "
                     "of other windows")
    if distributed.world_size() > 1:
        progress.micro_batch_size = micro_batch_size
    if config.deterministic and not state.get("sums_as_tree") and 2 * micro_batch_size < (
            config.batch_size):
        found.append("micro-batches are now added in the order of a binary tree")
    recorded = RunConfig.recorded(config.run_dir)
    if recorded and recorded.micro_batch_size != config.micro_batch_size:
        found.append(f"micro_batch_size was {recorded.micro_batch_size}, is "
                     f"{config.micro_batch_size}")
        progress.micro_batch_size = micro_batch_size
    for difference in found:
        warnings.warn(f"Resuming is not bit-identical: {difference}.", stacklevel=2)
    return progress


def record_start(run: Run):
    """Write config.json and environment.json, and open metrics.jsonl and the saver.

    On resume, warn of each difference of the environment that makes it inexact.
    """
    config, model, run_dir = run.config, run.model, run.config.run_dir
    needed = disk_needed(config, model, run.whole, run.progress.step)
    checkpoint.check_space(run_dir, needed)
    before = read_mapping(run_dir / "environment.json") if run.start.resumes else {}
    layout = {"processes": distributed.world_size(), "sharding": config.sharding}
    current = {**environment(run.store, run.start.device), "compiled": run.is_compiled, **layout}
    if config.deterministic:  # neither changes a bit
        before |= layout if before else {}
    for difference in differences(before, current):
        warnings.warn(f"Resuming may not be bit-identical: {difference}.", stacklevel=2)
    parent = run.start.parent
    session = {"from_step": run.progress.step, "total_steps": config.total_steps,
               "started": utc_now()}
    run_dir.mkdir(parents=True, exist_ok=True)
    _remove_later_evaluations(run)
    write_json(run_dir / "environment.json", {
        **current, "init_from": str(parent) if parent else before.get("init_from"),
        "init_weights": weights_hash(parent) if parent else before.get("init_weights"),
        "lineage": run.lineage.state,
        "model": {"parameter_count": parameter_count(model),
                  "active_parameter_count": active_parameter_count(model),
                  "flops_per_token": flops_per_token(model)},
        "audit": run.audit, "sessions": [*before.get("sessions", []), session]})
    run.metrics = Metrics(run_dir / "metrics.jsonl", run.progress.metrics_size)
    # Last: `follow` waits for it.
    write_json(run_dir / "config.json", {**config.to_dict(), **run.leak_mark})
    run.saver = checkpoint.Saver(background=run.start.device.type == "cuda"
                                  and isinstance(run.parallel, Replicas))


def _remove_later_evaluations(run: Run):
    """Delete the evaluations of steps that will be made again."""
    folder = run.config.run_dir / "evaluations"
    if not run.start.resumes:
        shutil.rmtree(folder, ignore_errors=True)
    for file in folder.glob("*_step_*.json"):
        if int(re.search(r"\d+", file.name)[0]) > run.progress.step:
            file.unlink()
