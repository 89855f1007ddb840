"""Cross-entropy of a linear head without holding all logits."""

import torch
import torch.nn.functional as F
from torch import Tensor


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear head, a chunk of rows at a time: hidden (M, C), weight (V, C), targets (M,).

    Each chunk's logits turn into its gradients at once and are dropped, so memory holds `rows` x V logits
    instead of M x V, and nothing is computed twice. Equals F.cross_entropy(hidden @ weight.T, targets).
    """

    rows = 1024

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        M = len(targets)
        matrix = weight.to(torch.get_autocast_dtype(hidden.device.type)) if _autocast(hidden) else weight
        need_grad = hidden.requires_grad or weight.requires_grad
        grad_hidden = torch.empty_like(hidden) if need_grad else None
        grad_weight = torch.zeros_like(weight) if need_grad else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, M, HeadLoss.rows):
            chunk, target = hidden[start : start + HeadLoss.rows], targets[start : start + HeadLoss.rows]
            logits = F.linear(chunk.to(matrix.dtype), matrix)  # (rows, V)
            log_probs = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            total -= log_probs.gather(1, target[:, None]).sum(dtype=torch.float64)
            if need_grad:  # d loss / d logits = (softmax - one hot) / M
                grad_logits = log_probs.exp_()
                grad_logits.scatter_add_(1, target[:, None], torch.full_like(grad_logits[:, :1], -1.0))
                grad_logits = (grad_logits / M).to(matrix.dtype)
                grad_hidden[start : start + HeadLoss.rows] = grad_logits @ matrix
                if matrix is weight:
                    grad_weight.addmm_(grad_logits.T, chunk)
                else:  # under autocast the sum stays in float32
                    grad_weight += grad_logits.T @ chunk.to(matrix.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return (total / M).to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)
