"""Where a run computes: device, type and PyTorch's global numerics."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lmlib import distributed
from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.optim import has_bfloat16


def pick_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA if available, one for each process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = distributed.local_device()
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device is mps, but torch finds no Apple GPU here: choose 'auto' or 'cpu'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {name!r}, but torch finds {torch.cuda.device_count()} CUDA "
                        "devices here: choose 'auto' or 'cpu'.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type for autocast; "auto": bfloat16 where the device has units for it."""
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return getattr(torch, name)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, where that is CUDA without waiting for it."""
    if device.type != "cuda":  # the host's memory may be freed before another device has read it
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def numerics(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Use TF32 for float32 products on CUDA, and deterministic algorithms if asked; undo it after.

    Deterministic algorithms are not switched on unasked: the call imports a compiler, for seconds.
    """
    precision = torch.get_float32_matmul_precision()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    change = config.deterministic and not torch.are_deterministic_algorithms_enabled()
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if change:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
            torch.use_deterministic_algorithms(True)
            # Writing NaN to all new memory first, to debug, costs a sixth of a step.
            torch.utils.deterministic.fill_uninitialized_memory = False
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if change:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = fills
