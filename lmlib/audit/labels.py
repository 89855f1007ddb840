"""Labels: the loss at each position must be that of the next token, shifted once."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lmlib.audit.probe import Probe, fixed_rng
from lmlib.audit.report import Report

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (model, inputs, targets) -> scalar
IGNORED = -100  # the label that cross_entropy leaves out


def check_labels(model: nn.Module, inputs: Tensor | None = None, targets: Tensor | None = None,
                 loss: Loss | None = None, vocab_size: int | None = None,
                 padding: int | None = None) -> Report:
    """Check that labels are shifted by one token in all, by the batch or by the loss.

    Args:
        inputs, targets: a training batch, both (B, T). None: random ids.
        loss: the training loss. None: `model.loss(inputs, targets)`, or what forward returns for
            `targets=`, or for `labels=` (which transformers' models shift themselves).
        padding: the id that fills short rows, if any; its labels must be -100.

    Raises:
        ValueError: the model computes no loss, or the shapes are wrong.
    """
    if inputs is not None and (inputs.dim() != 2 or targets is None
                               or targets.shape != inputs.shape):
        raise ValueError("inputs and targets must both have the shape (B, T).")
    probe = Probe(model, vocab_size, inputs.shape[1] if inputs is not None else None)
    if inputs is None:
        ids = probe.draw(4, min(probe.sequence_length, 32), seed=5)
        shifts = "labels" in probe.accepts and not callable(getattr(model, "loss", None))
        inputs, targets = ids if shifts else ids[:, :-1], ids if shifts else ids[:, 1:]
        inputs, targets = inputs.contiguous(), targets.contiguous()
    inputs, targets = inputs.to(probe.device), targets.to(probe.device)
    with torch.no_grad():
        logits = probe(inputs)
        with fixed_rng(probe.device, 0):
            value = float(loss(probe.model, inputs, targets) if loss
                          else _model_loss(probe, inputs, targets))
    return _judge(inputs, targets, logits, value, padding)


def _judge(inputs: Tensor, targets: Tensor, logits: Tensor, loss: float,
           padding: int | None) -> Report:
    """Compare the loss with the cross-entropy of labels (B, T) at every small shift."""
    shifts, labeled = range(min(4, targets.shape[1])), targets != IGNORED
    in_batch = next((k for k in shifts if _shifted_by(inputs, targets, k)), None)
    expected = {k: _cross_entropy(logits, targets, k) for k in shifts}
    nearest = min(shifts, key=lambda k: abs(expected[k] - loss))
    in_loss = nearest if abs(expected[nearest] - loss) <= 1e-4 * max(1, abs(loss)) else None
    passed, fault = False, ""
    if in_batch is None:
        fault, summary = "unrelated labels", "the labels are not the batch's tokens at any shift."
    elif padding is not None and bool((_row_ends(inputs == padding) & labeled).any()):
        fault, summary = "padding", f"padding (id {padding}) has labels; set them to {IGNORED}."
    elif in_loss is None:
        passed, fault = None if bool(labeled.all()) else False, "another loss"
        why = "something is added to it" if passed is None else f"it may count labels of {IGNORED}"
        due = expected.get(1 - in_batch, expected[0])
        summary = (f"the loss ({loss:.4f}) is not the labels' mean cross-entropy at any shift (of "
                   f"the next token: {due:.4f}): {why}.")
    elif (total := in_batch + in_loss) == 1:
        passed, summary = True, "each position's loss is that of the next token, shifted once."
    else:
        shift = {0: "unshifted", 2: "shifted twice"}.get(total, f"shifted {total} times")
        label = f"the token {total} ahead" if total else "its own input, which it can copy"
        fault, summary = f"labels {shift}", f"each position's label is {label} (labels {shift})."
    numbers = {"shift of the batch": in_batch, "shift of the loss": in_loss, "loss": loss}
    return Report("labels", passed, summary, pattern=fault, numbers=numbers)


def _model_loss(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss that the model itself computes."""
    if callable(getattr(probe.model, "loss", None)):
        return probe.model.loss(inputs, targets)
    name = next((name for name in ("targets", "labels") if name in probe.accepts), None)
    output = probe.forward(inputs, **{name: targets}) if name else None
    loss = getattr(output, "loss", None)
    if loss is None:
        parts = output if isinstance(output, tuple) else (output,)
        loss = next((part for part in parts if isinstance(part, Tensor) and part.dim() == 0), None)
    if loss is None:
        raise ValueError("The model computes no loss that the audit knows: pass "
                         "loss=lambda model, inputs, targets: ...")
    return loss


def _shifted_by(inputs: Tensor, targets: Tensor, k: int) -> bool:
    """Check whether every label at t, unless ignored, is the input at t + k."""
    labels = targets[:, : targets.shape[1] - k]
    return bool(((labels == inputs[:, k:]) | (labels == IGNORED)).all())


def _row_ends(padding: Tensor) -> Tensor:
    """Return where padding (B, T) lasts to the end of its row; elsewhere its id may be a token."""
    return padding.flip(1).cummin(1).values.flip(1)


def _cross_entropy(logits: Tensor, targets: Tensor, k: int) -> float:
    """Return the mean loss of the logits at t for the label at t + k."""
    logits = logits[:, : targets.shape[1] - k].flatten(0, 1).double()
    return float(cross_entropy(logits, targets[:, k:].flatten(), ignore_index=IGNORED))
