"""Read parameter files and command-line values, and coerce them to their types; near names."""

import contextlib
import difflib
import math
import re
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from lmlib.errors import UserError
from lmlib.files import PROJECT_ROOT, resolve_path
from lmlib.leaks import LEAKY

# Parameters that may be paths, each with the word that never is one.
PATHS = {"output_dir": None, "corpus": "shakespeare", "validation_corpus": "shakespeare",
         "tokenizer": "train", "init_from": None}


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, and whose numbers are decimal.

    What YAML 1.1 reads in base 8, 16 or 60 (010, 0x10, 1:30) stays text, for `coerce` to judge.
    """
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers
                if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(problem=f"given twice: {', '.join(twice)}")
        return super().construct_mapping(node, deep=deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?$"
               r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"), list("-+.0123456789"))


def read_parameters(path: str | Path) -> dict[str, Any]:
    """Read a parameter file: a flat mapping of identifiers to text, numbers, true, false or null.

    Raises ValueError for a file that is missing, not a flat YAML mapping, or could carry code.
    """
    file = resolve_path(path)
    if not file.is_file():
        recipes = {recipe.stem: str(recipe) for recipe in _recipes()}
        top = sorted(recipe for recipe in recipes.values() if recipe.count("/") == 1)
        hint = did_you_mean(Path(path).stem, recipes, recipes.get) or f" ({', '.join(top)}, ...)."
        raise UserError(f"There is no parameter file {path}{hint} `ls params` lists the recipes.")
    try:
        parameters = yaml.load(file.read_text("utf-8"), _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is not valid YAML: {reason}") from None
    if not isinstance(parameters, dict):
        raise UserError(f"{path} must be a flat mapping: a line `name: value` per parameter.")
    parameters.pop(LEAKY, None)  # the mark in a leaky run's config.json is not a parameter
    return check_plain(parameters, str(path))


def find_recipe(name: str) -> str:
    """Return the path of a recipe in params/ by its bare name, as "smoke"; else `name` itself."""
    named = {key: str(recipe) for recipe in _recipes()
             for key in (recipe.stem, recipe.relative_to("params").with_suffix("").as_posix())}
    return name if resolve_path(name).is_file() else named.get(name, name)


def _recipes() -> list[Path]:
    files = sorted(PROJECT_ROOT.glob("params/**/*.yaml"), reverse=True)  # params/ itself last
    return [file.relative_to(PROJECT_ROOT) for file in files]


def check_plain(parameters: dict, source: str) -> dict[str, Any]:
    """Return `parameters` if keys are identifiers and values plain, else raise ValueError."""
    # papermill turns them into lines of Python, so anything else could run as code.
    mistakes = []
    for key, value in parameters.items():
        if not (isinstance(key, str) and key.isascii() and key.isidentifier()):
            mistakes.append(f"{key!r} is not a valid parameter name")
        elif type(value) not in (str, int, float, bool, types.NoneType):
            kind = type(value).__name__
            mistakes.append(f"{key} is a {kind}; write text, a number, true, false or null")
        elif isinstance(value, str) and not value.isprintable():
            mistakes.append(f"{key} contains control characters or line breaks")
    if mistakes:
        raise UserError("\n  - ".join((f"{source} cannot be used:", *mistakes)))
    return parameters


def parse_overrides(pairs: Iterable[tuple[str, str]], hints: dict[str, Any]) -> dict[str, Any]:
    """Read `-p NAME VALUE` pairs: as text where the type in `hints` is text, else as YAML."""
    parameters = {}
    for name, text in pairs:
        is_text = name in hints and str in (hints[name], *get_args(hints[name]))
        try:
            value = text if is_text else yaml.load(text, _StrictLoader)
        except (yaml.YAMLError, ValueError):
            value = text
        parameters[name] = None if is_text and text.lower() in ("null", "none") else value
    return check_plain(parameters, "-p")


def unknown_name(name: str, known: Iterable[str], what: str = "parameter") -> str:
    """Say that a name is unknown, and which known ones are near."""
    return f"{name} is not a {what}{did_you_mean(name, known)}"


def did_you_mean(name: str, known: Iterable[str], show: Callable[[str], str] = str) -> str:
    """Return "; did you mean ...?" with the known names that are near, "" if none is."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(show, close))}?" if close else ""


def existing_folder(path: str | Path) -> Path:
    """Return a run's or a model's folder; UserError with the nearest names if there is none."""
    folder = resolve_path(path)
    if folder.exists():
        return folder
    bare = str(path) == folder.name  # a run's name without its folder
    beside = resolve_path("outputs") if bare else folder.parent
    near = [other.name for other in sorted(beside.glob("[!.]*/"))]
    shown = Path("outputs") if bare else Path(path).parent
    hint = did_you_mean(folder.name, near, lambda name: str(shown / name)) or "."
    raise UserError(f"There is no folder {path}{hint} `lmlib runs` lists the runs.")


def absolute_paths(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return `parameters` with the paths that exist from the current folder made absolute.

    They then mean the same to a process that starts in the project's root.
    """
    paths = {name: Path(parameters[name]).expanduser() for name, word in PATHS.items()
             if parameters[name] not in (None, word)}
    here = {name: str(path.absolute()) for name, path in paths.items()
            if path.exists() and path.absolute() != PROJECT_ROOT / path}
    return parameters | here


def coerce(name: str, value: Any, hint: Any) -> tuple[Any, str | None]:
    """Return (value as `hint`, None), or (value, what is wrong with it)."""
    if get_origin(hint) is Literal:
        choices = ", ".join(map(repr, get_args(hint)))
        problem = None if value in get_args(hint) else f"{name} is {value!r}; choose from {choices}"
        return value, problem
    kinds = get_args(hint) or (hint,)  # `int | Literal["best"] | None` has three
    wanted, optional = kinds[0], types.NoneType in kinds
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if wanted is str and isinstance(value, Path):
        return str(value), None
    if wanted is float and type(value) is float and not math.isfinite(value):
        return value, f"{name} is {value}; write a finite number"
    if wanted is str and type(value) is str and (not value or not value.isprintable()):
        return value, f"{name} is {value!r}; write text on one line"
    if type(value) is wanted or (value is None and optional):
        return value, None
    if type(value) is str and value in words:
        return value, None
    # YAML reads 3e-4 and 010 as text, so text that spells a decimal number becomes one.
    is_number = isinstance(value, int | float | str) and not isinstance(value, bool)
    if wanted in (int, float) and is_number:
        with contextlib.suppress(ValueError):
            if type(value) is str and wanted is int:
                return int(value), None  # a float would round a large one
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            if math.isfinite(number) and (wanted is float or number == int(number)):
                return wanted(number), None
    descriptions = {int: "an integer", float: "a number", str: "text",
                    bool: "true or false (True or False in Python)"}
    accepted = [descriptions[wanted], *map(repr, words), *(["null"] if optional else [])]
    return value, f"{name} is {value!r}; write {' or '.join(accepted)}"
