"""The audit of a run before step 1: refuse a leak, or mark the run if `allow_leaks` permits it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmlib import audit, evaluation
from lmlib.audit import Report
from lmlib.audit.split import NGRAM
from lmlib.config import RunConfig
from lmlib.data.tokens import TokenStore
from lmlib.leaks import Leaky, known_leaks
from lmlib.model.transformer import LanguageModel


def before_training(config: RunConfig, model: LanguageModel, store: TokenStore, windows: Tensor,
                    parent: Path | None = None) -> dict[str, Any]:
    """Run the checks that take seconds, and check that `parent`, if any, did not leak.

    Args:
        windows: the validation windows, (W, T + 1).
        parent: the model folder that the run is initialized from.

    Returns `passed`, `allow_leaks`, `leaks` (the failed checks that no run may fail, as text) and
    `verdicts`: one sentence per check. Raises `Leaky` if the run leaks and `allow_leaks` is false.
    """
    reports = quick_checks(config, model, store, windows)
    if parent and (theirs := known_leaks(parent)):
        reports.append(Report("init_from", False,
                              f"the model that it starts from leaks ({theirs})."))
    # Text that happens to be in both splits is only reported; a split that cuts both from one text
    # leaks by construction.
    leaks = [report for report in reports if report.passed is False
             and (report.check != "split" or config.split == "windows")]
    if leaks and not config.allow_leaks:
        found = "\n".join(f"  - {report.check}: {report.summary}" for report in leaks)
        raise Leaky(f"This run leaks, so its scores would be meaningless; nothing was trained:\n"
                    f"{found}\nFix the leak. To study what it does, set allow_leaks: true, which "
                    "marks every result of the run.")
    return {"passed": all(report.passed is not False for report in reports),
            "allow_leaks": config.allow_leaks,
            "leaks": ", ".join(report.check for report in leaks),
            "verdicts": {report.check: str(report) for report in reports}}


def quick_checks(config: RunConfig, model: LanguageModel, store: TokenStore,
                 windows: Tensor) -> list[Report]:
    """Run the checks that take a second or less each for quickstart."""
    (ids, targets), V, length = store.batch(1), config.vocab_size, max(2, config.sequence_length)
    reports = [audit.check_causality(model, V, length, quick=True),
               audit.check_batch_independence(model, V, length, quick=True),
               audit.check_cache(model, V, min(length, 12))]
    if config.sequence_length > 1:
        reports.append(audit.check_labels(model, ids[:2], targets[:2], vocab_size=V))
    return [*reports, check_split_of(config, store, windows), check_evaluation_of(model, windows)]


def check_evaluation_of(model: LanguageModel, windows: Tensor) -> Report:
    """Check the evaluation that scores runs, on four windows."""
    def mean_loss(model: LanguageModel, rows: Tensor) -> float:
        return float(evaluation.score_windows(model, rows, 2)[0].mean())

    return audit.check_evaluation(mean_loss, model, windows[torch.arange(4) % len(windows)])


def check_split_of(config: RunConfig, store: TokenStore, windows: Tensor) -> Report:
    """Check whether validation windows are in training text."""
    report = audit.check_windows(store.train, windows, tokens_per_ngram(store))
    if config.split == "windows" and report.passed is not False:  # too short to show it
        return replace(report, passed=False, summary="training and validation windows overlap in "
                                                     f"one text. {report.summary}")
    return report


def tokens_per_ngram(store: TokenStore) -> int:
    """Return how many tokens are as long as 13 English words, of 5.4 bytes with their space."""
    training = store.info["training"]
    return max(NGRAM, round(NGRAM * 5.4 * training["tokens"] / max(1, training["bytes"])))
