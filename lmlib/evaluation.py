"""What a model scores on held-out text."""

import math

import torch
from torch import Tensor

from lmlib.model.transformer import LanguageModel


@torch.no_grad()
def token_scores(model: LanguageModel, ids: Tensor, targets: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """(loss in nats, whether the most likely token was right) at each position: two (B, T) from two (B, T).

    The head runs over `rows` positions at a time, so that logits never fill the memory.
    """
    hidden, flat = model.model(ids).flatten(0, 1), targets.flatten()
    losses, right = [], []
    for start in range(0, len(flat), rows):
        logits, target = model.lm_head(hidden[start : start + rows]).float(), flat[start : start + rows]
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        right.append(logits.argmax(-1) == target)
    return torch.cat(losses).view_as(targets), torch.cat(right).view_as(targets)


def score_windows(
    model: LanguageModel, windows: Tensor, batch_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """`token_scores` of whole windows (W, T + 1), in evaluation mode: float64 and bool, both (W, T), on the CPU.

    `dtype` bfloat16 runs the model under autocast.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses, right = [], []
    for chunk in windows.split(batch_size):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, correct = token_scores(model, chunk[:, :-1].to(device), chunk[:, 1:].to(device))
        losses.append(loss.double().cpu())
        right.append(correct.cpu())
    model.train(was_training)
    return torch.cat(losses), torch.cat(right)


def summarise(losses: Tensor, right: Tensor, targets: Tensor, token_bytes: Tensor) -> dict[str, float | None]:
    """The scores of windows whose tokens have these losses (nats), hits and targets, all (W, T).

    Args:
        token_bytes: UTF-8 bytes of each token's text, 0 for separators: (V,).

    Returns:
        val_loss (mean nats a token), val_loss_stderr (over windows; None for one), val_accuracy (top-1, all positions),
        val_perplexity (exp of val_loss), val_bits_per_byte (summed nats / ln 2 / bytes of the predicted text).
    """
    of_window = losses.mean(1)
    loss = float(of_window.mean())
    return {
        "val_loss": loss,
        "val_loss_stderr": float(of_window.std() / len(of_window) ** 0.5) if len(of_window) > 1 else None,
        "val_accuracy": float(right.double().mean()),
        "val_perplexity": math.exp(loss) if loss < 700 else math.inf,
        "val_bits_per_byte": loss * targets.numel() / math.log(2) / max(1, int(token_bytes[targets].sum())),
    }


def evaluate(
    model: LanguageModel, windows: Tensor, token_bytes: Tensor, batch_size: int, dtype: torch.dtype = torch.float32
) -> dict[str, float | None]:
    """The scores of a model on whole windows (W, T + 1) of held-out tokens: see `score_windows` and `summarise`."""
    return summarise(*score_windows(model, windows, batch_size, dtype), windows[:, 1:], token_bytes)


def profile(losses: Tensor, right: Tensor) -> dict[str, list[float]]:
    """Mean loss (nats) and accuracy at each position of a window, from those of each token (W, T)."""
    return {
        "val_loss_by_position": [round(value, 4) for value in losses.mean(0).tolist()],
        "val_accuracy_by_position": [round(value, 4) for value in right.double().mean(0).tolist()],
    }
