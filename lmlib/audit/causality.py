"""Causality: no logit at position t may depend on the token at s > t.

The tokens from a cut on are replaced; the logits before it must not change by more than TOLERANCE,
in float64 too. Of a smooth model, the gradients of logits by embeddings of later tokens must be 0.
Shapes: B batch, T positions, V vocabulary.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lmlib.audit.probe import Arguments, Probe, embeds, forward_hooks, spread
from lmlib.audit.report import REPEATS, TOLERANCE, Report, leaks_above, one_line

MAX_LOGITS = 2**25  # of one call, 128 MiB in float32
MAX_WORK = 1e12  # floating-point operations of one check, some seconds on a CPU


def check_causality(model: nn.Module, vocab_size: int | None = None,
                    sequence_length: int | None = None, arguments: Arguments | None = None,
                    quick: bool = False) -> Report:
    """Check that no logit depends on a later token: in evaluation, in training, filling a cache.

    `quick` takes a tenth of the time: fewer lengths, no gradients. See `Probe` for the rest.
    """
    probe = Probe(model, vocab_size, sequence_length, arguments)
    suspects, tested, refused = [], set(), {}
    for trial in _trials(probe, 0.0 if quick else MAX_WORK):
        if trial.length in refused:
            continue
        try:
            if trial.max_change(probe) > TOLERANCE:
                suspects.append(trial)
            tested.add(trial.length)
        except Exception as error:  # some models accept only some lengths
            if trial.length == probe.sequence_length:
                raise
            refused[trial.length] = one_line(error)
    confirmed = confirm_in_float64(suspects, probe)
    gradients = None if quick else _gradients(probe, min(probe.sequence_length, 48))
    numbers = {"lengths": sorted(tested), "longest": probe.sequence_length, "refused": refused,
               "gradients": gradients is not None}
    if confirmed:
        return _report_leak(probe, confirmed, numbers)
    if gradients is not None and (gradients > TOLERANCE).any():
        leaks = leaks_above(gradients, len(gradients), "evaluation")
        shape = pattern(gradients > TOLERANCE)
        summary = (f"the logits depend on later tokens ({shape}); only gradients show it, at most "
                   f"{gradients.max():.2g} of a position's largest.")
        return Report("causality", False, summary, leaks, shape, {**numbers, "pairs": gradients})
    also = "" if gradients is None else " and by gradients"
    limit = f" The model does not run on windows of {_ranges(refused)}." if refused else ""
    summary = (f"no logit depends on a later token, in windows of {_ranges(tested)} tokens, in "
               f"evaluation and in training mode, by replacing tokens{also}.{limit}")
    return Report("causality", True, summary, numbers=numbers)


@dataclass(frozen=True)
class _Trial:
    """A window whose tokens are replaced from each of several cuts on."""
    length: int
    cuts: tuple[int, ...]
    mode: str = "evaluation"
    rows: int = 1
    seed: int = 0
    together: bool = True  # one batch holds all cuts; False: a call each, as rows may interact

    def logits(self, probe: Probe, ids: Tensor) -> Tensor:
        return probe(ids, self.mode == "training", self.seed, cached=self.mode == "with a cache")

    def max_change(self, probe: Probe) -> float:
        return float(self.changes(probe).max())

    def changes(self, probe: Probe, suffix: bool = True) -> Tensor:
        """Return how far the logits before each cut change, in standard deviations: (cuts, T)."""
        # `suffix` replaces all tokens from the cut on; without it, only the token at the cut.
        ids, changes = probe.draw(self.rows, self.length, self.seed), []
        others, positions = probe.others(ids, self.seed + 1), torch.arange(self.length)
        most = max(1, MAX_LOGITS // (self.rows * self.length * probe.vocab_size) - 1)
        # A training path may depend on gradients being enabled, though no weight requires one.
        with torch.set_grad_enabled(self.mode == "training"):
            before = None if self.together else self.logits(probe, ids)[None]
            for cut in torch.tensor(self.cuts)[:, None].split(most if self.together else 1):
                replaced = positions >= cut if suffix else positions == cut  # (cuts, T)
                batch = torch.where(replaced[:, None].to(ids.device), others, ids)  # (cuts, B, T)
                batch = torch.cat([ids[None], batch]) if self.together else batch
                after = self.logits(probe, batch.flatten(0, 1)).unflatten(0, (-1, self.rows))
                if self.together:
                    before, after = after[:1], after[1:]  # (cuts, B, T, V)
                change = (after - before).abs().amax((1, 3)).detach() / spread(before)  # (cuts, T)
                changes.append(change.cpu().double() * (positions < cut))
        return torch.cat(changes)


def _trials(probe: Probe, work: float) -> Iterator[_Trial]:
    """Yield trials, the most revealing first, within a budget of `work` operations."""
    T = probe.sequence_length
    parameters = sum(tensor.numel() for tensor in probe.model.parameters())
    budget = work / (2 * max(1, parameters))  # in tokens, of 2 operations for each parameter
    budget = min(max(budget, 40 * T), max(200_000, 2 * T * T))
    for trial in _plan(T, "use_cache" in probe.accepts):
        tokens = trial.rows * trial.length * (len(trial.cuts) + 1)
        if tokens <= budget:
            budget -= tokens
            yield trial


def _plan(T: int, use_cache: bool) -> Iterator[_Trial]:
    """Yield all trials in windows of up to T tokens."""
    rng, modes = random.Random(0), ["evaluation", "training"]
    # Kernels, blocks and masks fail at their sizes, which are powers of two.
    sizes = sorted({2**n + d for n in range(2, 11) for d in (-1, 0, 1)} & set(range(2, T)))
    for mode in [*modes, "with a cache"] if use_cache else modes:
        yield _Trial(T, _cuts(rng, T, 3), mode, rows=2, together=False)
    yield from (_Trial(length, _cuts(rng, length, 4), seed=length) for length in sizes)
    yield _Trial(T, _cuts(rng, T, 16))
    for repeat in range(REPEATS):
        for mode in modes:
            yield _Trial(T, _cuts(rng, T, 1), mode, rows=2, seed=100 + repeat, together=False)
    for length in reversed(sizes):
        yield _Trial(length, _cuts(rng, length, 1), "training", 2, seed=length, together=False)
    yield _Trial(T, _cuts(rng, T, T), seed=2)
    yield from (_Trial(n, _cuts(rng, n, 2), seed=n + 1) for n in rng.sample(range(2, T), T - 2))
    yield from (_Trial(length, _cuts(rng, length, length), seed=length + 2) for length in sizes)


def _cuts(rng: random.Random, length: int, count: int) -> tuple[int, ...]:
    """Return `count` random cuts, both ends included if there are three or more."""
    if count >= length - 1:
        return tuple(range(1, length))
    ends = {1, length - 1} if count > 2 else set()
    return tuple(sorted({*ends, *rng.sample(range(1, length), count - len(ends))}))


def confirm_in_float64(suspects: list[_Trial], probe: Probe) -> list[_Trial]:
    """Return the trials that leak in float64 too; if 8 spread over them do, all are taken to."""
    def remains(trial: _Trial) -> bool:
        """Check the worst cut alone too: random layers may differ between rows."""
        try:
            change, worst = trial.changes(probe.in_float64).amax(1).max(0)
            alone = replace(trial, cuts=(trial.cuts[worst],), together=False)
            return bool(change > TOLERANCE) and alone.max_change(probe.in_float64) > TOLERANCE
        except Exception:  # the model does not run like this in float64
            return True

    few = suspects[:: max(1, -(-len(suspects) // 8))]
    return suspects if all(map(remains, few)) else list(filter(remains, suspects))


def _gradients(probe: Probe, length: int) -> Tensor | None:
    """Return gradients of logits at t by embeddings at s > t over the largest: (T, T); or None."""
    ids, leaves = probe.draw(1, length, seed=7), []
    def leaf(module: nn.Module, inputs: tuple, output: Any) -> Tensor | None:
        if not embeds(module, inputs, ids):
            return None
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    try:
        with torch.enable_grad(), forward_hooks(probe.model, leaf):
            logits = probe(ids)[0]  # (T, V)
            # A random combination of the logits: in their sum, dependences may cancel.
            weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(1))
            gradients = [torch.autograd.grad(one, leaves, retain_graph=True, allow_unused=True)
                         for one in logits @ weights.to(logits)]
    except (RuntimeError, ValueError):  # no token embedding, or one without gradients
        return None
    rows = [[part[0].norm(dim=-1) for part in parts if part is not None] for parts in gradients]
    if not all(rows):
        return None
    matrix = torch.stack([sum(row) for row in rows]).cpu().double()
    return (matrix / matrix.amax(1, keepdim=True).clamp(min=1e-30)).triu(1)


def _report_leak(probe: Probe, trials: list[_Trial], numbers: dict[str, Any]) -> Report:
    """Report which pairs (t, s) leak, how much, in what pattern, and in which module first."""
    # The clearest example: evaluation mode, a length that fits a figure.
    worst = max(trials, key=lambda x: (x.mode == "evaluation", -abs(x.length - 256), x.together))
    T, mode, every = worst.length, worst.mode, replace(worst, cuts=tuple(range(1, worst.length)))
    by_cut, by_token = every.changes(probe), every.changes(probe, suffix=False)  # (T - 1, T)
    # Where no token leaks alone, those from s on may together.
    pairs = nn.functional.pad((by_token if (by_token > TOLERANCE).any() else by_cut).T, (1, 0))
    leaks, shape = leaks_above(pairs, T, mode), pattern(pairs > TOLERANCE)  # of (t, s)
    if not leaks:  # `confirm_in_float64` saw it, but it does not come again
        summary = (f"in a window of {T}, in {mode} mode, logits changed as later tokens were "
                   "replaced, but not when that was tried again: they also depend on something "
                   "besides the ids and the seed (a counter, a state kept between calls).")
        return Report("causality", False, summary, [], "not repeatable", numbers)
    repeats = [replace(worst, seed=1000 + n).max_change(probe) > TOLERANCE for n in range(REPEATS)]
    module = _first_module(probe, worst, cut=1 + int(by_cut.amax(1).argmax()))
    t, s = max(leaks, key=lambda leak: leak.change)[:2]
    parts = [f"the logits depend on later tokens ({shape}): in a window of {T}, {len(leaks):,} of "
             f"{T * (T - 1) // 2:,} pairs (t, s) leak, the most at ({t}, {s}), by "
             f"{pairs.max():.2g} standard deviations of the logits"]
    if not all(repeats):
        shape += ", at random"
        parts.append(f"at random, in {sum(repeats)} of {REPEATS} repetitions")
    if mode != "evaluation":
        parts.append("only in training mode" if mode == "training" else f"only {mode}")
    lengths = {trial.length for trial in trials}
    if len(numbers["lengths"]) > max(4, 2 * len(lengths)):
        parts.append(f"seen in windows of {_ranges(lengths)}")
    place = f" The first module that shows it: {module}." if module else ""
    return Report("causality", False, f"{'; '.join(parts)}.{place}", leaks, shape,
                  {**numbers, "pairs": pairs, "first_seen_in": module})


def pattern(leaking: Tensor) -> str:
    """Describe which pairs leak; leaking (T, T) is True where t depends on a later s."""
    T = len(leaking)
    t, s = leaking.triu(1).nonzero(as_tuple=True)
    if not len(t):
        return ""
    future, places = torch.ones(T, T, dtype=torch.bool).triu(1), torch.arange(T)
    if len(t) >= 0.9 * future.sum():
        return "whole window"
    for n in range(2, T):
        if (t // n == s // n).all():
            block = places // n
            inside = future & (block[:, None] == block) & (block < max(1, T // n))
            if len(t) >= 0.8 * inside.sum():
                return f"blocks of {n}"
    ahead, wraps = int((s - t).max()), T - s.min() <= T // 4 or t.max() < T // 4
    if leaking[0, T - 1] and (wraps or (s - t).min() > T // 2):
        return "wraps around: the beginning sees the end"
    if ahead <= T // 2 and len(t) >= 0.8 * future.tril(ahead).sum():
        return ("the next token (a mask off by one, a centered convolution)" if ahead == 1
                else f"the next {ahead} tokens")
    return f"positions {t.min()} to {t.max()} see tokens {s.min()} to {s.max()}"


def _first_module(probe: Probe, trial: _Trial, cut: int) -> str:
    """Return the first module whose output before the cut depends on later tokens."""
    ids = probe.draw(trial.rows, trial.length, trial.seed)
    changed = torch.cat([ids[:, :cut], probe.others(ids, trial.seed + 1)[:, cut:]], dim=1)
    names, outputs = {module: name for name, module in probe.model.named_modules()}, []
    def record(module: nn.Module, inputs: tuple, output: Any):
        parts = output if isinstance(output, tuple) else (output,)
        x = next((part for part in parts if isinstance(part, Tensor)), ids)
        if x.is_floating_point() and x.dim() == 3 and x.shape[:2] == ids.shape:
            outputs.append((names[module], x[:, :cut].detach().clone()))

    with torch.no_grad(), forward_hooks(probe.model, record):
        trial.logits(probe, ids)
        calls = len(outputs)
        trial.logits(probe, changed)
    for (name, before), (_, after) in zip(outputs[:calls], outputs[calls:], strict=False):
        if (after - before).abs().max() > TOLERANCE * spread(before):
            return name
    return ""


def _ranges(numbers: Iterable[int]) -> str:
    """Return 1, 2, 3, 7 as "1 to 3, 7"; long lists are shortened."""
    # Number minus rank is the same throughout a run of consecutive numbers.
    runs = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    words = [f"{span[0]} to {span[-1]}" if span[1:] else str(span[0]) for span in spans]
    return ", ".join(words if len(words) <= 6 else [*words[:3], "...", *words[-2:]])
