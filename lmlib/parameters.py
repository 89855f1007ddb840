"""Parameter files and command-line values, checked."""

import difflib
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from lmlib.files import PROJECT_ROOT, resolve_path
from lmlib.leaks import LEAKY


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if repeated := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(problem=f"given twice: {', '.join(sorted(repeated))}")
        return super().construct_mapping(node, deep=deep)


def read_parameters(path: str | Path) -> dict[str, Any]:
    """A parameter file as a dict. Keys must be identifiers and values plain (text, number, true/false, null).

    Raises:
        ValueError: no such file, not YAML, not a flat mapping, or a key or value that could carry code.
    """
    file = resolve_path(path)
    if not file.is_file():
        known = sorted(p.relative_to(PROJECT_ROOT).as_posix() for p in PROJECT_ROOT.glob("params/**/*.yaml"))
        raise ValueError(f"There is no parameter file {path}. The recipes are: {', '.join(known)}.")
    try:
        parameters = yaml.load(file.read_text("utf-8"), _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(parameters, dict):
        raise ValueError(f"{path} must be a flat mapping with a line `name: value` for each parameter.")
    parameters.pop(LEAKY, None)  # the mark in a leaky run's config.json is no parameter
    return check_plain(parameters, str(path))


def check_plain(parameters: dict, source: str) -> dict[str, Any]:
    """`parameters`, if each key is an identifier and each value plain; they may become lines of Python."""
    mistakes = []
    for key, value in parameters.items():
        if not (isinstance(key, str) and key.isascii() and key.isidentifier()):
            mistakes.append(f"{key!r} is not a parameter's name")
        elif type(value) not in (str, int, float, bool, types.NoneType):
            mistakes.append(f"{key} is a {type(value).__name__}; write text, a number, true, false or null")
        elif isinstance(value, str) and not value.isprintable():
            mistakes.append(f"{key} holds control characters or line breaks")
    if mistakes:
        raise ValueError(f"{source} cannot be used:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes))
    return parameters


def parse_overrides(pairs: list[tuple[str, str]], hints: dict[str, Any]) -> dict[str, Any]:
    """`-p NAME VALUE` pairs from a command line, each value read as YAML unless its type in `hints` is text."""
    parameters = {}
    for name, text in pairs:
        is_text = name in hints and str in (hints[name], *get_args(hints[name]))
        try:
            parameters[name] = (None if text.lower() in ("null", "none") else text) if is_text else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            parameters[name] = text
    return check_plain(parameters, "-p")


def unknown_name(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"{name} is no parameter" + (f"; did you mean {' or '.join(close)}?" if close else "")


def coerce(name: str, value: Any, hint: Any) -> tuple[Any, str | None]:
    """(value as `hint`, None), or (value, what is wrong with it). "3e-4" is a number; YAML reads it as text."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return value, None if value in choices else f"{name} is {value!r}; choose from {', '.join(map(repr, choices))}"
    optional = types.NoneType in get_args(hint)
    wanted = get_args(hint)[0] if optional else hint
    if value is None and optional:
        return value, None
    if wanted is str and isinstance(value, Path):
        return str(value), None
    if type(value) is wanted:
        if wanted is float and value != value or value in (float("inf"), float("-inf")):
            return value, f"{name} is {value}; write a finite number"
        if wanted is str and (not value or not value.isprintable()):
            return value, f"{name} is {value!r}; write text on one line"
        return value, None
    if wanted in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
            if wanted is float and abs(number) != float("inf") and number == number or number == int(number):
                return wanted(number), None
        except (ValueError, OverflowError):
            pass
    words = {int: "a whole number", float: "a number", bool: "true or false (True or False in Python)", str: "text"}
    return value, f"{name} is {value!r}; write {words[wanted]}{' or null' if optional else ''}"
