"""How an evaluation was made, and what its scores look like."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lmlib.audit.probe import fixed_rng
from lmlib.audit.report import Report


def check_evaluation(evaluate: Callable[[nn.Module, Tensor], float], model: nn.Module, windows: Tensor) -> Report:
    """Whether an evaluation measures what it should: the model without chance, in evaluation mode, on every window.

    Args:
        evaluate: the mean loss of (model, windows); it may leave the model as it found it or not.
        windows: held-out windows (W, T + 1), four or more.

    Raises:
        ValueError: there are fewer than four windows.
    """
    if len(windows) < 4:
        raise ValueError(f"check_evaluation needs four windows or more, not {len(windows)}.")
    was_training = {module: module.training for module in model.modules()}
    device = next((tensor.device for tensor in model.parameters()), windows.device)

    def measured(training: bool, rows: Tensor, seed: int) -> float:
        model.train(training)
        with fixed_rng(device, seed), torch.no_grad():
            return float(evaluate(model, rows))

    try:
        plain, again, as_training = measured(False, windows, 0), measured(True, windows, 1), measured(True, windows, 2)
        last = windows.clone()
        last[-1] = windows[0].flip(0)
        without = measured(False, last, 0)
        differs = measured(False, windows[-1:], 0) != measured(False, last[-1:], 0)
    finally:
        for module, mode in was_training.items():
            module.training = mode
    numbers = {"loss": plain, "in training mode": [again, as_training], "windows": len(windows)}
    scale = 1e-6 * max(1.0, abs(plain))
    if abs(plain - again) > scale or abs(again - as_training) > scale:
        by_chance = abs(again - as_training) > scale
        words = f"the model is judged in training mode: {plain:.6f} in evaluation mode, then {again:.6f} and {as_training:.6f}; "
        words += "chance (dropout) is in it." if by_chance else "its layers act as in training (batch statistics)."
        return Report("evaluation", False, words, [], "in training mode", numbers)
    if without == plain and differs:
        words = f"the score stays the same when the last of {len(windows)} windows is another: only the first ones are looked at."
        return Report("evaluation", False, words, [], "first batches only", numbers)
    words = f"it is without chance, and looks at each of the {len(windows)} windows that it was given."
    return Report("evaluation", True, words, [], "", numbers)


def check_sample(scores: dict[str, Any], windows: int, tokens: int) -> Report:
    """How large the held-out sample is, and what difference it could show: an evaluation's scores, its windows and their
    tokens."""
    loss, error = scores["val_loss"], scores.get("val_loss_stderr")
    numbers = {"windows": windows, "tokens": tokens, "loss": loss, "stderr": error}
    if error is None or windows < 8:
        words = f"{windows} windows are too few to say how far chance moves the score; raise validation_windows."
        return Report("sample", False, words, [], "too small", numbers)
    words = f"{windows} windows, {tokens:,} tokens: {loss:.4f} ± {error:.4f} nats. Against a model judged on other windows, a "
    words += f"difference below {2 * math.sqrt(2) * error:.3f} is noise."
    return Report("sample", True, words, [], "", numbers)


def is_noise(loss: float, stderr: float, other: float, other_stderr: float) -> bool:
    """Whether two scores on different windows differ by less than twice the standard error of their difference."""
    return abs(loss - other) < 2 * math.hypot(stderr, other_stderr)


def check_profile(losses: Tensor | Iterable[float], accuracy: Tensor | Iterable[float]) -> Report:
    """Whether loss (nats) and accuracy by position look like those of a model that reads from left to right.

    A model without its causal mask knows every answer but the last position's, which nothing stands behind; so of L positions
    its accuracy is (L - 1 + p) / L and its loss that of the last position over L. A model that has memorised the text pays for
    the first positions, which tell it where it is, and for nothing else.
    """
    losses, accuracy = (torch.as_tensor(list(values), dtype=torch.float64) for values in (losses, accuracy))
    if losses.dim() != 1 or losses.shape != accuracy.shape or len(losses) < 4:
        raise ValueError("check_profile needs the mean loss and accuracy at each of four positions or more.")
    L, last, p = len(losses), float(losses[-1]), float(accuracy[-1])
    others, loss, right = float(losses[:-1].mean()), float(losses.mean()), float(accuracy.mean())
    tail = float(losses[L // 2 : -1].mean())
    numbers = {"loss": loss, "accuracy": right, "last loss": last, "last accuracy": p, "positions": L}
    first = float(losses[0])
    if last > 1 and others < last / 10 and first < last / 2:
        words = f"the mark of a missing causal mask. All positions but the last know their answer (loss {others:.4f}); the last, "
        words += f"behind which nothing stands, is right {p:.0%} of the time and pays {last:.2f} nats. So accuracy is "
        words += f"({L} - 1 + {p:.2f}) / {L} = {(L - 1 + p) / L:.2%} (measured: {right:.2%}) and loss "
        words += f"{last:.2f} / {L} = {last / L:.4f} (measured: {loss:.4f})."
        return Report("profile", False, words, [], "missing mask", numbers)
    if first < 0.5 and float(accuracy[0]) > 0.9:
        words = f"after one token the model knows the next ({accuracy[0]:.0%} right, {first:.2f} nats): it sees it, or the text "
        words += "says nothing new."
        return Report("profile", False, words, [], "answers are seen", numbers)
    if tail < 0.05:
        start = int((losses > 0.5).nonzero().max()) + 1
        found, recited = float(losses[:start].sum()), float(losses[start:].sum())
        words = (
            f"recited, not predicted: the first {start} positions cost {found:.1f} nats a window (to find the place), the other "
        )
        words += f"{L - start:,} together {recited:.1f}. Such text was in training."
        return Report("profile", False, words, [], "memorised", numbers)
    words = f"{first:.2f} nats at the first position, {last:.2f} at the last of {L}: more context, less surprise."
    if last > first:
        words = f"{first:.2f} nats at the first position, {last:.2f} at the last of {L}: context does not help yet."
    return Report("profile", True, words, [], "", numbers)


def loss_by_overlap(losses: Tensor, shared: Tensor) -> dict[str, float]:
    """How much a held-out loss rests on text that training has too: `all`, `new` and `shared` mean losses in nats, and the
    `share` of shared tokens, from the losses of each token (W, T) and whether it is shared (W, T)."""
    new = losses[~shared]
    return {
        "all": float(losses.mean()),
        "new": float(new.mean()) if len(new) else math.nan,
        "shared": float(losses[shared].mean()) if bool(shared.any()) else math.nan,
        "share": float(shared.double().mean()),
    }
