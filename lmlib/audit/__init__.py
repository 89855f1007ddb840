"""Leak checks for any nn.Module or text: `print(lmlib.audit.check_causality(model))`."""

from collections.abc import Callable
from functools import partial

from torch import nn

from lmlib.audit.causality import check_causality
from lmlib.audit.invariance import check_batch_independence, check_cache
from lmlib.audit.labels import check_labels
from lmlib.audit.report import Leak, Report
from lmlib.audit.scores import check_evaluation, check_profile, check_sample
from lmlib.audit.split import (
    check_lineage,
    check_split,
    check_tokenizer,
    check_tokens,
    check_windows,
)

__all__ = ["Leak", "Report", "check_batch_independence", "check_cache", "check_causality",
           "check_evaluation", "check_labels", "check_lineage", "check_model", "check_profile",
           "check_sample", "check_split", "check_tokenizer", "check_tokens", "check_windows",
           "is_noise"]


def check_model(model: nn.Module, sequence_length: int | None = None) -> list[Report]:
    """Run the checks that need only a model; `sequence_length` limits the window (see `Probe`)."""
    return [check() for check in model_checks(model, sequence_length).values()]


def model_checks(model: nn.Module,
                 sequence_length: int | None = None) -> dict[str, Callable[[], Report]]:
    """Return the checks of `check_model` by name, to be called one by one."""
    checks = {"causality": check_causality, "batch independence": check_batch_independence,
              "cache": check_cache}
    return {name: partial(check, model, sequence_length=sequence_length)
            for name, check in checks.items()} | {"labels": partial(_labels, model)}


def _labels(model: nn.Module) -> Report:
    try:
        return check_labels(model)
    except ValueError as error:  # many models compute no loss
        return Report("labels", None, str(error))
