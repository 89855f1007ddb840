"""What a check returns, and the thresholds that all checks share."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lmlib.text import printable

# A leak changes a logit by more than this, in standard deviations of the logits. Float32 rounding
# usually stays below it, and what exceeds it is computed again in float64.
TOLERANCE = 1e-5
REPEATS = 8  # a leak that shows in every second call escapes so many calls once in 256 audits


class Leak(NamedTuple):
    """Logits at position t depend on the token at s (batch independence: row t on row s)."""
    t: int
    s: int
    change: float  # in standard deviations of the logits
    length: int  # of the window
    mode: str  # "evaluation", "training" or "with a cache"


@dataclass(frozen=True)
class Report:
    """The result of one check; `passed` is None if the check could not be made."""
    check: str
    passed: bool | None
    summary: str
    leaks: list[Leak] = field(default_factory=list)
    pattern: str = ""  # the kind of fault: "whole window", "blocks of 16", "near duplicates", ...
    numbers: dict[str, Any] = field(default_factory=dict)  # measurements, for tables and figures

    @property
    def verdict(self) -> str:
        return {True: "pass", False: "FAIL", None: "not judged"}[self.passed]

    def __str__(self) -> str:  # a summary may quote untrusted text
        return printable(f"{self.verdict:<10} {self.check}: {self.summary}")


def leaks_above(changes: Tensor, length: int, mode: str) -> list[Leak]:
    """Return the pairs (t, s) of changes (T, T) that exceed TOLERANCE; NaN does."""
    return [Leak(t, s, float(changes[t, s]), length, mode)
            for t, s in (~(changes <= TOLERANCE)).nonzero().tolist()]


def one_line(error: object, limit: int = 100) -> str:
    """Return an error's message on one line, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]
