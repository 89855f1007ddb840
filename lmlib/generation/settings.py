"""Sampling settings: one table from which flags, sliders, help and error messages derive.

This module needs no torch, so that `lmlib generate --help` is fast.
"""

import math
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_args

from lmlib.errors import UserError
from lmlib.parameters import unknown_name


def _setting(default: Any, help: str, **limits: Any) -> Any:
    """Declare a setting: its `choices`, or `low`, `high` and whether it must be `above` low.

    `slider` is (lowest, highest, step) in the playground, and `label` its description.
    """
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Settings:
    """How to sample; each name means what it means in transformers' GenerationConfig.

    A ValueError lists every setting that is out of range.
    """
    max_new_tokens: int = _setting(100, "length of the continuation in tokens", low=1,
                                   slider=(1, 500, 1), label="length")
    temperature: float = _setting(0.8, "0: always the most likely token", low=0,
                                  slider=(0.0, 2.0, 0.05), label="temperature")
    top_k: int | None = _setting(50, "sample from this many most likely tokens; 0: all", low=0,
                                 slider=(0, 200, 1), label="top-k (0: all)")
    top_p: float | None = _setting(
        0.95, "sample from the fewest tokens that hold this probability; 1: all", low=0, high=1,
        above=True, slider=(0.05, 1.0, 0.01), label="top-p")
    seed: int = _setting(0, "the same seed gives the same text", low=0, high=2**63 - 1,
                         label="seed")
    min_p: float | None = _setting(
        None, "drop tokens below this fraction of the top probability", low=0, high=1,
        slider=(0.0, 0.5, 0.01), label="min-p")
    repetition_penalty: float = _setting(1.0, "above 1: repeat less", low=0, above=True,
                                         slider=(1.0, 2.0, 0.05), label="repetition penalty")
    stop_strings: tuple[str, ...] = _setting(
        (), "end after the first of these, with | between them")
    ignore_eos: bool = _setting(False, "continue after the end-of-text token")
    past_window: str = _setting("slide", "what to do when the context window is full",
                                choices=("slide", "stop"))

    def __post_init__(self):
        stops = self.stop_strings
        stops = (stops,) if isinstance(stops, str) else tuple(stops or ())
        object.__setattr__(self, "stop_strings", stops)
        if wrong := [f"{f.name} is {getattr(self, f.name)!r}; write {_expected(f)}"
                     for f in fields(self) if not _is_valid(f, getattr(self, f.name))]:
            raise UserError("; ".join(wrong) + ".")

    @classmethod
    def of(cls, *values: Any, **settings: Any) -> "Settings":
        """Build settings from arguments; a ValueError names the unknown ones."""
        names = [f.name for f in fields(cls)]
        if unknown := [name for name in settings if name not in names]:
            raise UserError("; ".join(unknown_name(name, names, "setting") for name in unknown))
        return cls(*values, **settings)


def _choices(f: Field) -> tuple:
    return (True, False) if f.type is bool else f.metadata.get("choices", ())


def _types(f: Field) -> tuple[type, ...]:
    """Return the types of a number: (int, NoneType) for int | None."""
    return get_args(f.type) or (f.type,)


def _is_valid(f: Field, value: Any) -> bool:
    if f.name == "stop_strings":
        return all(isinstance(stop, str) and stop for stop in value)
    if choices := _choices(f):
        return isinstance(value, type(choices[0])) and value in choices
    if value is None:
        return type(None) in _types(f)
    if isinstance(value, bool) or not isinstance(value, int if int in _types(f) else int | float):
        return False
    low, high = f.metadata["low"], f.metadata.get("high", math.inf)
    is_low = value == low and f.metadata.get("above", False)
    return low <= value <= high and value != math.inf and not is_low  # false for NaN


def _expected(f: Field) -> str:
    """Say which values a setting takes: "a number above 0 and at most 1 (...)"."""
    if f.name == "stop_strings":
        return "strings, none of them empty"
    if choices := _choices(f):
        return " or ".join(map(repr, choices))
    low, high = f.metadata["low"], f.metadata.get("high")
    least = f"above {low}" if f.metadata.get("above") else f"of at least {low}"
    most = f" and at most {high}" if high else ""
    kind = "an integer" if int in _types(f) else "a number"
    return f"{kind} {least}{most} ({f.metadata['help']})"


def parse_setting(name: str, text: str) -> Any:
    """Parse a setting as a person types it; what cannot be parsed is left for Settings to name."""
    [f] = (f for f in fields(Settings) if f.name == name)
    if name == "stop_strings":
        stops = text.replace("\\n", "\n").replace("\\t", "\t").split("|")
        return () if text == "none" else tuple(stops)
    if f.type is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if type(None) in _types(f) and text.lower() == "none":
        return None
    try:
        return text if f.type is str else int(text) if int in _types(f) else float(text)
    except ValueError:
        return text


def format_setting(value: Any) -> str:
    """Show a setting as `parse_setting` parses it."""
    if isinstance(value, tuple):
        return "|".join(stop.replace("\n", "\\n") for stop in value) or "none"
    return str(value).lower()
