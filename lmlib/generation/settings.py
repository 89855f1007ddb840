"""Sampling settings, without torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How to write. Each name means what it means in transformers.

    Raises:
        ValueError: settings are out of range; every one is named.
    """

    max_new_tokens: int = 100
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_k: int | None = 50  # choose among so many likeliest tokens; None or 0: all
    top_p: float | None = 0.95  # choose among the fewest that hold this share of the probability; None or 1: all
    seed: int = 0
    min_p: float | None = None  # leave out tokens less likely than this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1: tokens that the text has already become less likely
    stop_strings: tuple[str, ...] = ()  # a text ends with the first of these that it writes
    ignore_eos: bool = False  # do not end at the end-of-text token
    past_window: str = "slide"  # "stop": end when the model's window is full

    def __post_init__(self):
        if isinstance(self.stop_strings, str):
            object.__setattr__(self, "stop_strings", (self.stop_strings,))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings or ()))
        if wrong := _out_of_range(self):
            raise ValueError("; ".join(wrong) + ".")


def _out_of_range(s: Settings) -> list[str]:
    def number(value: Any, kind: type = int) -> bool:
        return isinstance(value, int | kind) and not isinstance(value, bool)

    checks = {
        "max_new_tokens": (number(s.max_new_tokens) and s.max_new_tokens >= 1, "a whole number of 1 or more"),
        "temperature": (
            number(s.temperature, float) and 0 <= s.temperature < float("inf"),
            "0 (always the likeliest token) or more",
        ),
        "top_k": (s.top_k is None or (number(s.top_k) and s.top_k >= 0), "a whole number of 1 or more, or 0 for all"),
        "top_p": (s.top_p is None or (number(s.top_p, float) and 0 < s.top_p <= 1), "a share above 0 and up to 1"),
        "min_p": (s.min_p is None or (number(s.min_p, float) and 0 <= s.min_p <= 1), "a share from 0 to 1"),
        "repetition_penalty": (
            number(s.repetition_penalty, float) and 0 < s.repetition_penalty < float("inf"),
            "a number above 0 (1: no penalty)",
        ),
        "seed": (number(s.seed) and 0 <= s.seed < 2**63, "a whole number of 0 or more"),
        "stop_strings": (all(isinstance(stop, str) and stop for stop in s.stop_strings), "texts, none of them empty"),
        "ignore_eos": (isinstance(s.ignore_eos, bool), "True or False"),
        "past_window": (s.past_window in ("slide", "stop"), "'slide' or 'stop'"),
    }
    return [f"{name} is {getattr(s, name)!r}; write {wanted}" for name, (right, wanted) in checks.items() if not right]
