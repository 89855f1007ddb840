"""Score a model on held-out text.

Shapes: B batch, T positions, W windows, V vocab_size.
"""

import math

import torch
from torch import Tensor

from lmlib.model.transformer import LanguageModel


@torch.no_grad()
def token_scores(model: LanguageModel, ids: Tensor, targets: Tensor,
                 rows: int = 1024) -> tuple[Tensor, Tensor]:
    """Return the loss in nats and whether the top-1 prediction is correct: (B, T) -> two (B, T).

    The head runs over `rows` positions at a time, so that the logits of a large vocabulary never
    fill the memory.
    """
    hidden, flat = model.model(ids).flatten(0, 1), targets.flatten()  # (B T, C), (B T)
    losses, correct = [], []
    for start in range(0, len(flat), rows):
        target = flat[start : start + rows]
        logits = model.lm_head(hidden[start : start + rows]).float()  # (rows, V)
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        correct.append(logits.argmax(-1) == target)
    return torch.cat(losses).view_as(targets), torch.cat(correct).view_as(targets)


def score_windows(model: LanguageModel, windows: Tensor, batch_size: int,
                  dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Apply `token_scores` to windows (W, T + 1) in evaluation mode.

    Args:
        dtype: bfloat16 runs the model under autocast.

    Returns:
        Losses (float64) and correctness (bool), both (W, T), on the CPU.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    scores = []
    for chunk in windows.split(batch_size):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, hit = token_scores(model, chunk[:, :-1].to(device), chunk[:, 1:].to(device))
        scores.append((loss.double().cpu(), hit.cpu()))
    model.train(was_training)
    losses, correct = zip(*scores, strict=True)
    return torch.cat(losses), torch.cat(correct)


def summarize(losses: Tensor, correct: Tensor, targets: Tensor,
              token_bytes: Tensor) -> dict[str, float | None]:
    """Summarize the scores of windows, all (W, T), for the records and results.json.

    Args:
        losses: nats.
        token_bytes: UTF-8 bytes of each token's text, 0 for separators: (V,).

    Returns:
        val_loss (mean nats per token), val_loss_stderr (over windows; None for one window),
        val_accuracy (top-1, all positions), val_perplexity (exp of val_loss), val_bits_per_byte
        (summed nats / ln 2 / bytes of the predicted text).
    """
    of_window = losses.mean(1)
    loss, count = float(of_window.mean()), len(of_window)
    return {
        "val_loss": loss,
        "val_loss_stderr": float(of_window.std() / count**0.5) if count > 1 else None,
        "val_accuracy": float(correct.double().mean()),
        "val_perplexity": math.exp(loss) if loss < 700 else math.inf,
        "val_bits_per_byte":
            loss * targets.numel() / math.log(2) / max(1, int(token_bytes[targets].sum())),
    }


def evaluate(model: LanguageModel, windows: Tensor, token_bytes: Tensor, batch_size: int,
             dtype: torch.dtype = torch.float32) -> dict[str, float | None]:
    """Score a model on windows (W, T + 1): `score_windows`, then `summarize`."""
    scores = score_windows(model, windows, batch_size, dtype)
    return summarize(*scores, windows[:, 1:], token_bytes)


def scores_by_position(losses: Tensor, correct: Tensor) -> dict[str, list[float]]:
    """Return mean loss (nats) and accuracy at each position of a window, from (W, T) each."""
    return {
        "val_loss_by_position": [round(value, 4) for value in losses.mean(0).tolist()],
        "val_accuracy_by_position":
            [round(value, 4) for value in correct.double().mean(0).tolist()],
    }
