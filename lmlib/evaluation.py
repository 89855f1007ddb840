"""What a model scores on held-out text."""

import math

import torch
from torch import Tensor

from lmlib.model import LanguageModel


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


def evaluate(
    model: LanguageModel, windows: Tensor, token_bytes: Tensor, batch_size: int, dtype: torch.dtype = torch.float32
) -> dict[str, float | None]:
    """Scores on whole windows (W, T + 1) of held-out tokens, in evaluation mode.

    Args:
        token_bytes: UTF-8 bytes of each token's text, 0 for separators: (V,).
        dtype: bfloat16 runs the model under autocast.

    Returns:
        val_loss (mean nats a token), val_loss_stderr (over windows; None for one), val_accuracy (top-1, all positions),
        val_perplexity (exp of val_loss), val_bits_per_byte (summed nats / ln 2 / bytes of the predicted text).
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    window_losses, right = [], 0
    for chunk in windows.split(batch_size):
        ids, targets = chunk[:, :-1].to(device), chunk[:, 1:].to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses, correct = token_scores(model, ids, targets)
        window_losses.append(losses.double().mean(1).cpu())
        right += int(correct.sum())
    model.train(was_training)

    losses, targets = torch.cat(window_losses), windows[:, 1:]
    loss, tokens = float(losses.mean()), targets.numel()
    return {
        "val_loss": loss,
        "val_loss_stderr": float(losses.std() / len(losses) ** 0.5) if len(losses) > 1 else None,
        "val_accuracy": right / tokens,
        "val_perplexity": math.exp(loss) if loss < 700 else math.inf,
        "val_bits_per_byte": loss * tokens / math.log(2) / max(1, int(token_bytes[targets].sum())),
    }
