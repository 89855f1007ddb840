"""What a check found."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lmlib.text import printable

TOLERANCE = 1e-5  # of the logits' standard deviation


REPEATS = 8  # of what may show only at random


class Leak(NamedTuple):
    """Logits that depend on what they may not see: at position t on the token at s (or of row t on row s)."""

    t: int
    s: int
    change: float  # in standard deviations of the logits
    length: int  # of the window
    mode: str  # "evaluation", "training" or "with a cache"


@dataclass(frozen=True)
class Report:
    """A verdict: `passed` is True, False, or None where it could not be judged; `summary` says it in a sentence."""

    check: str
    passed: bool | None
    summary: str
    leaks: list[Leak] = field(default_factory=list)
    pattern: str = ""  # of the leaks: "whole window", "blocks of 16", "wraps around", ...
    numbers: dict[str, Any] = field(default_factory=dict)  # what was measured, for tables and pictures

    @property
    def verdict(self) -> str:
        return {True: "pass", False: "FAIL", None: "not judged"}[self.passed]

    def __str__(self) -> str:
        return printable(f"{self.verdict:<10} {self.check}: {self.summary}")  # which may quote a text or a stranger's error
