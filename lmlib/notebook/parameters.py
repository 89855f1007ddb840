"""A notebook's parameters."""

import re
import types
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from lmlib.config import RunConfig
from lmlib.files import resolve_path
from lmlib.parameters import unknown_name


def notebook_parameters(namespace: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(injected by papermill, assigned in the parameters cell) among a notebook's variables.

    IPython keeps every executed cell in `In`; papermill starts its own with "# Parameters". Where cells are not kept
    (nbval, a plain dict), every public plain value counts as assigned.
    """
    injected, edited = {}, {}
    for cell in namespace.get("In", []):
        names = {name: namespace[name] for name in re.findall(r"^(\w+)\s*=", cell, re.MULTILINE) if name in namespace}
        if cell.lstrip().startswith("# Parameters"):
            injected = names
        elif names.keys() & {"run_name", "output_dir"}:
            edited = names
    if not edited:
        plain = (str, int, float, bool, types.NoneType, list, dict, tuple)
        public = {name: value for name, value in namespace.items() if not name.startswith("_") and name not in ("In", "Out")}
        edited = {name: value for name, value in public.items() if isinstance(value, plain) and name not in injected}
    return injected, edited


def notebook_folder(namespace: dict[str, Any]) -> Path:
    """The folder that a notebook's `output_dir` means, once every injected name is known.

    Parameters of a recipe are welcome too, so that one file serves every notebook.

    Raises:
        ValueError: papermill injected a name that neither the notebook nor RunConfig has.
    """
    injected, own = notebook_parameters(namespace)
    known = get_type_hints(RunConfig).keys() | own.keys()
    if unknown := sorted(injected.keys() - known):
        raise ValueError("These parameters need mending:\n" + "\n".join(f"  - {unknown_name(n, known)}" for n in unknown))
    return resolve_path(namespace["output_dir"])


def notebook_run(namespace: dict[str, Any]) -> Path:
    """The run's folder that a notebook's `output_dir` and `run_name` mean; raises as `notebook_folder` does."""
    return notebook_folder(namespace) / namespace["run_name"]


def run_config(namespace: dict[str, Any]) -> RunConfig:
    """The configuration that a notebook's variables describe: `run_config(globals())`.

    Strongest first: what papermill injected, what was edited in the parameters cell (differs from the
    default), the file that `recipe` names, the defaults.
    """
    injected, edited = notebook_parameters(namespace)
    recipe = injected.pop("recipe", edited.pop("recipe", None))
    defaults = {field.name: field.default for field in fields(RunConfig)}
    edited = {name: value for name, value in edited.items() if name not in defaults or value != defaults[name]}
    return RunConfig.load(recipe, **{**edited, **injected})
