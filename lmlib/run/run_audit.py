"""The audit of a run, a checkpoint or a Hugging Face model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lmlib import checkpoint, evaluation
from lmlib.audit import check_model
from lmlib.audit.report import Report
from lmlib.audit.scores import check_profile, check_sample, loss_by_overlap
from lmlib.audit.split import check_split, check_tokenizer, shared_windows
from lmlib.config import RunConfig
from lmlib.data.tokenizer import token_bytes
from lmlib.data.tokens import window_count, windows
from lmlib.files import resolve_path
from lmlib.model import huggingface
from lmlib.model.transformer import LanguageModel
from lmlib.run.preflight import _check_evaluation, _check_split, _run_of_words
from lmlib.run.records import parse_record
from lmlib.run.start import open_store


def audit(source: str | Path, step: int | None = None) -> list[Report]:
    """Every check that can be made of a run, a checkpoint, a Hugging Face folder or a Hugging Face id ("owner/name").

    A run is judged with its text: its split and tokenizer, its evaluation made again, its loss by position. Of a model alone
    only the model is judged.

    Raises:
        ValueError: there is no such thing, it cannot be read, or it cannot be audited; the sentence says what is needed.
    """
    folder = resolve_path(source)
    if not folder.exists():
        return check_model(_from_hub(str(source), step))
    is_run = (folder / "checkpoints").is_dir()
    path = checkpoint.find_checkpoint(folder, step)
    try:
        model: nn.Module = checkpoint.load(path)[0]
    except huggingface.CheckpointError:
        if is_run or (path / "checkpoint.json").exists():
            raise
        return check_model(_from_hub(str(path), None))
    if not is_run:
        return check_model(model)
    config = RunConfig.load(folder / "config.json", output_dir=str(folder.absolute().parent), run_name=folder.absolute().name)
    of_model = check_model(model, min(512, max(2, config.sequence_length)))
    return [*of_model, *_of_text(config, model, checkpoint.verify(path)["step"])]


def _from_hub(name: str, step: int | None) -> nn.Module:
    import transformers

    if step is not None:
        raise ValueError(f"{name} is one model, so step={step} means nothing; give a run's folder.")
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a strange folder or no network makes it stumble over
        what = " ".join(str(error).split())[:300].rstrip(".")
        raise ValueError(
            f"{name} is no folder here, and cannot be loaded by transformers: {what}. `python -m lmlib runs` lists the runs."
        ) from error


def _of_text(config: RunConfig, model: LanguageModel, step: int) -> list[Report]:
    """The checks of a run's text and scores."""
    try:
        store = open_store(config)
    except ValueError as error:
        return [Report("split", None, f"the run's text is not here ({error})")]
    windows, reports = store.validation_windows(), []
    losses, right = evaluation.score_windows(model, windows, config.micro_batch_size or config.batch_size)
    n = _run_of_words(store)
    shared = shared_windows(store.train, windows, n)[:, 1:]
    parts = loss_by_overlap(losses, shared)
    if config.split == "windows":
        reports.append(_check_split(config, store, windows))
    else:
        training, held_out = store.texts(False), store.texts(True)
        found = check_split(training, held_out)
        if parts["share"]:
            words = f" Of the scored tokens, {parts['share']:.2%} stand in a run of {n} tokens of training text; they cost "
            words += (
                f"{parts['shared']:.2f} nats each, and without them the loss is {parts['new']:.4f} instead of {parts['all']:.4f}."
            )
            found = replace(found, summary=found.summary + words)
        reports.append(found)
        if config.tokenizer == "train" and not config.init_from:
            reports.append(check_tokenizer(store.tokenizer, training, held_out))
        else:
            reports.append(Report("tokenizer", None, "it was made elsewhere; what it has seen is not known here."))
    scores = evaluation.summarize(losses, right, windows[:, 1:], token_bytes(store.tokenizer, config.vocab_size))
    reports += [_as_recorded(config, scores, step), check_sample(scores, len(windows), losses.numel())]
    reports.append(_check_evaluation(model, windows))
    if losses.shape[1] >= 4:
        by_position = losses.mean(0), right.double().mean(0)
        found = check_profile(*by_position)
        curves = {"losses": by_position[0].tolist(), "accuracies": by_position[1].tolist()}
        reports.append(replace(found, numbers={**found.numbers, **curves}))
    return reports


def _as_recorded(config: RunConfig, scores: dict[str, Any], step: int) -> Report:
    """Whether the score that the run wrote down is the one that its checkpoint has."""
    file = config.run_dir / "metrics.jsonl"
    lines = file.read_text("utf-8", "replace").splitlines() if file.exists() else []
    records = [record for record in map(parse_record, lines) if isinstance(record, dict)]
    found = [record.get("val_loss") for record in records if record.get("kind") == "eval" and record.get("step") == step]
    if not found or not isinstance(found[-1], int | float):
        return Report("record", None, f"the run has no score of step {step} in its records.")
    recorded, again = found[-1], scores["val_loss"]
    words = f"at step {step} the run wrote {recorded:.6f} nats; measured again from its checkpoint: {again:.6f}."
    return Report("record", abs(recorded - again) < 0.01, words, numbers={"recorded": recorded, "again": again})


def scores_elsewhere(run_dir: str | Path, other: str | Path) -> list[dict[str, Any]]:
    """The scores of each checkpoint of a run on the held-out text of another, in windows of the first run's length: what a
    model knows of text that it was not trained on.

    Raises:
        ValueError: a run or its text is not here.
    """
    folder, elsewhere = resolve_path(run_dir), resolve_path(other)
    texts = open_store(RunConfig.load(elsewhere / "config.json", output_dir=str(elsewhere.absolute().parent))).texts(True)
    rows = []
    for step in checkpoint.checkpoint_steps(folder):
        model, tokenizer = checkpoint.load(folder, step)
        T = model.config.sequence_length
        ids = np.array([i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        rows_of_tokens = windows(ids, np.arange(min(32, window_count(ids, T))) * T, T)
        losses, right = evaluation.score_windows(model, rows_of_tokens, 4)
        sizes = token_bytes(tokenizer, model.config.vocab_size)
        rows.append({"step": step, **evaluation.summarize(losses, right, rows_of_tokens[:, 1:], sizes)})
    return rows
