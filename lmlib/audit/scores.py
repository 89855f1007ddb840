"""Scores: how an evaluation is made, how precise it is, and what its loss by position shows."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lmlib.audit.probe import fixed_rng
from lmlib.audit.report import Report
from lmlib.errors import UserError
from lmlib.intervals import Estimate


def check_evaluation(evaluate: Callable[[nn.Module, Tensor], float], model: nn.Module,
                     windows: Tensor) -> Report:
    """Check that an evaluation is deterministic, in evaluation mode, and scores every window.

    `evaluate` returns the mean loss of (model, windows) and may change the model's mode; `windows`
    are four or more held-out ones, (W, T + 1).
    """
    if len(windows) < 4:
        raise UserError(f"check_evaluation needs four windows or more, not {len(windows)}.")
    modes = {module: module.training for module in model.modules()}
    device = next((tensor.device for tensor in model.parameters()), windows.device)
    def score(rows: Tensor, training: bool = False, seed: int = 0) -> float:
        model.train(training)
        with fixed_rng(device, seed), torch.no_grad():
            return float(evaluate(model, rows))

    try:
        loss, first, second = score(windows), score(windows, True, 1), score(windows, True, 2)
        changed = torch.cat([windows[:-1], windows[:1].flip(1)])
        unchanged, differs = score(changed) == loss, score(windows[-1:]) != score(changed[-1:])
    finally:
        for module, training in modes.items():
            module.training = training
    tolerance, fault = 1e-6 * max(1.0, abs(loss)), ""
    random = abs(first - second) > tolerance
    if random or abs(loss - first) > tolerance:
        fault, why = "in training mode", "its layers use batch statistics"
        summary = (f"the model is scored in training mode: {loss:.6f} in evaluation mode, then "
                   f"{first:.6f} and {second:.6f}; {'it is random (dropout)' if random else why}.")
    elif unchanged and differs:
        fault = "first batches only"
        summary = f"the last of {len(windows)} windows does not change the score."
    else:
        summary = f"it is deterministic and scores each of the {len(windows)} windows."
    numbers = {"loss": loss, "in training mode": [first, second], "windows": len(windows)}
    return Report("evaluation", not fault, summary, pattern=fault, numbers=numbers)


def check_sample(scores: dict[str, Any], windows: int, tokens: int,
                 unit: str = "documents") -> Report:
    """Check that an evaluation has enough windows and documents to give `val_loss` an interval.

    `val_loss_stderr` is clustered by document, of which there are `val_documents`; `unit` names
    them. Scores of older versions lack that number: their error treats windows as independent.
    """
    loss, error = scores["val_loss"], scores.get("val_loss_stderr")
    documents = scores.get("val_documents")
    numbers = {"windows": windows, "documents": documents, "tokens": tokens, "loss": loss,
               "stderr": error}
    sample = f"{windows} windows, {tokens:,} tokens: {loss:.4f} nats"
    if windows < 8:
        summary = f"{windows} windows are too few for a standard error; raise validation_windows."
        return Report("sample", False, summary, [], "too small", numbers)
    if documents is None:
        return Report("sample", None, f"{sample}; these scores, of an older version, do not say of "
                      "how many documents, and their ± treats windows as independent.", [], "",
                      numbers)
    sample = f"{windows} windows of {documents} {unit}, {tokens:,} tokens: {loss:.4f} nats"
    if documents < 2 or error is None:
        return Report("sample", None, f"{sample}; one document has no standard error.", [], "",
                      numbers)
    estimate = Estimate(loss, error, documents)
    interval = f"± {estimate.half_width():.4f} (95 %)"
    if estimate.is_few:
        summary = f"few documents: {documents}; {sample}, {interval}, but the ± is not judged."
        return Report("sample", None, summary, [], "few documents", numbers)
    summary = (f"{sample}, {interval}, clustered by document. It is the error of this score alone; "
               "to compare models, take the paired differences on the same documents.")
    return Report("sample", True, summary, numbers=numbers)


def check_profile(losses: Tensor | Iterable[float], accuracy: Tensor | Iterable[float]) -> Report:
    """Check that loss (nats) and accuracy by position look like a causal model's."""
    # Without a causal mask, a model sees the answer at every position but the last. Its accuracy
    # over L positions is (L - 1 + p) / L, its loss the last position's over L. A model that has
    # memorized the text pays for the first positions, which locate the passage, and for no others.
    losses, accuracy = (torch.as_tensor(list(x), dtype=torch.float64) for x in (losses, accuracy))
    if losses.dim() != 1 or losses.shape != accuracy.shape or len(losses) < 4:
        raise UserError("check_profile needs loss and accuracy at each of four positions or more.")
    if not (losses.isfinite().all() and accuracy.isfinite().all()):
        return Report("profile", None, "some losses are not finite numbers: the model diverged.")
    L, first, last, p = len(losses), float(losses[0]), float(losses[-1]), float(accuracy[-1])
    others, loss, correct = (float(x.mean()) for x in (losses[:-1], losses, accuracy))
    fault = ""
    if last > 1 and others < last / 10 and first < last / 2:
        fault = "missing mask"
        summary = (f"a missing causal mask: all positions but the last see the answer (loss "
                   f"{others:.4f}); the last is correct {p:.0%} of the time, at {last:.2f} nats. "
                   f"So accuracy is ({L} - 1 + {p:.2f}) / {L} = {(L - 1 + p) / L:.2%} (measured: "
                   f"{correct:.2%}) and loss {last:.2f} / {L} = {last / L:.4f} (measured: "
                   f"{loss:.4f}).")
    elif first < 0.5 and accuracy[0] > 0.9:
        fault = "answers are seen"
        summary = (f"after one token the model predicts the next ({accuracy[0]:.0%} correct, "
                   f"{first:.2f} nats): it sees the answer, or the text is trivial.")
    elif losses[L // 2 : -1].mean() < 0.05:
        start = 1 + int((losses > 0.5).nonzero().max()) if (losses > 0.5).any() else 1
        fault, beginning = "memorized", f"{start} positions cost" if start > 1 else "position costs"
        summary = (f"memorized training text: the first {beginning} "
                   f"{losses[:start].sum():.1f} nats a window (to locate the passage), the other "
                   f"{L - start:,} together {losses[start:].sum():.1f}.")
    else:
        effect = "does not help yet" if last > first else "lowers the loss"
        summary = f"{first:.2f} nats at position 1, {last:.2f} at position {L}: context {effect}."
    numbers = {"loss": loss, "accuracy": correct, "last loss": last, "last accuracy": p,
               "positions": L}
    return Report("profile", not fault, summary, pattern=fault, numbers=numbers)
