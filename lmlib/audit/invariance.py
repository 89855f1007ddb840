"""Batch independence, and decoding with a cache against one pass; arguments as for `Probe`."""

import torch
from torch import Tensor, nn

from lmlib.audit.probe import Arguments, Probe, spread
from lmlib.audit.report import REPEATS, TOLERANCE, Report, leaks_above, one_line
from lmlib.errors import UserError


def check_batch_independence(model: nn.Module, vocab_size: int | None = None,
                             sequence_length: int | None = None,
                             arguments: Arguments | None = None, quick: bool = False) -> Report:
    """Check that no row's logits depend on other rows; `quick` tries the longest window once."""
    probe, suspects = Probe(model, vocab_size, sequence_length, arguments), []
    longest = probe.sequence_length
    lengths = sorted({longest, min(longest, 33), min(longest, 8)}, reverse=True)
    for repeat in range(1 if quick else REPEATS):
        for mode in ("evaluation", "training"):
            tried = [longest] if repeat or quick else [n for n in lengths if not probe.problem(n)]
            for length in tried:
                trial = (length, mode, 300 + repeat, 9 if length <= 33 and not quick else 4)
                if _row_changes(probe, *trial).max() > TOLERANCE:
                    suspects.append(trial)
    leaks = [leak for trial in suspects
             for leak in leaks_above(_row_changes(probe.in_float64, *trial), *trial[:2])]
    if not leaks:
        return Report("batch independence", True,
                      "a row's logits do not depend on the other rows of its batch.")
    modes = " and ".join(sorted({leak.mode for leak in leaks}))
    summary = (f"a row's logits depend on the other rows of its batch, in {modes} mode, by up to "
               f"{max(leak.change for leak in leaks):.2g} standard deviations.")
    return Report("batch independence", False, summary, leaks, "rows mix")


def _row_changes(probe: Probe, length: int, mode: str, seed: int, rows: int) -> Tensor:
    """Return how far a row's logits change as the first or last is replaced: (rows, rows)."""
    ids, training = probe.draw(rows, length, seed), mode == "training"
    others, changes = probe.others(ids, seed + 1), torch.zeros(rows, rows, dtype=torch.float64)
    with torch.no_grad():
        before = probe(ids, training, seed)
        for row in (0, rows - 1):
            replaced = ids.clone()
            replaced[row] = others[row]
            change = (probe(replaced, training, seed) - before).abs().amax((1, 2))
            changes[:, row] = (change / spread(before)).cpu()
    return changes.fill_diagonal_(0)


def check_cache(model: nn.Module, vocab_size: int | None = None,
                sequence_length: int | None = None, arguments: Arguments | None = None) -> Report:
    """Check that decoding with a cache gives the logits of one pass without it."""
    probe = Probe(model, vocab_size, sequence_length, arguments)
    # The caches of transformers are arguments of forward, those of lmlib come from new_cache().
    cache_name = next((name for name in ("past_key_values", "cache_params")
                       if {name, "use_cache"} <= probe.accepts.keys()), "")
    if not cache_name and not hasattr(probe.model, "new_cache"):
        return Report("cache", None, "the model has neither new_cache() nor use_cache.")
    length = min(probe.sequence_length, 40)
    plans = {"token by token": [1] * length,
             "a prompt, then token by token": [length // 2] + [1] * (length - length // 2),
             "in pieces": [length // 3] * 2 + [length - 2 * (length // 3)]}
    failed, wrong = {}, {}
    for name, pieces in plans.items():
        try:
            changes = _cache_changes(probe, length, pieces, cache_name)
        except Exception as error:  # some caches accept one token at a time
            failed[name] = one_line(error)
            continue
        if changes.max() > TOLERANCE:
            changes = _cache_changes(probe.in_float64, length, pieces, cache_name)
        if not changes.max() <= TOLERANCE:  # NaN is wrong too
            wrong[name] = changes
    if list(wrong) == ["in pieces"]:  # generation does not need it, and few models can
        failed["in pieces"], wrong = "its logits differ", {}
    if len(failed) == len(plans):
        return Report("cache", None, f"decoding with the cache fails ({failed['token by token']}).")
    if not wrong:
        unsupported = "".join(f" Decoding {name} fails ({why})." for name, why in failed.items())
        return Report("cache", True, f"decoding gives the logits of one pass.{unsupported}")
    name, changes = next(iter(wrong.items()))
    leaks = leaks_above(changes.diag(), length, "with a cache")
    size = ("and are not all numbers (NaN)" if changes.isnan().any()
            else f"by up to {changes.max():.2g} standard deviations")
    summary = (f"decoding {name}, the logits differ from those of one pass, from position "
               f"{leaks[0].t} on, {size}: positions or the mask are wrong in the cache.")
    return Report("cache", False, summary, leaks, "decode differs from prefill")


def _cache_changes(probe: Probe, length: int, pieces: list[int], cache_name: str) -> Tensor:
    """Return how far logits decoded in pieces are from one pass's: (T,), in standard deviations."""
    ids, logits, cache = probe.draw(2, length, seed=11), [], None
    ours = hasattr(probe.model, "new_cache")
    with torch.no_grad():
        whole = probe(ids)
        if ours:
            cache = probe.model.new_cache(*ids.shape)
        for piece in ids.split([size for size in pieces if size], dim=1):
            if ours:
                output = probe.model(piece, cache)
            else:
                output = probe.forward(piece, use_cache=True, **{cache_name: cache})
                pair = isinstance(output, tuple)
                cache = output[1] if pair else getattr(output, cache_name, None)
                if cache is None:
                    raise UserError(f"the model accepts {cache_name} but returns none")
            logits.append(probe.to_logits(output, piece.shape))
        decoded = torch.cat(logits, dim=1)
        decoded = torch.where(decoded.isinf(), 0.0, decoded)  # as Probe does
        change = (decoded - whole).abs().amax((0, 2))
    return (change / spread(whole)).cpu()
