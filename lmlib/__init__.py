"""lmlib: train a small language model for a long time, watch it, and talk to it."""

import importlib

__version__ = "0.1.0"

_HOMES = {  # public name: its home
    "RunConfig": "config", "printable": "text", "LanguageModel": "model.transformer",
    "train": "training", "load": "checkpoint",
    "generate": "generation.text", "stream": "generation.text",
}
_ROOMS = ("analysis", "audit", "checkpoint", "config", "data", "evaluation", "generation", "model",
          "notebook", "optim", "run", "sweep", "tools", "training")

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Import a public name when it is first used, so that `import lmlib` costs no torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"lmlib.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"lmlib.{name}")
    raise AttributeError(f"module 'lmlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*_HOMES, *_ROOMS, "__version__"})
