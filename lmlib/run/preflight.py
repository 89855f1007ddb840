"""The audit of a run before step 1: refuse a leak, or mark the run if `allow_leaks` permits it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmlib import audit, evaluation
from lmlib.audit import Report
from lmlib.audit.split import NGRAM
from lmlib.config import RunConfig
from lmlib.data.tokens import TokenStore
from lmlib.leaks import Leaky, known_leaks
from lmlib.model.transformer import LanguageModel
from lmlib.run.lineage import Lineage, ancestors_tokens
from lmlib.run.start import Start


def before_training(start: Start, config: RunConfig, model: LanguageModel, store: TokenStore,
                    lineage: Lineage) -> dict[str, Any]:
    """Run the checks that take seconds, and check that what the run starts from did not leak.

    Returns `passed`, `allow_leaks`, `leaks` (the failed checks that no run may fail, as text) and
    `verdicts`: one sentence per check. Raises `Leaky` if the run leaks and `allow_leaks` is false.
    """
    reports = quick_checks(config, model, store)
    reports += [check_contamination(start.source, store, lineage), check_lineage_of(store, lineage)]
    if start.parent and (theirs := known_leaks(start.parent)):
        reports.append(Report("init_from", False,
                              f"the model that it starts from leaks ({theirs})."))
    failed = {report.check for report in reports if report.passed is False}
    before = known_leaks(config.run_dir) if start.resumes else ""
    if before and not failed >= set(before.split(", ")):  # its weights were trained that way
        reports.append(Report("earlier steps", False, f"they leaked ({before})."))
    leaks = [report for report in reports if report.passed is False]
    if leaks and not config.allow_leaks:
        found = "\n".join(f"  - {report.check}: {report.summary}" for report in leaks)
        raise Leaky(f"This run leaks, so its scores would be meaningless; nothing was trained:\n"
                    f"{found}\nFix the leak. To study what it does, set allow_leaks: true, which "
                    "marks every result of the run.")
    return {"passed": all(report.passed is not False for report in reports),
            "allow_leaks": config.allow_leaks,
            "leaks": ", ".join(report.check for report in leaks),
            "verdicts": {report.check: str(report) for report in reports}}


def quick_checks(config: RunConfig, model: LanguageModel, store: TokenStore) -> list[Report]:
    """Run the checks that take a second or less each for quickstart."""
    (ids, targets), V, length = store.batch(1), config.vocab_size, max(2, config.sequence_length)
    reports = [audit.check_causality(model, V, length, quick=True),
               audit.check_batch_independence(model, V, length, quick=True),
               audit.check_cache(model, V, min(length, 12))]
    if config.sequence_length > 1:
        reports.append(audit.check_labels(model, ids[:2], targets[:2], vocab_size=V))
    return [*reports, check_evaluation_of(model, store.validation_windows())]


def check_evaluation_of(model: LanguageModel, windows: Tensor) -> Report:
    """Check the evaluation that scores runs, on four windows."""
    def mean_loss(model: LanguageModel, rows: Tensor) -> float:
        return float(evaluation.score_windows(model, rows, 2)[0].mean())

    return audit.check_evaluation(mean_loss, model, windows[torch.arange(4) % len(windows)])


def check_contamination(source: Path | None, store: TokenStore, lineage: Lineage) -> Report:
    """Check whether the scored text is in training text, the run's or an ancestor's.

    `source` is the model folder that the run starts from, if any.
    """
    if store.config.split == "windows":
        return _check_overlapping(store)
    n, length = tokens_per_ngram(store), store.config.sequence_length + 1
    ancestors, missing = ancestors_tokens(lineage, source, store)
    reports = []
    for split in ("validation", "test"):
        if not store.window_count(split):
            continue
        text = store.evaluation_text(split)
        stream = store.test if split == "test" else store.validation
        of_ancestors = ((f"{split}, with an ancestor's text", tokens) for tokens in ancestors)
        for name, tokens in [(split, store.train), *of_ancestors]:
            report = audit.check_tokens(tokens, stream, text.starts, length, n)
            reports.append(replace(report, summary=f"{name}: {report.summary.rstrip('.')}"))
    failed = [report for report in reports if report.passed is False]
    worst = max(failed or reports, key=lambda report: report.numbers.get("share of tokens", 0))
    summary = "; ".join(report.summary for report in failed or reports)
    if missing or not lineage.is_complete:
        summary += ("; the text of an ancestor is not here, so of its documents only exact copies "
                    "are found (see lineage)")
    return replace(worst, summary=f"{summary}.")


def _check_overlapping(store: TokenStore) -> Report:
    windows = store.validation_windows()
    report = audit.check_windows(store.train, windows, tokens_per_ngram(store))
    if report.passed is False:
        return report
    return replace(report, passed=False,  # too short to show it
                   summary=f"training and validation windows overlap in one text. {report.summary}")


def check_lineage_of(store: TokenStore, lineage: Lineage) -> Report:
    """Check whether held-out documents were trained on, by the run or by an ancestor."""
    if store.config.split == "windows":
        return Report("lineage", None, "with split: windows no document is held out.")
    held_out = np.concatenate([store.documents(split)[:, 0] for split in ("validation", "test")])
    return audit.check_lineage(lineage.hashes, held_out, lineage.is_complete)


def tokens_per_ngram(store: TokenStore) -> int:
    """Return how many tokens are as long as 13 English words, of 5.4 bytes with their space."""
    training = store.info["training"]
    return max(NGRAM, round(NGRAM * 5.4 * training["tokens"] / max(1, training["bytes"])))
