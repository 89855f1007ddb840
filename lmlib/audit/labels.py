"""Labels: the loss at each position must be that of the next token, shifted once."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lmlib.audit.probe import Probe, fixed_rng
from lmlib.audit.report import Report
from lmlib.errors import UserError

IGNORED = -100  # the label that cross_entropy leaves out


def check_labels(model: nn.Module, inputs: Tensor | None = None, targets: Tensor | None = None,
                 loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
                 vocab_size: int | None = None, padding: int | None = None) -> Report:
    """Check that labels are shifted by one token in all, by the batch or by the loss.

    `inputs` and `targets` are a training batch, both (B, T), or else random ids. `loss`,
    of (model, inputs, targets), is else `model.loss(inputs, targets)` or what forward returns for
    `targets=` or `labels=` (which transformers' models shift themselves). Labels of `padding`, the
    id that fills short rows, must be -100. A model that computes no loss raises ValueError.
    """
    if inputs is not None and (inputs.dim() != 2 or getattr(targets, "shape", 0) != inputs.shape):
        raise UserError("inputs and targets must both have the shape (B, T).")
    probe = Probe(model, vocab_size, inputs.shape[1] if inputs is not None else None)
    if inputs is None:
        ids = probe.draw(4, min(probe.sequence_length, 32), seed=5)
        shifts = "labels" in probe.accepts and not callable(getattr(model, "loss", None))
        inputs, targets = (ids, ids) if shifts else (ids[:, :-1], ids[:, 1:])
        inputs, targets = inputs.contiguous(), targets.contiguous()
    batch = inputs.to(probe.device), targets.to(probe.device)
    with torch.no_grad():
        logits = probe(batch[0])
        with fixed_rng(probe.device, 0):
            value = float(loss(probe.model, *batch) if loss else _model_loss(probe, *batch))
    return _judge(*batch, logits, value, padding)


def _judge(inputs: Tensor, targets: Tensor, logits: Tensor, loss: float,
           padding: int | None) -> Report:
    """Compare the loss with the cross-entropy of labels (B, T) at every small shift."""
    T, ignored, matching, expected = targets.shape[1], targets == IGNORED, [], {}
    for k in range(min(4, T)):  # the batch shifts labels by k, or the loss compares those at t + k
        same = (targets[:, : T - k] == inputs[:, k:]) | ignored[:, : T - k]
        matching += [k] if same.all() else []
        expected[k] = float(cross_entropy(logits[:, : T - k].flatten(0, 1).cpu().double(),
                                          targets[:, k:].flatten().cpu(), ignore_index=IGNORED))
    in_batch = min(matching, default=None)
    nearest = min(expected, key=lambda k: abs(expected[k] - loss))
    in_loss = nearest if abs(expected[nearest] - loss) <= 1e-4 * max(1, abs(loss)) else None
    # Padding lasts to the end of its row; elsewhere its id may be a token.
    padded = padding is not None and (inputs == padding).flip(1).cummin(1).values.flip(1)
    passed, fault = False, ""
    if in_batch is None:
        fault, summary = "unrelated labels", "the labels are not the batch's tokens at any shift."
    elif (padded & ~ignored).any():
        fault, summary = "padding", f"padding (id {padding}) has labels; set them to {IGNORED}."
    elif in_loss is None:
        passed, fault = False if ignored.any() else None, "another loss"
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
    parts = output if isinstance(output, tuple) else (getattr(output, "loss", output),)
    loss = next((part for part in parts if isinstance(part, Tensor) and part.dim() == 0), None)
    if loss is None:
        raise UserError("The model computes no loss that the audit knows: pass "
                        "loss=lambda model, inputs, targets: ...")
    return loss
