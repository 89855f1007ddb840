"""The runs of a sweep: every combination of parameters."""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmlib.config import RunConfig, unused_parameters
from lmlib.errors import UserError
from lmlib.files import display_path
from lmlib.parameters import read_parameters


def plan(recipes: Iterable[str | Path], grid: dict[str, list[Any]]) -> list[RunConfig]:
    """Return every recipe with every combination of the grid's values.

    A run's name says which values it has: `mlp-seed0-learning_rate0.01`. Runs that differ only in
    parameters that their model ignores are one run. A ValueError says that the sweep is empty, or
    lists every mistake: invalid recipes and values, and folders that two runs would share.
    """
    configs, mistakes, seen = [], [], []
    for recipe in recipes:
        try:
            given = read_parameters(recipe)
        except ValueError as error:
            mistakes.append(str(error))
            continue
        for values in itertools.product(*grid.values()):
            chosen = {**given, **dict(zip(grid, values, strict=True))}
            # The seed and the parameters that have several values.
            varied = [f"{name}{chosen[name]}" for name in grid
                      if name == "seed" or (len(grid[name]) > 1 and name != "run_name")]
            name = "-".join([str(chosen.get("run_name") or Path(recipe).stem), *varied])
            chosen["score_test"] = False  # a score that chooses is not the one that is reported
            chosen["run_name"] = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
            try:
                config = RunConfig(**chosen)
            except ValueError as error:
                lines = str(error).splitlines()[1:]
                mistakes += [f"{recipe}: {line.strip(' -')}" for line in lines]
                continue
            ignored = unused_parameters(config.attention, config.feed_forward) | {"run_name"}
            used = {name: value for name, value in config.to_dict().items() if name not in ignored}
            if used not in seen:
                configs.append(config)
                seen.append(used)
    folders = [config.run_dir for config in configs]
    mistakes += [f"two runs would share the folder {display_path(folder)}"
                 for folder in folders if folders.count(folder) > 1]
    if mistakes:
        lines = "\n".join(f"  - {mistake}" for mistake in dict.fromkeys(mistakes))
        raise UserError(f"The sweep has invalid parameters:\n{lines}")
    if not configs:
        raise UserError("The sweep is empty: name at least one recipe.")
    return configs
