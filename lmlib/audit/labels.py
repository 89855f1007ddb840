"""Whether the loss is that of the next token."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmlib.audit.probe import Probe, fixed_rng
from lmlib.audit.report import Report


def check_labels(
    model: nn.Module,
    inputs: Tensor | None = None,
    targets: Tensor | None = None,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    vocab_size: int | None = None,
    padding: int | None = None,
) -> Report:
    """Whether the loss at each position is that of the next token: shifted once, not twice or never, and padding left out.

    Args:
        inputs, targets: a batch as training sees it, both (B, T). None: random ids, and what the model's own loss expects.
        loss: the training loss, of (model, inputs, targets). None: `model.loss(inputs, targets)`, or that which forward gives
            for `targets=`, or for `labels=` (which transformers' models shift by themselves).
        padding: the id that fills up short rows, if there is one; its labels must be -100.

    Raises:
        ValueError: the model has no loss that is known, or the batch has another shape.
    """
    if inputs is not None and (targets is None or targets.shape != inputs.shape or inputs.dim() != 2):
        raise ValueError("inputs and targets must both have the shape (B, T).")
    probe = Probe(model, vocab_size, inputs.shape[1] if inputs is not None else None)
    loss = loss or _own_loss(probe)
    if inputs is None:
        ids = probe.draw(4, min(probe.sequence_length, 32), seed=5)
        shifts_itself = "labels" in probe.accepts and not callable(getattr(model, "loss", None))
        inputs, targets = (ids, ids) if shifts_itself else (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    inputs, targets = inputs.to(probe.device), targets.to(probe.device)
    with torch.no_grad():
        logits = probe(inputs)
        with fixed_rng(probe.device, 0):
            value = float(loss(probe.model, inputs, targets))
    known, shifts = targets != -100, range(min(4, targets.shape[1]))
    in_data = next((k for k in shifts if _agree(inputs, targets, known, k)), None)
    could_be = {k: _cross_entropy(logits, targets, k) for k in shifts}
    nearest = min(shifts, key=lambda k: abs(could_be[k] - value))
    in_loss = nearest if abs(could_be[nearest] - value) <= 1e-4 * max(1, abs(value)) else None
    numbers = {"shift of the batch": in_data, "shift of the loss": in_loss, "loss": value}
    if in_data is None:
        return Report("labels", False, "the labels are not the tokens of the batch, at any shift.", [], "foreign labels", numbers)
    if padding is not None and bool(((inputs == padding).flip(1).cummin(1).values.flip(1) & known).any()):  # at the rows' ends
        return Report("labels", False, f"padding (id {padding}) is among the labels; write -100 there.", [], "padding", numbers)
    if in_loss is None:
        words = f"the loss ({value:.4f}) is the mean cross-entropy of the labels at no shift (at the next token it would be "
        words += f"{could_be.get(1 - in_data, could_be[0]):.4f}): "
        if bool(known.all()):
            return Report("labels", None, words + "something is added to it.", [], "another loss", numbers)
        return Report("labels", False, words + "labels of -100 are counted, it seems.", [], "another loss", numbers)
    total = in_data + in_loss
    if total == 1:
        return Report("labels", True, "each position's loss is that of the next token, shifted once.", [], "", numbers)
    name = {0: "unshifted", 2: "shifted twice"}.get(total, f"shifted {total} times")
    words = "the token that it is given: copying is enough" if total == 0 else f"the token {total} ahead"
    return Report("labels", False, f"each position's loss is that of {words} (labels {name}).", [], f"labels {name}", numbers)


def _own_loss(probe: Probe) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The loss that a model computes by itself."""
    if callable(getattr(probe.model, "loss", None)):
        return lambda model, x, y: model.loss(x, y)
    name = next((name for name in ("targets", "labels") if name in probe.accepts), None)
    if name is None:
        raise ValueError("The model has no loss that is known: pass loss=lambda model, inputs, targets: ...")

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        output = probe.forward(x, **{name: y})
        found = getattr(output, "loss", None)
        if found is None:
            parts = output if isinstance(output, tuple) else (output,)
            found = next((part for part in parts if isinstance(part, Tensor) and part.dim() == 0), None)
        if found is None:
            raise ValueError(f"The model gives no loss for {name}=...: pass loss=lambda model, inputs, targets: ...")
        return found

    return loss


def _agree(inputs: Tensor, targets: Tensor, known: Tensor, k: int) -> bool:
    T = inputs.shape[1]
    same = targets[:, : T - k] == inputs[:, k:]
    return bool((same | ~known[:, : T - k]).all())


def _cross_entropy(logits: Tensor, targets: Tensor, k: int) -> float:
    """Mean over the labels that are not -100 of the loss of logits t for the label at t + k."""
    T = targets.shape[1]
    return float(
        nn.functional.cross_entropy(logits[:, : T - k].flatten(0, 1).double(), targets[:, k:].flatten(), ignore_index=-100)
    )
