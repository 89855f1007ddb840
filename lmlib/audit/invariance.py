"""Batch independence and cache."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmlib.audit.probe import Probe, spread
from lmlib.audit.report import REPEATS, TOLERANCE, Leak, Report


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
    suspects = {}
    for repeat in range(1 if quick else REPEATS):
        for mode in ("evaluation", "training"):
            for length in lengths[:1] if repeat or quick else [n for n in lengths if not probe.runs(n)]:
                trial = (length, mode, 300 + repeat, 9 if length <= 33 and not quick else 4)
                if float(_rows_moved(probe, *trial).max()) > TOLERANCE:
                    suspects[trial] = None
    double = probe.in_float64() if suspects else None
    leaks = []
    for length, mode, seed, count in suspects:
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
            double = double or probe.in_float64()
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
