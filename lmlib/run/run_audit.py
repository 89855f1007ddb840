"""Audit what exists: a run with its text and scores, a checkpoint, or a Hugging Face model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lmlib import checkpoint, evaluation
from lmlib.audit import Report, model_checks, scores, split
from lmlib.config import RunConfig
from lmlib.data import tokens
from lmlib.data.prepare import prepare
from lmlib.data.tokenizer import token_bytes
from lmlib.errors import UserError
from lmlib.files import resolve_path
from lmlib.model.huggingface import CheckpointError
from lmlib.parameters import existing_folder
from lmlib.run import preflight
from lmlib.run.environment import check_data
from lmlib.run.lineage import Lineage, lineage_of
from lmlib.run.records import read_records


@dataclass(frozen=True)
class Audit:
    """Checks that are made one by one, as the audit is iterated; `len` is their number."""
    checks: dict[str, Callable[[], Report]]

    def __len__(self) -> int:
        return len(self.checks)

    def __iter__(self) -> Iterator[Report]:
        return (check() for check in self.checks.values())


def audit(source: str | Path, step: int | None = None) -> Audit:
    """Return every check that can be made of a run, a checkpoint, a Hugging Face folder or id.

    A run is audited with its text: its split and tokenizer, its evaluation repeated, its loss by
    position. Of a checkpoint or another model only the model is audited. Iterate to make the
    checks, which takes a minute or more: `for report in audit("outputs/quickstart")`. Raises a
    ValueError that says what is needed if there is no such thing, or it cannot be read or audited.
    """
    if not resolve_path(source).exists() and _is_hub_id(str(source)):
        return Audit(model_checks(_from_hub(str(source), step)))
    folder = existing_folder(source)
    is_run = (folder / "checkpoints").is_dir()
    path = checkpoint.find_checkpoint(folder, step)
    try:
        model: nn.Module = checkpoint.load(path)[0]
    except CheckpointError:
        if is_run or (path / "checkpoint.json").exists():
            raise
        # Of a class that lmlib does not have.
        return Audit(model_checks(_from_hub(str(path), None)))
    if not is_run:
        return Audit(model_checks(model))
    config = config_in(folder)
    checks = model_checks(model, min(512, max(2, config.sequence_length)))
    try:
        store = prepare(replace(config, score_test=False), tokenizer=str(path))
        check_data(folder, path, store)
    except ValueError as error:
        missing = Report("split", None, f"the run's text is not here ({error})")
        return Audit(checks | {"split": lambda: missing})
    return Audit(checks | _TextAudit(store, model, path).checks())


def _is_hub_id(source: str) -> bool:
    """Say whether a source that is no folder here can be an id: "gpt2", "openai-community/gpt2"."""
    is_path = source.startswith(("outputs/", ".", "/", "~")) or source.count("/") > 1
    beside = Path(source).parent if "/" in source else Path("outputs", source)
    return not is_path and not resolve_path(beside).exists()


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


def config_in(folder: Path) -> RunConfig:
    """Return the configuration of a run, which may have been moved."""
    folder = folder.absolute()
    return RunConfig.load(folder / "config.json", output_dir=str(folder.parent),
                          run_name=folder.name)


class _TextAudit:
    """The checks of a run's text and scores; `path` is the checkpoint of the model."""

    def __init__(self, store: tokens.TokenStore, model: nn.Module, path: Path):
        self.store, self.model, self.path, self.config = store, model, path, store.config

    def checks(self) -> dict[str, Callable[[], Report]]:
        checks = {"split": self.check_split, "lineage": self.check_lineage,
                  "tokenizer": self.check_tokenizer, "record": self.check_record,
                  "sample": self.check_sample, "evaluation": self.check_evaluation,
                  "profile": self.check_profile}
        left_out = {"lineage", "tokenizer"} if self.config.split == "windows" else set()
        left_out |= {"profile"} if self.config.sequence_length < 4 else set()
        return {name: check for name, check in checks.items() if name not in left_out}

    @cached_property
    def found(self) -> evaluation.Scores:
        """The evaluation, repeated from the checkpoint."""
        config = self.config
        sizes = token_bytes(self.store.tokenizer, config.vocab_size)
        return evaluation.evaluate(self.model, self.store.evaluation_text("validation"), sizes,
                                   config.micro_batch_size or config.batch_size)

    @cached_property
    def known(self) -> Lineage:
        return lineage_of(self.path, self.store, is_own=True)

    def held_out(self) -> list[str]:
        return [text for name in ("validation", "test") for text in self.store.texts(name)]

    def check_split(self) -> Report:
        """Compare held-out documents and tokens with the training text, the run's and others'."""
        store, found = self.store, self.found
        contamination = preflight.check_contamination(self.path, store, self.known)
        if self.config.split == "windows":
            return contamination
        report = split.check_split(store.texts("training"), self.held_out())
        n = preflight.tokens_per_ngram(store)
        if contamination.passed is False:  # also by an ancestor's text
            report = replace(report, passed=False,
                             summary=f"{report.summary} {contamination.summary}")
        shared = split.shared_spans(store.train, store.validation, found.text.starts,
                                    self.config.sequence_length + 1, n)[:, 1:]
        losses = found.losses
        if not shared.any():
            return report
        return replace(report, summary=(
            f"{report.summary} Of the scored tokens, {shared.double().mean():.2%} are in a run of "
            f"{n} tokens of training text; their loss is {losses[shared].mean():.2f} nats, and "
            f"without them the loss is {losses[~shared].mean():.4f} instead of "
            f"{losses.mean():.4f}."))

    def check_lineage(self) -> Report:
        return preflight.check_lineage_of(self.store, self.known)

    def check_tokenizer(self) -> Report:
        if self.config.tokenizer == "train" and not self.config.init_from:
            return split.check_tokenizer(self.store.tokenizer, self.store.texts("training"),
                                         self.held_out())
        return Report("tokenizer", None, "it was trained elsewhere, on unknown text.")

    def check_record(self) -> Report:
        """Check whether the run recorded the loss that its checkpoint has."""
        step, again = checkpoint.verify(self.path)["step"], self.found.summary()["val_loss"]
        records = reversed(read_records(self.config.run_dir))
        recorded = next((record.get("val_loss") for record in records
                         if record.get("kind") == "eval" and record.get("step") == step), None)
        if not isinstance(recorded, int | float):
            return Report("record", None, f"the run has no recorded score at step {step}.")
        return Report("record", abs(recorded - again) < 0.01,
                      f"at step {step} the run recorded {recorded:.6f} nats; measured again from "
                      f"its checkpoint: {again:.6f}.",
                      numbers={"recorded": recorded, "again": again})

    def check_sample(self) -> Report:
        losses = self.found.losses
        return scores.check_sample(self.found.summary(), len(losses), losses.numel(),
                                   self.found.text.unit)

    def check_evaluation(self) -> Report:
        return preflight.check_evaluation_of(self.model, self.found.text.windows)

    def check_profile(self) -> Report:
        loss, accuracy = self.found.losses.mean(0), self.found.correct.double().mean(0)
        report = scores.check_profile(loss, accuracy)
        curves = {"losses": loss.tolist(), "accuracies": accuracy.tolist()}
        return replace(report, numbers=report.numbers | curves)


def scores_elsewhere(run_dir: str | Path, other: str | Path) -> list[dict[str, Any]]:
    """Score each checkpoint of a run on the validation text of another run.

    Shows what a model knows of text that it was not trained on, in windows of its own length, at
    equal distances over all documents. Raises a ValueError if a run or its text is not here.
    """
    folder, elsewhere = resolve_path(run_dir), resolve_path(other)
    config, rows = replace(config_in(elsewhere), score_test=False), []
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
