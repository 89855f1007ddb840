"""Optimisers: Muon for the matrices inside layers, AdamW for the rest; and the schedule they share."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lmlib.config import RunConfig

FINAL_LR_FRACTION = 0.1  # the cosine ends at this share of the peak


def schedule(step: int, total_steps: int, warmup_ratio: float) -> float:
    """The share of the peak learning rate that update `step` (1 .. total_steps) uses: a straight line up
    over the warmup, then a cosine down to `FINAL_RATE` at the last step."""
    warmup = round(warmup_ratio * total_steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress))


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: every singular value goes to between 0.7 and 1.2.

    Five steps of the quintic Newton-Schulz iteration, coefficients from Keller Jordan's "Muon" (2024).
    Shape (rows, columns) in and out, or a stack of such matrices (E, rows, columns), each for itself.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    multiply_add = torch.addmm if matrix.dim() == 2 else torch.baddbmm
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = (matrix if wide else matrix.mT).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + multiply_add(gram, gram, gram, beta=b, alpha=c) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum whose update for each matrix is orthogonalised (Keller Jordan, 2024), with decoupled weight decay.

    An update is scaled by sqrt(max(1, rows / columns)), so that one rate serves every shape. Newton-Schulz
    runs in bfloat16 on CUDA and float32 elsewhere, where bfloat16 is slow.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(state["momentum"], group["momentum"])  # Nesterov
                update = orthogonalize(update, torch.bfloat16 if matrix.is_cuda else torch.float32)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                scale = max(1.0, matrix.shape[-2] / matrix.shape[-1]) ** 0.5
                matrix.add_(update.to(matrix.dtype), alpha=-group["lr"] * scale)


def build_optimizers(model: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """The optimisers of a run, each group with its `peak_lr`. Weight decay touches matrices, not norms or biases."""
    decoder = [p for name, p in model.named_parameters() if p.dim() >= 2 and "layers." in name]
    others = {id(p) for p in decoder}
    tables = [p for p in model.parameters() if p.dim() == 2 and id(p) not in others]  # embedding, untied head
    vectors = [p for p in model.parameters() if p.dim() < 2]

    def adamw(matrices: list[Tensor]) -> torch.optim.Optimizer:
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)

    if config.optimizer == "adamw":
        optimizers = [adamw(decoder + tables)]
    else:
        optimizers = [Muon(decoder, config.muon_learning_rate, config.weight_decay), adamw(tables)]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[torch.optim.Optimizer], share: float):
    """Set every group's learning rate to `share` of its peak."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak_lr"] * share


def state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All optimiser state as named tensors: "<parameter>/<quantity>"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{quantity}": tensor
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for quantity, tensor in state.items()
    }


def load_state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]):
    """Put back what `state_tensors` gave, on each parameter's device (where fused AdamW wants its step counter too)."""
    parameters = dict(model.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for key, tensor in tensors.items():
        name, quantity = key.rsplit("/", 1)
        parameter = parameters[name]
        owner[parameter].state[parameter][quantity] = tensor.to(parameter.device)


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of the state that these optimisers will hold: one tensor a parameter for Muon, two for AdamW."""
    return sum(
        parameter.nbytes * (1 if isinstance(optimizer, Muon) else 2)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
