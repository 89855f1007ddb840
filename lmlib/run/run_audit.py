"""Audit what exists: a run with its text and scores, a checkpoint, or a Hugging Face model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmlib import checkpoint, evaluation
from lmlib.audit import check_model
from lmlib.audit.report import Report
from lmlib.audit.scores import check_profile, check_sample, loss_by_overlap
from lmlib.audit.split import check_split, check_tokenizer, shared_windows
from lmlib.config import RunConfig
from lmlib.data import tokens
from lmlib.data.prepare import prepare
from lmlib.data.tokenizer import token_bytes
from lmlib.data.tokens import TokenStore
from lmlib.files import resolve_path
from lmlib.model.huggingface import CheckpointError
from lmlib.run.preflight import check_evaluation_of, check_split_of, tokens_per_ngram
from lmlib.run.records import read_records


def audit(source: str | Path, step: int | None = None) -> list[Report]:
    """Run every check that can be made.

    A run is audited with its text: its split and tokenizer, its evaluation repeated, its loss by
    position. Of a checkpoint or another model only the model is audited.

    Args:
        source: a run, a checkpoint, a Hugging Face folder, or a Hugging Face id ("owner/name").

    Raises:
        ValueError: there is no such thing, or it cannot be read or audited; says what is needed.
    """
    folder = resolve_path(source)
    if not folder.exists():
        return check_model(_from_hub(str(source), step))
    is_run = (folder / "checkpoints").is_dir()
    path = checkpoint.find_checkpoint(folder, step)
    try:
        model: nn.Module = checkpoint.load(path)[0]
    except CheckpointError:
        if is_run or (path / "checkpoint.json").exists():
            raise
        return check_model(_from_hub(str(path), None))  # of a class that lmlib does not have
    if not is_run:
        return check_model(model)
    config = _config_in(folder)
    reports = check_model(model, min(512, max(2, config.sequence_length)))
    try:
        store = _store(config, path)
    except ValueError as error:
        return [*reports, Report("split", None, f"the run's text is not here ({error})")]
    return [*reports, *_check_text(config, store, model, checkpoint.verify(path)["step"])]


def _from_hub(name: str, step: int | None) -> nn.Module:
    import transformers

    if step is not None:
        raise ValueError(f"{name} is a single model, so step={step} does not apply; give a run's "
                         "folder.")
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a bad folder or no network
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ValueError(f"{name} is not a folder here, and transformers cannot load it: {reason}. "
                         "`lmlib runs` lists the runs.") from error


def _config_in(folder: Path) -> RunConfig:
    folder = folder.absolute()
    return RunConfig.load(folder / "config.json", output_dir=str(folder.parent),
                          run_name=folder.name)


def _store(config: RunConfig, path: Path) -> TokenStore:
    """Return the token store of a run, one of whose checkpoints is `path`."""
    return prepare(config, tokenizer=str(path) if config.init_from else None)


def _check_text(config: RunConfig, store: TokenStore, model: nn.Module, step: int) -> list[Report]:
    """Check a run's text and scores."""
    windows = store.validation_windows()
    losses, correct = evaluation.score_windows(
        model, windows, config.micro_batch_size or config.batch_size)
    reports = _check_documents(config, store, windows, losses)
    sizes = token_bytes(store.tokenizer, config.vocab_size)
    scores = evaluation.summarize(losses, correct, windows[:, 1:], sizes)
    reports += [_check_record(config, scores, step),
                check_sample(scores, len(windows), losses.numel()),
                check_evaluation_of(model, windows)]
    if losses.shape[1] >= 4:
        by_position = losses.mean(0), correct.double().mean(0)
        report = check_profile(*by_position)
        curves = dict(zip(("losses", "accuracies"), (c.tolist() for c in by_position), strict=True))
        reports.append(replace(report, numbers={**report.numbers, **curves}))
    return reports


def _check_documents(config: RunConfig, store: TokenStore, windows: Tensor,
                     losses: Tensor) -> list[Report]:
    """Check the split and the tokenizer, from the documents themselves."""
    if config.split == "windows":
        return [check_split_of(config, store, windows)]
    training, held_out = store.texts(False), store.texts(True)
    report, n = check_split(training, held_out), tokens_per_ngram(store)
    parts = loss_by_overlap(losses, shared_windows(store.train, windows, n)[:, 1:])
    if parts["share"]:
        report = replace(report, summary=(
            f"{report.summary} Of the scored tokens, {parts['share']:.2%} are in a run of {n} "
            f"tokens of training text; their loss is {parts['shared']:.2f} nats, and without them "
            f"the loss is {parts['new']:.4f} instead of {parts['all']:.4f}."))
    if config.tokenizer == "train" and not config.init_from:
        return [report, check_tokenizer(store.tokenizer, training, held_out)]
    return [report, Report("tokenizer", None, "it was trained elsewhere, on unknown text.")]


def _check_record(config: RunConfig, scores: dict[str, Any], step: int) -> Report:
    """Check whether the score that the run recorded is the one that its checkpoint has."""
    found = [record.get("val_loss") for record in read_records(config.run_dir)
             if record.get("kind") == "eval" and record.get("step") == step]
    if not found or not isinstance(found[-1], int | float):
        return Report("record", None, f"the run has no recorded score at step {step}.")
    recorded, again = found[-1], scores["val_loss"]
    return Report("record", abs(recorded - again) < 0.01,
                  f"at step {step} the run recorded {recorded:.6f} nats; measured again from its "
                  f"checkpoint: {again:.6f}.", numbers={"recorded": recorded, "again": again})


def scores_elsewhere(run_dir: str | Path, other: str | Path) -> list[dict[str, Any]]:
    """Score each checkpoint of a run on the validation text of another run.

    Shows what a model knows of text that it was not trained on, in windows of its own length.

    Raises:
        ValueError: a run or its text is not here.
    """
    folder, elsewhere = resolve_path(run_dir), resolve_path(other)
    config = _config_in(elsewhere)
    own = checkpoint.find_checkpoint(elsewhere) if config.init_from else elsewhere
    texts, rows = _store(config, own).texts(True), []
    for step in checkpoint.checkpoint_steps(folder):
        model, tokenizer = checkpoint.load(folder, step)
        T, eos = model.config.sequence_length, tokenizer.eos_token_id
        ids = np.array([i for text in texts for i in [*tokenizer(text)["input_ids"], eos]])
        count = min(32, tokens.window_count(ids, T))
        windows = tokens.windows(ids, np.arange(count) * T, T)
        losses, correct = evaluation.score_windows(model, windows, 4)
        sizes = token_bytes(tokenizer, model.config.vocab_size)
        scores = evaluation.summarize(losses, correct, windows[:, 1:], sizes)
        rows.append({"step": step, **scores})
    return rows
