"""Sampling settings: one table from which flags, sliders, help and error messages derive.

This module needs no torch, so that `lmlib generate --help` is fast.
"""

import math
from dataclasses import Field, dataclass, field, fields
from typing import Any

from lmlib.parameters import unknown_name


def _number(default: Any, help: str, low: float, high: float = math.inf, *, above: bool = False,
            null: bool = False, slider: tuple | None = None, label: str = "") -> Any:
    """Declare a number and its limits; `slider` is (lowest, highest, step) in the playground."""
    return field(default=default, metadata={
        "help": help, "low": low, "high": high, "above": above, "null": null,
        "slider": slider, "label": label})


def _other(default: Any, help: str, choices: tuple = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """How to sample; each name means what it means in transformers' GenerationConfig.

    Raises:
        ValueError: settings are out of range; the message lists every one.
    """

    max_new_tokens: int = _number(
        100, "length of the continuation in tokens", 1, slider=(1, 500, 1), label="length")
    temperature: float = _number(
        0.8, "0: always the most likely token", 0, slider=(0.0, 2.0, 0.05), label="temperature")
    top_k: int | None = _number(
        50, "sample from this many most likely tokens; 0: all", 0, null=True,
        slider=(0, 200, 1), label="top-k (0: all)")
    top_p: float | None = _number(
        0.95, "sample from the fewest tokens that hold this probability; 1: all", 0, 1,
        above=True, null=True, slider=(0.05, 1.0, 0.01), label="top-p")
    seed: int = _number(0, "the same seed gives the same text", 0, 2**63 - 1, label="seed")
    min_p: float | None = _number(
        None, "drop tokens below this fraction of the top probability", 0, 1, null=True,
        slider=(0.0, 0.5, 0.01), label="min-p")
    repetition_penalty: float = _number(
        1.0, "above 1: repeat less", 0, above=True,
        slider=(1.0, 2.0, 0.05), label="repetition penalty")
    stop_strings: tuple[str, ...] = _other((), "end after the first of these, with | between them")
    ignore_eos: bool = _other(False, "continue after the end-of-text token")
    past_window: str = _other(
        "slide", "what to do when the context window is full", ("slide", "stop"))

    def __post_init__(self):
        stops = self.stop_strings
        stops = (stops,) if isinstance(stops, str) else tuple(stops or ())
        object.__setattr__(self, "stop_strings", stops)
        wrong = [f"{f.name} is {getattr(self, f.name)!r}; write {expected(f)}"
                 for f in fields(self) if not _is_valid(f, getattr(self, f.name))]
        if wrong:
            raise ValueError("; ".join(wrong) + ".")

    @classmethod
    def of(cls, *values: Any, **settings: Any) -> "Settings":
        """Build settings from arguments; a ValueError names the unknown ones."""
        names = [f.name for f in fields(cls)]
        if unknown := [name for name in settings if name not in names]:
            raise ValueError("; ".join(unknown_name(name, names, "setting") for name in unknown))
        return cls(*values, **settings)


def _is_integer(f: Field) -> bool:
    return f.type in (int, int | None)


def _is_valid(f: Field, value: Any) -> bool:
    if f.name == "stop_strings":
        return all(isinstance(stop, str) and stop for stop in value)
    if f.type is bool:
        return isinstance(value, bool)
    if f.metadata.get("choices"):
        return value in f.metadata["choices"]
    if value is None:
        return f.metadata["null"]
    if isinstance(value, bool) or not isinstance(value, int if _is_integer(f) else int | float):
        return False
    low, high, above = (f.metadata[key] for key in ("low", "high", "above"))
    return math.isfinite(value) and low <= value <= high and not (above and value == low)


def expected(f: Field) -> str:
    """Say which values a setting takes: "a number from 0 to 1 (...)"."""
    if f.name == "stop_strings":
        return "strings, none of them empty"
    if f.type is bool:
        return "True or False"
    if choices := f.metadata.get("choices"):
        return " or ".join(map(repr, choices))
    low, high = f.metadata["low"], f.metadata["high"]
    text = f"above {low}" if f.metadata["above"] else f"of at least {low}"
    text += f" and at most {high}" if high < math.inf else ""
    return f"{'an integer' if _is_integer(f) else 'a number'} {text} ({f.metadata['help']})"


def parse_setting(name: str, text: str) -> Any:
    """Read a setting as a person types it; what cannot be read is left for Settings to name."""
    [f] = (f for f in fields(Settings) if f.name == name)
    if name == "stop_strings":
        stops = text.replace("\\n", "\n").replace("\\t", "\t").split("|")
        return () if text == "none" else tuple(stops)
    if f.type is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if f.metadata.get("choices"):
        return text
    if f.metadata["null"] and text.lower() == "none":
        return None
    try:
        return int(text) if _is_integer(f) else float(text)
    except ValueError:
        return text


def format_setting(value: Any) -> str:
    """Show a setting as `parse_setting` reads it."""
    if isinstance(value, tuple):
        return "|".join(stop.replace("\n", "\\n") for stop in value) or "none"
    return str(value).lower()
