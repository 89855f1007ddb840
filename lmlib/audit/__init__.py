"""Leak checks for any nn.Module or text: `print(lmlib.audit.check_causality(model))`."""

from torch import nn

from lmlib.audit.causality import check_causality
from lmlib.audit.invariance import check_batch_independence, check_cache
from lmlib.audit.labels import check_labels
from lmlib.audit.report import Leak, Report
from lmlib.audit.scores import check_evaluation, check_profile, check_sample, is_noise
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
    checks = (check_causality, check_batch_independence, check_cache)
    reports = [check(model, sequence_length=sequence_length) for check in checks]
    try:
        return [*reports, check_labels(model)]
    except ValueError as error:  # many models compute no loss
        return [*reports, Report("labels", None, str(error))]
