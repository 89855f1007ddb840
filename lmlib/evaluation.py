"""Score a model on windows of text. Shapes: B batch, T positions, W windows, V vocab_size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lmlib.model.transformer import LanguageModel


@torch.no_grad()
def token_scores(model: LanguageModel, ids: Tensor, targets: Tensor,
                 rows: int = 1024) -> tuple[Tensor, Tensor]:
    """Return the loss in nats and whether the top-1 prediction is correct: (B, T) -> two (B, T)."""
    losses, correct = [], []
    hidden = model.model(ids).flatten(0, 1)  # (B T, C)
    # In chunks of `rows` positions, so that the logits of a large vocabulary fit the memory.
    for chunk, target in zip(hidden.split(rows), targets.flatten().split(rows), strict=True):
        logits = model.lm_head(chunk).float()  # (rows, V)
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        correct.append(logits.argmax(-1) == target)
    return torch.cat(losses).view_as(targets), torch.cat(correct).view_as(targets)


def score_windows(model: LanguageModel, windows: Tensor, batch_size: int,
                  dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Apply `token_scores` to windows (W, T + 1) in evaluation mode; bfloat16: under autocast.

    Returns losses (float64) and correctness (bool), both (W, T), on the CPU.
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

    `losses` are in nats. `token_bytes` (V,) holds the UTF-8 bytes of each token, 0 for separators.
    """
    of_window, total_bytes = losses.mean(1), max(1, int(token_bytes[targets].sum()))
    loss, count = float(of_window.mean()), len(of_window)
    return {
        "val_loss": loss,  # mean nats per token
        "val_loss_stderr": float(of_window.std() / count**0.5) if count > 1 else None,  # of windows
        "val_accuracy": float(correct.double().mean()),  # top-1, all positions
        "val_perplexity": math.exp(loss) if loss < 700 else math.inf,
        "val_bits_per_byte": loss * targets.numel() / math.log(2) / total_bytes}


def evaluate(model: LanguageModel, windows: Tensor, token_bytes: Tensor, batch_size: int,
             dtype: torch.dtype = torch.float32) -> dict[str, float | None]:
    """Score a model on windows (W, T + 1): `score_windows`, then `summarize`."""
    return summarize(*score_windows(model, windows, batch_size, dtype), windows[:, 1:], token_bytes)


def scores_by_position(losses: Tensor, correct: Tensor) -> dict[str, list[float]]:
    """Return mean loss (nats) and accuracy at each position of a window, from (W, T) each."""
    means = {"loss": losses.mean(0).tolist(), "accuracy": correct.double().mean(0).tolist()}
    return {f"val_{name}_by_position": [round(value, 4) for value in values]
            for name, values in means.items()}
