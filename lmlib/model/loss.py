"""Cross-entropy of a linear head without holding all logits."""

import torch
import torch.nn.functional as F
from torch import Tensor


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class HeadLoss(torch.autograd.Function):
    """F.cross_entropy(hidden @ weight.T, targets), computed in chunks of `rows` tokens."""
    # The forward pass turns each chunk's logits into gradients and drops them. Memory holds
    # rows x V logits instead of M x V, and nothing is computed twice.
    rows = 1024

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # (M, C), (V, C), (M,) -> ()
        M, device = len(targets), hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        matrix = weight.to(torch.get_autocast_dtype(device)) if autocast else weight
        need_grad = hidden.requires_grad or weight.requires_grad
        grad_weight = torch.zeros_like(weight) if need_grad else None
        at_least_float32 = torch.promote_types(matrix.dtype, torch.float32)
        found, grads = [], []  # log-probabilities of the targets, gradients of the hidden states
        for start in range(0, M, HeadLoss.rows):
            rows = slice(start, start + HeadLoss.rows)
            logits = F.linear(hidden[rows].to(matrix.dtype), matrix)  # (rows, V)
            log_probs = F.log_softmax(logits, dim=-1, dtype=at_least_float32)
            target = targets[rows, None]  # (rows, 1)
            found.append(log_probs.gather(1, target))
            if need_grad:  # d (sum of losses) / d logits = softmax - one-hot
                grad_logits = log_probs.exp_().scatter_(1, target, found[-1].expm1())
                grad_logits = grad_logits.to(matrix.dtype)
                grads.append(grad_logits @ matrix)
                if matrix is weight:
                    grad_weight.addmm_(grad_logits.T, hidden[rows])
                else:  # under autocast the sum over chunks stays in float32
                    grad_weight += grad_logits.T @ hidden[rows].to(matrix.dtype)
        grad_hidden = torch.cat(grads).to(hidden.dtype) if need_grad else None
        ctx.save_for_backward(grad_hidden, grad_weight)
        mean = -torch.cat(found).mean(dtype=widest_float(hidden.device))
        return mean.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad = grad / len(grad_hidden)  # of the mean
        return grad_hidden * grad, grad_weight * grad, None
