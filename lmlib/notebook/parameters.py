"""A notebook's variables as the parameters of a run."""

import re
from pathlib import Path
from typing import Any

from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.files import resolve_path
from lmlib.parameters import unknown_name


def run_config(namespace: dict[str, Any]) -> RunConfig:
    """Return the configuration that a notebook's variables describe: `run_config(globals())`.

    Strongest first: what papermill injected, what the parameters cell or a later one assigns, the
    file that `recipe` names, the defaults. In a cell None means "as the recipe says" and the text
    "null" means None; an injected None is meant.
    """
    injected, cells = _parameters(namespace)
    known, assigned = {"recipe", *RunConfig().to_dict()}, {}
    for cell in cells:  # a name misspelled in a cell that was corrected since is forgotten
        assigned = {name: assigned[name] for name in assigned if name in known} | cell
    # An unknown name is a mistake, whatever its value.
    given = {name: value for name, value in assigned.items()
             if value is not None or name not in known} | injected
    recipe = given.pop("recipe", None)
    return RunConfig.load(recipe, **{name: None if value == "null" else value
                                     for name, value in given.items()})


def notebook_folder(namespace: dict[str, Any]) -> Path:
    """Return the folder that a notebook's `output_dir` names.

    papermill may inject any parameter of RunConfig, so that one YAML file serves every notebook; a
    name that neither the notebook nor RunConfig has is a ValueError.
    """
    injected, cells = _parameters(namespace)
    known = set(RunConfig().to_dict()).union(*cells)
    if unknown := sorted(injected.keys() - known):
        lines = "\n".join(f"  - {unknown_name(name, known)}" for name in unknown)
        raise UserError(f"Invalid parameters:\n{lines}")
    return resolve_path(namespace["output_dir"])


def notebook_run(namespace: dict[str, Any]) -> Path:
    """Return the folder of the run that a notebook names; raise as `notebook_folder` does."""
    return notebook_folder(namespace) / namespace["run_name"]


def _parameters(namespace: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what papermill injected, and what each cell with parameters assigned, by name.

    IPython keeps the executed cells in `In`; papermill's own starts with "# Parameters". Where
    cells are not kept (nbval, a plain dict), every public plain value counts as assigned.
    """
    injected, cells = {}, []
    for cell in namespace.get("In", []):
        names = re.findall(r"^(\w+)\s*=", cell, re.MULTILINE)
        values = {name: namespace[name] for name in names if name in namespace}
        if cell.lstrip().startswith("# Parameters"):
            injected = values
        elif values.keys() & {"run_name", "output_dir"}:
            cells.append(values)
    if not any(cells):
        plain = str | int | float | list | dict | tuple | None
        cells = [{name: value for name, value in namespace.items() if isinstance(value, plain)
                  and not name.startswith("_") and name not in {"In", "Out", *injected}}]
    return injected, cells
