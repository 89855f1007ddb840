"""Audit what exists: a run with its text and scores, a checkpoint, or a Hugging Face model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lmlib import checkpoint, evaluation
from lmlib.audit import Report, check_model, scores, split
from lmlib.config import RunConfig
from lmlib.data import tokens
from lmlib.data.prepare import prepare
from lmlib.data.tokenizer import token_bytes
from lmlib.errors import UserError
from lmlib.files import resolve_path
from lmlib.model.huggingface import CheckpointError
from lmlib.run import preflight
from lmlib.run.environment import check_data
from lmlib.run.lineage import lineage_of
from lmlib.run.records import read_records


def audit(source: str | Path, step: int | None = None) -> list[Report]:
    """Run every check that can be made of a run, a checkpoint, a Hugging Face folder or id.

    A run is audited with its text: its split and tokenizer, its evaluation repeated, its loss by
    position. Of a checkpoint or another model only the model is audited. Raises a ValueError that
    says what is needed if there is no such thing, or it cannot be read or audited.
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
        store = prepare(replace(config, score_test=False), tokenizer=str(path))
        check_data(folder, path, store)
    except ValueError as error:
        return [*reports, Report("split", None, f"the run's text is not here ({error})")]
    return [*reports, *_check_text(store, model, path)]


def _from_hub(name: str, step: int | None) -> nn.Module:
    if step is not None:
        raise UserError(f"{name} is a single model, so step={step} does not apply; give a run's "
                        "folder.")
    import transformers
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a bad folder or no network
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"{name} is not a folder here, and transformers cannot load it: {reason}. "
                        "`lmlib runs` lists the runs.") from error


def _config_in(folder: Path) -> RunConfig:
    """Return the configuration of a run, which may have been moved."""
    folder = folder.absolute()
    return RunConfig.load(folder / "config.json", output_dir=str(folder.parent),
                          run_name=folder.name)


def _check_text(store: tokens.TokenStore, model: nn.Module, path: Path) -> list[Report]:
    """Check a run's text and scores; `path` is the checkpoint of the model."""
    config, step = store.config, checkpoint.verify(path)["step"]
    found = evaluation.evaluate(model, store.evaluation_text("validation"),
                                token_bytes(store.tokenizer, config.vocab_size),
                                config.micro_batch_size or config.batch_size)
    summary, losses = found.summary(), found.losses
    reports = [*_check_documents(store, found, path),
               _check_record(config, summary["val_loss"], step),
               scores.check_sample(summary, len(losses), losses.numel(), found.text.unit),
               preflight.check_evaluation_of(model, found.text.windows)]
    if losses.shape[1] >= 4:
        loss, accuracy = losses.mean(0), found.correct.double().mean(0)
        report = scores.check_profile(loss, accuracy)
        curves = {"losses": loss.tolist(), "accuracies": accuracy.tolist()}
        reports.append(replace(report, numbers=report.numbers | curves))
    return reports


def _check_documents(store: tokens.TokenStore, found: evaluation.Scores,
                     path: Path) -> list[Report]:
    """Check the split, the lineage and the tokenizer, from the documents themselves."""
    lineage = lineage_of(path, store, is_own=True)
    contamination = preflight.check_contamination(path, store, lineage)
    if store.config.split == "windows":
        return [contamination]
    held_out = [text for name in ("validation", "test") for text in store.texts(name)]
    report = split.check_split(store.texts("training"), held_out)
    n = preflight.tokens_per_ngram(store)
    if contamination.passed is False:  # also by an ancestor's text
        report = replace(report, passed=False, summary=f"{report.summary} {contamination.summary}")
    shared = split.shared_spans(store.train, store.validation, found.text.starts,
                                store.config.sequence_length + 1, n)[:, 1:]
    parts = scores.loss_by_overlap(found.losses, shared)
    if parts["share"]:
        report = replace(report, summary=(
            f"{report.summary} Of the scored tokens, {parts['share']:.2%} are in a run of {n} "
            f"tokens of training text; their loss is {parts['shared']:.2f} nats, and without them "
            f"the loss is {parts['new']:.4f} instead of {parts['all']:.4f}."))
    reports = [report, preflight.check_lineage_of(store, lineage)]
    if store.config.tokenizer == "train" and not store.config.init_from:
        return [*reports, split.check_tokenizer(store.tokenizer, store.texts("training"), held_out)]
    return [*reports, Report("tokenizer", None, "it was trained elsewhere, on unknown text.")]


def _check_record(config: RunConfig, again: float, step: int) -> Report:
    """Check whether the run recorded the loss that its checkpoint has."""
    recorded = next((record.get("val_loss") for record in reversed(read_records(config.run_dir))
                     if record.get("kind") == "eval" and record.get("step") == step), None)
    if not isinstance(recorded, int | float):
        return Report("record", None, f"the run has no recorded score at step {step}.")
    return Report("record", abs(recorded - again) < 0.01,
                  f"at step {step} the run recorded {recorded:.6f} nats; measured again from its "
                  f"checkpoint: {again:.6f}.", numbers={"recorded": recorded, "again": again})


def scores_elsewhere(run_dir: str | Path, other: str | Path) -> list[dict[str, Any]]:
    """Score each checkpoint of a run on the validation text of another run.

    Shows what a model knows of text that it was not trained on, in windows of its own length, at
    equal distances over all documents. Raises a ValueError if a run or its text is not here.
    """
    folder, elsewhere = resolve_path(run_dir), resolve_path(other)
    config, rows = replace(_config_in(elsewhere), score_test=False), []
    store = prepare(config, tokenizer=str(checkpoint.find_checkpoint(elsewhere)))
    texts, units = list(store.texts("validation")), store.evaluation_text("validation").units
    for step in checkpoint.checkpoint_steps(folder):
        model, tokenizer = checkpoint.load(folder, step)
        T, eos = model.config.sequence_length, tokenizer.eos_token_id
        encoded = [[*ids, eos] for ids in tokenizer(texts)["input_ids"]]
        text = tokens.EvaluationText.cut(
            "validation", np.concatenate(encoded), list(map(len, encoded)), units,
            windows=32, sequence_length=T, unit=store.info["unit"], data="")
        sizes = token_bytes(tokenizer, model.config.vocab_size)
        rows.append({"step": step, **evaluation.evaluate(model, text, sizes, 4).summary()})
    return rows
