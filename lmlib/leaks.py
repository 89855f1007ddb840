"""How a run that leaks is marked."""

from pathlib import Path

from lmlib.files import read_json

LEAKY = "lmlib_leaky"  # marks what a run shows that leaks and was allowed to: the names of the checks that it failed


LEAKY_NAME = " (LEAKY)"  # stands behind the name of such a run, and so in every table and figure


def known_leaks(folder: Path) -> str:
    """The checks that the model in a run's folder or a checkpoint failed and was allowed to, as text; "" for an honest one."""
    try:
        recorded = read_json(folder / "config.json")
    except ValueError:
        return ""
    return str(recorded.get(LEAKY, "")) if isinstance(recorded, dict) else ""


class Leaky(ValueError):
    """A model or a split that leaks; nothing was trained."""
