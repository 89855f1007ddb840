"""Every combination of parameters."""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmlib.config import RunConfig, unused
from lmlib.files import display_path
from lmlib.parameters import read_parameters


def plan(recipes: Iterable[str | Path], grid: dict[str, list[Any]]) -> list[RunConfig]:
    """Every recipe with every combination of the grid's values: run_name says which (`mlp-seed0-learning_rate0.01`).

    Runs that would be the same but for their name, because a parameter of the grid is not used, are planned once.

    Raises:
        ValueError: a recipe or value is wrong, each is listed; or two runs would share a folder.
    """
    configs, mistakes, seen = [], [], []
    in_name = [name for name, values in grid.items() if name != "run_name" and (len(values) > 1 or name == "seed")]
    for recipe in recipes:
        try:
            given = read_parameters(recipe)
        except ValueError as error:
            mistakes.append(str(error))
            continue
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            base = chosen.get("run_name") or given.get("run_name") or Path(recipe).stem
            name = "-".join([str(base), *(f"{key}{chosen[key]}" for key in in_name)])
            try:
                config = RunConfig(**{**given, **chosen, "run_name": re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]})
            except ValueError as error:
                mistakes += [f"{recipe}: {line.strip(' -')}" for line in str(error).splitlines()[1:]]
                continue
            ignored = unused(config.attention, config.feed_forward) | {"run_name"}
            used = {key: value for key, value in config.to_dict().items() if key not in ignored}
            if used not in seen:
                configs.append(config)
            seen.append(used)
    folders = [config.run_dir for config in configs]
    mistakes += [f"two runs would share the folder {display_path(f)}" for f in dict.fromkeys(folders) if folders.count(f) > 1]
    if mistakes:
        raise ValueError("The sweep needs mending:\n" + "\n".join(f"  - {mistake}" for mistake in dict.fromkeys(mistakes)))
    if not configs:
        raise ValueError("The sweep is empty: name at least one recipe.")
    return configs
