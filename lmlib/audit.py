"""Can this number be trusted: every check, before a run begins and of whatever is there.

The checks are usable one by one, on any model or text; here they are put together.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmlib import checkpoint, data, evaluation, run_folder, session
from lmlib.causality import Leak, Report, check_causality
from lmlib.config import RunConfig, resolve_path
from lmlib.consistency import check_batch_independence, check_cache, check_labels
from lmlib.model import LanguageModel
from lmlib.overlap import (
    NGRAM,
    check_evaluation,
    check_profile,
    check_sample,
    check_split,
    check_tokenizer,
    check_windows,
    is_noise,
    resting_on_shared,
    shared_windows,
)

__all__ = [  # every check by one name
    "Leak",
    "Leaky",
    "Report",
    "audit",
    "before_training",
    "check_batch_independence",
    "check_cache",
    "check_causality",
    "check_evaluation",
    "check_labels",
    "check_model",
    "check_profile",
    "check_sample",
    "check_split",
    "check_tokenizer",
    "check_windows",
    "is_noise",
    "resting_on_shared",
    "scores_elsewhere",
]


class Leaky(ValueError):
    """A model or a split that leaks; nothing was trained."""


# ---------------------------------------------------------------------------------------------------
# Before step 1


def before_training(
    config: RunConfig, model: LanguageModel, store: data.TokenStore, windows: Tensor, parent: Path | None = None
) -> dict[str, Any]:
    """What the cheap checks of a run find: its model, its labels, its held-out windows (W, T + 1) and how they are scored; and
    whether the `parent` whose weights it starts from leaked.

    Returns:
        `passed`, `allow_leaks`, `leaks` (the failed checks that a run may not fail, as text), and `verdicts`: a sentence a check.

    Raises:
        Leaky: the run leaks, and its `allow_leaks` is false.
    """
    reports = checks(config, model, store, windows)
    if parent and (theirs := run_folder.known_leaks(parent)):
        reports.append(Report("init_from", False, f"the model that it starts from leaks ({theirs})."))
    leaks = [report for report in reports if report.passed is False and _refuses(config, report)]
    if leaks and not config.allow_leaks:
        found = "\n".join(f"  - {report.check}: {report.summary}" for report in leaks)
        raise Leaky(
            f"This run leaks, so its scores would mean nothing, and nothing was trained:\n{found}\n"
            "Mend it; or, to see what a leak does, set allow_leaks: true, which marks everything that the run shows."
        )
    return {
        "passed": all(report.passed is not False for report in reports),
        "allow_leaks": config.allow_leaks,
        "leaks": ", ".join(report.check for report in leaks),
        "verdicts": {report.check: str(report) for report in reports},
    }


def checks(config: RunConfig, model: LanguageModel, store: data.TokenStore, windows: Tensor) -> list[Report]:
    """The cheap checks, each of a second or less for quickstart."""
    (ids, targets), V = store.batch(1), config.vocab_size
    length = max(2, config.sequence_length)
    return [
        check_causality(model, V, length, quick=True),
        check_batch_independence(model, V, length, quick=True),
        check_cache(model, V, min(length, 12)),
        *([check_labels(model, ids[:2], targets[:2], vocab_size=V)] if config.sequence_length > 1 else []),
        _check_split(config, store, windows),
        _check_evaluation(model, windows),
    ]


def _check_evaluation(model: LanguageModel, windows: Tensor) -> Report:
    """Of the evaluation that runs are scored by, on four windows."""
    four = windows[torch.arange(4) % len(windows)]
    return check_evaluation(lambda model, rows: float(evaluation.score_windows(model, rows, 2)[0].mean()), model, four)


def _check_split(config: RunConfig, store: data.TokenStore, windows: Tensor) -> Report:
    found = check_windows(store.train, windows, _run_of_words(store))
    if config.split == "windows" and found.passed is not False:  # too short to show it
        return replace(found, passed=False, summary=f"training and held-out windows overlap in one text. {found.summary}")
    return found


def _run_of_words(store: data.TokenStore) -> int:
    """How many tokens are as long as 13 English words, of 5.4 bytes each with the space behind."""
    side = store.info["training"]
    return max(NGRAM, round(NGRAM * 5.4 * side["tokens"] / max(1, side["bytes"])))


def _refuses(config: RunConfig, report: Report) -> bool:
    """Whether a run that fails a check is refused. Text that both sides happen to share is only said; a split that cuts
    both sides from one text is a leak by its making."""
    return report.check != "split" or config.split == "windows"


# ---------------------------------------------------------------------------------------------------
# Of whatever is there


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
    except checkpoint.CheckpointError:
        if is_run or (path / "checkpoint.json").exists():
            raise
        return check_model(_from_hub(str(path), None))
    if not is_run:
        return check_model(model)
    config = RunConfig.load(folder / "config.json", output_dir=str(folder.absolute().parent), run_name=folder.absolute().name)
    of_model = check_model(model, min(512, max(2, config.sequence_length)))
    return [*of_model, *_of_text(config, model, checkpoint.verify(path)["step"])]


def check_model(model: nn.Module, sequence_length: int | None = None) -> list[Report]:
    """The checks of a model alone, in windows of up to `sequence_length` tokens (None: what it says, or 256 if that is more)."""
    checks = (check_causality, check_batch_independence, check_cache)
    reports = [check(model, sequence_length=sequence_length) for check in checks]
    try:
        return [*reports, check_labels(model)]
    except ValueError as error:  # no loss that is known
        return [*reports, Report("labels", None, str(error))]


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
        store = session.open_store(config)
    except ValueError as error:
        return [Report("split", None, f"the run's text is not here ({error})")]
    windows, reports = store.validation_windows(), []
    losses, right = evaluation.score_windows(model, windows, config.micro_batch_size or config.batch_size)
    n = _run_of_words(store)
    shared = shared_windows(store.train, windows, n)[:, 1:]
    parts = resting_on_shared(losses, shared)
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
    scores = evaluation.summarise(losses, right, windows[:, 1:], data.token_bytes(store.tokenizer, config.vocab_size))
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
    records = [record for record in map(run_folder.parsed, lines) if isinstance(record, dict)]
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
    texts = session.open_store(RunConfig.load(elsewhere / "config.json", output_dir=str(elsewhere.absolute().parent))).texts(True)
    rows = []
    for step in checkpoint.checkpoint_steps(folder):
        model, tokenizer = checkpoint.load(folder, step)
        T = model.config.sequence_length
        ids = np.array([i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        windows = data.windows(ids, np.arange(min(32, data.window_count(ids, T))) * T, T)
        losses, right = evaluation.score_windows(model, windows, 4)
        sizes = data.token_bytes(tokenizer, model.config.vocab_size)
        rows.append({"step": step, **evaluation.summarise(losses, right, windows[:, 1:], sizes)})
    return rows
