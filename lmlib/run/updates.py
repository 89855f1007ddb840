"""The losses and gradient norms of updates, which stay on the device until they are read."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmlib.model.loss import widest_float


@dataclass(frozen=True)
class Update:
    """What one optimizer update, or the attempt at it, measured."""
    step: int
    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Updates:
    """The updates since the last reading. Reading makes the host wait for the device; adding not.

    An update whose loss or gradient norm is not finite must change nothing. If `stays_blocked`, all
    later ones must not either.
    """
    def __init__(self, device: torch.device, stays_blocked: bool):
        self.stays_blocked, self.steps, self.pairs = stays_blocked, [], []
        self.dtype = widest_float(device)
        self.blocked = torch.zeros((), device=device)  # 1: the last update changed nothing
        self.out_of_memory: list[tuple[int, int]] = []  # (step, micro-batch size tried next)

    def add(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Keep the numbers of an update; returns 1.0 if it must change nothing, else 0.0: ()."""
        pair = torch.stack([torch.as_tensor(x, dtype=self.dtype, device=self.blocked.device)
                            for x in (loss, norm)])
        self.steps.append(step)
        self.pairs.append(pair)
        blocked = 1.0 - pair.isfinite().all().float()
        self.blocked = torch.maximum(self.blocked, blocked) if self.stays_blocked else blocked
        return self.blocked

    def read(self) -> list[Update]:
        """Return the updates since the last reading, in order."""
        pairs = torch.stack(self.pairs).tolist() if self.pairs else []
        found = [Update(step, *pair) for step, pair in zip(self.steps, pairs, strict=True)]
        self.steps, self.pairs = [], []
        return found
