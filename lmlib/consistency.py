"""Whether a model does the same thing however it is called: beside other rows, through its cache, and in its loss.

Shapes: B batch, T positions, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmlib.causality import REPEATS, TOLERANCE, Leak, Report
from lmlib.probe import Probe, same_chance, spread


def check_batch_independence(
    model: nn.Module,
    vocab_size: int | None = None,
    sequence_length: int | None = None,
    arguments: Callable[[Tensor], dict[str, Any]] | None = None,
    quick: bool = False,
) -> Report:
    """Whether the logits of a row do not depend on the other rows of its batch, in evaluation and in training mode.

    Takes and raises what `check_causality` does.
    """
    probe = Probe(model, vocab_size, sequence_length, arguments)
    lengths = sorted({probe.sequence_length, min(probe.sequence_length, 33), min(probe.sequence_length, 8)}, reverse=True)
    doubts = {}
    for repeat in range(1 if quick else REPEATS):
        for mode in ("evaluation", "training"):
            for length in lengths[:1] if repeat or quick else [n for n in lengths if not probe.runs(n)]:
                trial = (length, mode, 300 + repeat, 9 if length <= 33 and not quick else 4)
                if float(_rows_moved(probe, *trial).max()) > TOLERANCE:
                    doubts[trial] = None
    double = probe.in_double() if doubts else None
    leaks = []
    for length, mode, seed, count in doubts:
        moved = _rows_moved(double or probe, length, mode, seed, count)
        rows = zip(*(moved > TOLERANCE).nonzero(as_tuple=True), strict=True)
        leaks += [Leak(int(a), int(b), float(moved[a, b]), length, mode) for a, b in rows]
    if not leaks:
        return Report("batch independence", True, "a row's logits do not depend on the other rows of its batch.")
    modes = sorted({leak.mode for leak in leaks})
    words = f"a row's logits depend on the other rows, by up to {max(leak.change for leak in leaks):.2g} of their spread, in "
    words += f"{' and '.join(modes)} mode: a score depends on what stands beside a text."
    return Report("batch independence", False, words, leaks, "rows mix")


def _rows_moved(probe: Probe, length: int, mode: str, seed: int, rows: int) -> Tensor:
    """How far each row's logits move when another row's tokens are replaced: (rows, rows), in their standard deviations."""
    ids = probe.draw(rows, length, seed)
    others, moved = probe.others(ids, seed + 1), torch.zeros(rows, rows, dtype=torch.float64)
    with torch.no_grad():
        base = probe(ids, mode == "training", seed)
        for row in (0, rows - 1):
            changed = ids.clone()
            changed[row] = others[row]
            moved[:, row] = ((probe(changed, mode == "training", seed) - base).abs().amax((1, 2)) / spread(base)).cpu()
    return moved.fill_diagonal_(0)


def check_cache(
    model: nn.Module,
    vocab_size: int | None = None,
    sequence_length: int | None = None,
    arguments: Callable[[Tensor], dict[str, Any]] | None = None,
) -> Report:
    """Whether a text read through the cache, token by token or in pieces, has the logits of one pass over the whole.

    Takes and raises what `check_causality` does. Knows lmlib's cache and that of transformers (`use_cache`).
    """
    probe = Probe(model, vocab_size, sequence_length, arguments)
    if not probe.has_cache:
        return Report("cache", None, "the model has no cache that lmlib knows (past_key_values with use_cache).")
    length = min(probe.sequence_length, 40)
    plans = {"token by token": [1] * length, "a prompt, then token by token": [length // 2] + [1] * (length - length // 2)}
    plans["in pieces"] = [length // 3, length // 3, length - 2 * (length // 3)]
    failed, wrong, double = {}, {}, None
    for name, pieces in plans.items():
        try:
            moved = _decoded(probe, length, pieces)
        except Exception as error:  # a cache that does not take pieces, say
            failed[name] = " ".join(str(error).split())[:100]
            continue
        if float(moved.max()) > TOLERANCE:
            double = double or probe.in_double()
            moved = _decoded(double, length, pieces) if double else moved
            if float(moved.max()) > TOLERANCE and name == "in pieces" and not wrong:  # few know it, and no text is written so
                failed[name] = "its logits differ"
            elif float(moved.max()) > TOLERANCE:
                wrong[name] = moved
    if len(failed) == len(plans):
        return Report("cache", None, f"reading through the cache fails ({next(iter(failed.values()))}).")
    if not wrong:
        unread = "".join(f" Not {name}, though ({why})." for name, why in failed.items())
        return Report("cache", True, "a text read through the cache has the logits of one whole pass." + unread)
    name, moved = next(iter(wrong.items()))
    first = int((moved > TOLERANCE).nonzero()[0])
    leaks = [Leak(t, t, change, length, "with a cache") for t, change in enumerate(moved.tolist()) if change > TOLERANCE]
    words = f"read {name}, the logits differ from those of one whole pass from position {first} on, by up to {moved.max():.2g} of"
    words += " their spread: what is generated is not what was evaluated (wrong positions or a wrong mask in the cache)."
    return Report("cache", False, words, leaks, "decode differs from prefill")


def _decoded(probe: Probe, length: int, pieces: list[int]) -> Tensor:
    ids = probe.draw(2, length, seed=11)
    with torch.no_grad():
        whole = probe(ids)
        return ((probe.decode(ids, [n for n in pieces if n]) - whole).abs().amax((0, 2)) / spread(whole)).cpu()


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
        with same_chance(probe.device, 0):
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
