"""The gradient of a batch, in micro-batches that may be dealt to several processes."""

import math

import numpy as np
import torch
from torch import Tensor

from lmlib import distributed
from lmlib.model.loss import widest_float
from lmlib.model.moe import reset_router_load, routers
from lmlib.model.transformer import LanguageModel
from lmlib.run.device import send


def accumulate_gradients(model: LanguageModel, ids: Tensor, targets: Tensor, micro: int, seed: int,
                         step: int, dtype: torch.dtype) -> Tensor:
    """Set the gradient of a batch's mean loss, `micro` windows at a time; returns the loss.

    `ids` and `targets` are (batch_size, T), the loss () in float64 (MPS: float32) on the model's
    device. Where torch's algorithms are deterministic, no bit depends on the number of processes.
    """
    device, exact = next(model.parameters()).device, torch.are_deterministic_algorithms_enabled()
    model.train()
    model.zero_grad(set_to_none=True)
    reset_router_load(model)
    batches = list(zip(ids.split(micro), targets.split(micro), strict=True))
    losses = torch.zeros(len(batches), dtype=widest_float(device), device=device)
    total, last = PairwiseSum(), len(batches) - distributed.world_size()
    for number, (x, y) in distributed.deal(batches):
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(dropout_seed(seed, step, number))
            with distributed.keep_local(model, is_local=not exact and number < last):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = model.loss(send(x, device), send(y, device)) * (len(x) / len(ids))
                loss.backward()
        losses[number] = loss.detach()
        if exact and len(batches) > distributed.world_size():
            total.add([p.grad for p in model.parameters()], distributed.world_size())
            model.zero_grad(set_to_none=True)
    for parameter, gradient in zip(model.parameters(), total.sum(), strict=False):
        parameter.grad = gradient
    for router in routers(model):
        distributed.add_up(router.load)
    return distributed.add_up(losses).sum()


class PairwiseSum:
    """The sum of lists of tensors in the order of a binary tree, as in ((0 + 1) + (2 + 3)) + ...

    It is a binary counter: lists that hold equally many addends are joined. So it does not matter
    whether each addend is added, or sums of 2, 4 or 8 neighbors.
    """
    def __init__(self):
        self.partial: list[tuple[int, list[Tensor]]] = []  # (addends, their sum), falling

    def add(self, tensors: list[Tensor], addends: int = 1):
        """Add the sum of so many addends; the tensors are used, and may change."""
        while self.partial and self.partial[-1][0] == addends:
            tensors = self._join(tensors)
            addends *= 2
        self.partial.append((addends, tensors))

    def sum(self) -> list[Tensor]:
        """Return the sum, [] if there are no addends; it must not be used any more."""
        tensors = self.partial.pop()[1] if self.partial else []
        while self.partial:
            tensors = self._join(tensors)
        return tensors

    def _join(self, tensors: list[Tensor]) -> list[Tensor]:
        earlier = self.partial.pop()[1]
        torch._foreach_add_(earlier, tensors)
        return earlier


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    state = np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))  # torch takes 63 bits


def clip_gradients(model: LanguageModel, limit: float) -> Tensor:
    """Scale the gradient down to norm `limit` (0: no limit); returns its norm before: ()."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
