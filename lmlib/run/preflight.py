"""The checks before step 1."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmlib import evaluation
from lmlib.audit.causality import check_causality
from lmlib.audit.invariance import check_batch_independence, check_cache
from lmlib.audit.labels import check_labels
from lmlib.audit.report import Report
from lmlib.audit.scores import check_evaluation
from lmlib.audit.split import NGRAM, check_windows
from lmlib.config import RunConfig
from lmlib.data.tokens import TokenStore
from lmlib.leaks import Leaky, known_leaks
from lmlib.model.transformer import LanguageModel


def before_training(
    config: RunConfig, model: LanguageModel, store: TokenStore, windows: Tensor, parent: Path | None = None
) -> dict[str, Any]:
    """What the cheap checks of a run find: its model, its labels, its held-out windows (W, T + 1) and how they are scored; and
    whether the `parent` whose weights it starts from leaked.

    Returns:
        `passed`, `allow_leaks`, `leaks` (the failed checks that a run may not fail, as text), and `verdicts`: a sentence a check.

    Raises:
        Leaky: the run leaks, and its `allow_leaks` is false.
    """
    reports = checks(config, model, store, windows)
    if parent and (theirs := known_leaks(parent)):
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


def checks(config: RunConfig, model: LanguageModel, store: TokenStore, windows: Tensor) -> list[Report]:
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


def _check_split(config: RunConfig, store: TokenStore, windows: Tensor) -> Report:
    found = check_windows(store.train, windows, _run_of_words(store))
    if config.split == "windows" and found.passed is not False:  # too short to show it
        return replace(found, passed=False, summary=f"training and held-out windows overlap in one text. {found.summary}")
    return found


def _run_of_words(store: TokenStore) -> int:
    """How many tokens are as long as 13 English words, of 5.4 bytes each with the space behind."""
    side = store.info["training"]
    return max(NGRAM, round(NGRAM * 5.4 * side["tokens"] / max(1, side["bytes"])))


def _refuses(config: RunConfig, report: Report) -> bool:
    """Whether a run that fails a check is refused. Text that both sides happen to share is only said; a split that cuts
    both sides from one text is a leak by its making."""
    return report.check != "split" or config.split == "windows"
