"""Device and numerics."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lmlib.config import RunConfig


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, and torch finds {torch.cuda.device_count()} CUDA devices here.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


@contextmanager
def numerics(config: RunConfig, device: torch.device) -> Iterator[None]:
    """TF32 on CUDA where float32 products remain; only repeatable algorithms if `deterministic`. Undone after."""
    precision, was_deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    change = config.deterministic and not was_deterministic  # the call alone imports a compiler, for seconds
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if change:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what repeatable CUDA products need
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if change:
            torch.use_deterministic_algorithms(False)
