"""Cross-entropy of a linear head without holding all logits."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
        grad_hidden = torch.empty_like(hidden) if need_grad else None
        grad_weight = torch.zeros_like(weight) if need_grad else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, M, HeadLoss.rows):
            rows = slice(start, start + HeadLoss.rows)
            logits = F.linear(hidden[rows].to(matrix.dtype), matrix)  # (rows, V)
            at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
            log_probs = F.log_softmax(logits, dim=-1, dtype=at_least_float32)
            target = targets[rows, None]  # (rows, 1)
            total -= log_probs.gather(1, target).sum(dtype=torch.float64)
            if need_grad:  # d loss / d logits = (softmax - one-hot) / M
                grad_logits = log_probs.exp_()
                grad_logits.scatter_add_(1, target, torch.full_like(grad_logits[:, :1], -1.0))
                grad_logits = (grad_logits / M).to(matrix.dtype)
                grad_hidden[rows] = grad_logits @ matrix
                if matrix is weight:
                    grad_weight.addmm_(grad_logits.T, hidden[rows])
                else:  # under autocast the sum over chunks stays in float32
                    grad_weight += grad_logits.T @ hidden[rows].to(matrix.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return (total / M).to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None
