"""Score a model on windows of text. Shapes: B batch, T positions, W windows, V vocab_size."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmlib import distributed
from lmlib.data.tokens import EvaluationText
from lmlib.intervals import clustered_mean
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
        scores.append((loss.cpu().double(), hit.cpu()))
    model.train(was_training)
    losses, correct = zip(*scores, strict=True)
    return torch.cat(losses), torch.cat(correct)


@dataclass(frozen=True)
class Scores:
    """The scores of a model on the windows of a text."""
    text: EvaluationText
    losses: Tensor  # (W, T) nats, float64
    correct: Tensor  # (W, T) bool
    bytes: Tensor  # (W, T) of UTF-8 in each target, 0 for separators

    def by_document(self) -> dict[str, list]:
        """Sum the scores of each document in each window: a column per quantity."""
        W, D = len(self.losses), len(self.text.units)
        window_and_document = self.text.documents + torch.arange(W)[:, None] * D  # (W, T)
        pairs, places = window_and_document.unique(return_inverse=True)  # (P,), (W, T)

        def total(values: Tensor) -> np.ndarray:
            return np.bincount(places.flatten(), values.flatten().double(), len(pairs))

        counts = {"hits": self.correct, "tokens": torch.ones_like(self.correct),
                  "bytes": self.bytes}
        return {"window": (pairs // D).tolist(), "document": (pairs % D).tolist(),
                "nats": total(self.losses).tolist(),
                **{name: total(values).astype(int).tolist() for name, values in counts.items()}}

    def to_json(self, step: int) -> dict[str, Any]:
        """Return the content of an evaluation's file: what comparing two models needs."""
        text, columns = self.text, self.by_document()
        units = [text.units[document] for document in columns["document"]]
        clusters = list(dict.fromkeys(units))
        places = {unit: place for place, unit in enumerate(clusters)}
        W, T = self.losses.shape
        return {"split": text.split, "step": step, "unit": text.unit, "data": text.data,
                "sequence_length": T, "windows": W, "clusters": clusters,
                "cluster": [places[unit] for unit in units], **columns}

    def summary(self, name: str = "val") -> dict[str, Any]:
        """Summarize for the records and results.json: `<name>_loss` and so on.

        The loss is the mean in nats per token. Its standard error is clustered: tokens of one
        document are alike, so the number of documents counts, not that of tokens or windows.
        """
        columns, clusters = self.by_document(), {}
        for document, nats, tokens in zip(columns["document"], columns["nats"], columns["tokens"],
                                          strict=True):
            sums = clusters.setdefault(self.text.units[document], [0.0, 0])
            sums[0], sums[1] = sums[0] + nats, sums[1] + tokens
        loss = clustered_mean(clusters.values())
        total_bytes = max(1, int(self.bytes.sum()))
        return {
            f"{name}_loss": loss.mean,
            f"{name}_loss_stderr": loss.stderr,  # None: a single document
            f"{name}_documents": loss.clusters,
            f"{name}_accuracy": float(self.correct.double().mean()),  # top-1, all positions
            f"{name}_perplexity": math.exp(loss.mean) if loss.mean < 700 else math.inf,
            f"{name}_bits_per_byte": sum(columns["nats"]) / math.log(2) / total_bytes}


def evaluate(model: LanguageModel, text: EvaluationText, token_bytes: Tensor, batch_size: int,
             dtype: torch.dtype = torch.float32) -> Scores:
    """Score a model on an evaluation text; `token_bytes` (V,) has the UTF-8 bytes of each token.

    Several processes share the windows, in the same batches as one; each gets all scores.
    """
    shape = text.windows[:, 1:].shape
    losses, correct = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.int64)
    starts = range(0, len(text.windows), batch_size)
    for _, start in distributed.deal(starts):
        rows = slice(start, start + batch_size)
        losses[rows], correct[rows] = score_windows(model, text.windows[rows], batch_size, dtype)
    losses, correct = distributed.add_up(losses), distributed.add_up(correct).bool()
    return Scores(text, losses, correct, token_bytes[text.windows[:, 1:]])


def scores_by_position(losses: Tensor, correct: Tensor) -> dict[str, list[float]]:
    """Return mean loss (nats) and accuracy at each position of a window, from (W, T) each."""
    means = {"loss": losses.mean(0).tolist(), "accuracy": correct.double().mean(0).tolist()}
    return {f"val_{name}_by_position": [round(value, 4) for value in values]
            for name, values in means.items()}
