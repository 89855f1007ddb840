"""lmlib: train a small language model for a long time, watch it, and talk to it."""

import importlib

__version__ = "0.1.0"

_HOME = {
    "RunConfig": "config",
    "printable": "config",
    "LanguageModel": "model",
    "train": "training",
    "load": "checkpoint",
    "generate": "generation",
    "stream": "generation",
}
_MODULES = [
    "config",
    "corpus",
    "data",
    "attention",
    "feed_forward",
    "model",
    "optim",
    "meter",
    "evaluation",
    "run_folder",
    "pretrained",
    "checkpoint",
    "generation",
    "probe",
    "causality",
    "consistency",
    "overlap",
    "session",
    "audit",
    "training",
    "sweep",
    "runs",
    "pictures",
    "figures",
    "comparison",
    "verdicts",
    "shading",
    "terminal",
    "widgets",
    "explorer",
]

__all__ = sorted(_HOME)


def __getattr__(name: str):
    """Import a public name when it is first asked for, so that `import lmlib` costs no torch."""
    if name in _HOME:
        return getattr(importlib.import_module(f"lmlib.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"lmlib.{name}")
    raise AttributeError(f"module 'lmlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME.keys() | set(_MODULES) | {"__version__"})
