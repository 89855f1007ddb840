"""Causality: what a model's logits may depend on.

No logit at position t may depend on a token after t. Two tests say so: tokens from a cut on are replaced by others
(for any model), and the logits at t are differentiated by the embeddings of the tokens after t (exact where a model is
smooth). A leak is a change of more than TOLERANCE of the logits' spread that remains when computed in float64.

Shapes: B batch, T positions, V vocabulary; t a position whose logits are looked at, s that of a token.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lmlib.audit.probe import Probe, spread
from lmlib.audit.report import REPEATS, TOLERANCE, Leak, Report

LOGITS = 2**25  # numbers held at a time


WORK = 1e12  # floating-point operations that a check of causality may take, roughly


def check_causality(
    model: nn.Module,
    vocab_size: int | None = None,
    sequence_length: int | None = None,
    arguments: Callable[[Tensor], dict[str, Any]] | None = None,
    quick: bool = False,
) -> Report:
    """Whether no logit at t depends on a token after t, in windows of every length up to `sequence_length`.

    In evaluation mode, in training mode and while a cache is filled; what shows only at random is found by repeating. See
    `Probe` for the arguments and what they may be. `quick` takes a tenth of the time: fewer lengths, and no gradients.

    Raises:
        ValueError: the model cannot be called; the sentence says what is needed.
    """
    probe = Probe(model, vocab_size, sequence_length, arguments)
    suspects, tried, refused = [], set(), {}
    for trial in _trials(probe, 0.0 if quick else WORK):
        if trial.length in refused:
            continue
        try:
            seen = trial.run(probe)
        except Exception as error:  # a length that the model does not take
            if trial.length == probe.sequence_length:
                raise
            refused[trial.length] = " ".join(str(error).split())[:100]
            continue
        tried.add(trial.length)
        if seen > TOLERANCE:
            suspects.append(trial)
    proven = confirm_in_float64(suspects, probe)
    smooth = None if quick else _gradients(probe, min(probe.sequence_length, 48))
    known = {"lengths": sorted(tried), "longest": probe.sequence_length, "refused": refused, "gradients": smooth is not None}
    if not proven and not (smooth is not None and bool((smooth > TOLERANCE).triu(1).any())):
        words = f"no logit depends on a later token, in windows of {_ranges(sorted(tried))} tokens, in evaluation and in training"
        words += " mode, by other tokens" + (" and by gradients." if smooth is not None else ".")
        words += f" It does not run on windows of {_ranges(sorted(refused))}." if refused else ""
        return Report("causality", True, words, numbers=known)
    return _describe(probe, proven, smooth, known)


@dataclass(frozen=True)
class _Trial:
    """One comparison: a window whose tokens are replaced from each cut on."""

    length: int
    cuts: tuple[int, ...]
    mode: str = "evaluation"
    rows: int = 1
    seed: int = 0
    together: bool = True  # all cuts as rows of one batch; else each in a pass of its own, for models that mix their rows

    def logits(self, probe: Probe, ids: Tensor) -> Tensor:
        return probe(ids, self.mode == "training", self.seed, cached=self.mode == "with a cache")

    def run(self, probe: Probe) -> float:
        return float(self.changes(probe).max())

    def changes(self, probe: Probe, suffix: bool = True) -> Tensor:
        """How far the logits before each cut move, in their standard deviations: (cuts, T), zero from the cut on.

        Args:
            suffix: replace all tokens from the cut on; else the one at the cut.
        """
        ids = probe.draw(self.rows, self.length, self.seed)
        others, moved, V = probe.others(ids, self.seed + 1), [], probe.vocab_size
        at_once = max(1, LOGITS // (self.rows * self.length * V) - 1) if self.together else 1
        with torch.set_grad_enabled(self.mode == "training"):  # some paths of training ask for it; no weight needs one
            before = None if self.together else self.logits(probe, ids)
            for start in range(0, len(self.cuts), at_once):
                batch = []
                for cut in self.cuts[start : start + at_once]:
                    changed = ids.clone()
                    end = self.length if suffix else cut + 1
                    changed[:, cut:end] = others[:, cut:end]
                    batch.append(changed)
                if self.together:
                    logits = self.logits(probe, torch.cat([ids, *batch])).unflatten(0, (-1, self.rows))
                    base, after = logits[:1], logits[1:]
                else:
                    base, after = before[None], self.logits(probe, batch[0])[None]
                moved.append((after - base).abs().amax((1, 3)).detach() / spread(base))  # (cuts, T)
        positions, cuts = torch.arange(self.length), torch.tensor(self.cuts)
        return torch.cat(moved).cpu().double() * (positions < cuts[:, None])


def _trials(probe: Probe, work: float) -> Iterator[_Trial]:
    """What is compared, the most telling first, until `work` floating-point operations are spent."""
    T, chance = probe.sequence_length, random.Random(0)
    left = work / (2 * max(1, sum(tensor.numel() for tensor in probe.model.parameters())))  # tokens
    left = min(max(left, 40 * T), max(200_000, 2 * T * T))

    def cuts(length: int, count: int) -> tuple[int, ...]:
        if count >= length - 1:
            return tuple(range(1, length))
        ends = {1, length - 1} if count > 2 else set()
        return tuple(sorted({*ends, *chance.sample(range(1, length), count - len(ends))}))

    def planned() -> Iterator[_Trial]:
        modes = ["evaluation", "training"] + (["with a cache"] if "use_cache" in probe.accepts else [])
        for mode in modes:
            yield _Trial(T, cuts(T, 3), mode, rows=2, together=False)
        around = sorted({n + d for n in (4, 8, 16, 32, 64, 128, 256, 512, 1024) for d in (-1, 0, 1)} & set(range(2, T)))
        for length in around:
            yield _Trial(length, cuts(length, 4), seed=length)
        yield _Trial(T, cuts(T, 16))
        for repeat in range(REPEATS):
            for mode in modes[:2]:
                yield _Trial(T, cuts(T, 1), mode, rows=2, seed=100 + repeat, together=False)
        for length in reversed(around):
            yield _Trial(length, cuts(length, 1), "training", rows=2, seed=length, together=False)
        yield _Trial(T, cuts(T, T), seed=2)
        for length in chance.sample(range(2, T), T - 2):
            yield _Trial(length, cuts(length, 2), seed=length + 1)
        for length in around:
            yield _Trial(length, cuts(length, length), seed=length + 2)

    for trial in planned():
        tokens = trial.rows * trial.length * (len(trial.cuts) + 1)
        if tokens <= left:
            left -= tokens
            yield trial


def confirm_in_float64(suspects: list[_Trial], probe: Probe) -> list[_Trial]:
    """The trials whose leak remains in float64: tried one by one, or, where many leak and a few of them prove true, all."""
    if not suspects:
        return []
    double = probe.in_float64()

    def remains(trial: _Trial) -> bool:
        """Whether it shows at one cut in a pass of its own too: the rows of one batch may differ by chance alone."""
        try:
            moved = trial.changes(double or probe).amax(1)
            alone = replace(trial, cuts=(trial.cuts[int(moved.argmax())],), together=False)
            return float(moved.max()) > TOLERANCE and alone.run(double or probe) > TOLERANCE
        except Exception:  # in float64 it does not run so
            return True

    few = suspects[:: -(-len(suspects) // 8)]
    if all(remains(trial) for trial in few):
        return suspects
    return [trial for trial in suspects if remains(trial)]


def _gradients(probe: Probe, length: int) -> Tensor | None:
    """How much the logits at t move with the embedding at s, over the most that they move with any: (T, T); None where the
    tokens' embedding cannot be seen, or gradients do not flow."""
    ids, leaves = probe.draw(1, length, seed=7), []

    def leaf(module: nn.Module, given: tuple, output: Tensor) -> Tensor | None:
        if not (given and isinstance(given[0], Tensor) and torch.equal(given[0].flatten(), ids.flatten())):
            return None
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    hooks = [module.register_forward_hook(leaf) for module in probe.model.modules() if isinstance(module, nn.Embedding)]
    try:
        with torch.enable_grad():
            logits = probe(ids)[0]  # (T, V)
            mixed = logits @ torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(1)).to(logits)
            sums = [torch.autograd.grad(one, leaves, retain_graph=True, allow_unused=True) for one in mixed]
    except (RuntimeError, ValueError):
        return None
    finally:
        for hook in hooks:
            hook.remove()
    if not leaves:
        return None
    rows = [sum(part[0].norm(dim=-1) for part in parts if part is not None) for parts in sums]
    if any(not isinstance(row, Tensor) for row in rows):
        return None
    matrix = torch.stack(rows).cpu().double()
    return matrix / matrix.amax(1, keepdim=True).clamp(min=1e-30)


def _describe(probe: Probe, proven: list[_Trial], smooth: Tensor | None, known: dict[str, Any]) -> Report:
    """The report of a model that leaks: which pairs, how much, in what pattern, and in which part of the model first."""
    if not proven:
        pairs, L = smooth.triu(1), len(smooth)
        shape, leaks = pattern(pairs > TOLERANCE), _leaks(pairs, L, "evaluation")
        words = f"{shape}: seen by gradients alone, at most {pairs.max():.2g}."
        return Report("causality", False, words, leaks, shape, {**known, "pairs": pairs})
    worst = max(proven, key=lambda trial: (trial.mode == "evaluation", -abs(trial.length - 256), trial.together))
    L, mode = worst.length, worst.mode
    everywhere = _Trial(L, tuple(range(1, L)), mode, worst.rows, worst.seed, worst.together)
    together = everywhere.changes(probe)  # (cuts, T)
    pairs = torch.zeros(L, L, dtype=torch.float64)
    pairs[:, 1:] = everywhere.changes(probe, suffix=False).T
    if not (pairs > TOLERANCE).any():  # only several tokens together move it
        pairs[:, 1:] = together.T
    shape = pattern(pairs > TOLERANCE)
    again = [_Trial(L, worst.cuts, mode, worst.rows, 1000 + n, worst.together).run(probe) > TOLERANCE for n in range(REPEATS)]
    lengths = sorted({trial.length for trial in proven})
    leaks = _leaks(pairs, L, mode)
    words = f"the logits depend on later tokens ({shape}): in a window of {L}, {len(leaks):,} of {L * (L - 1) // 2:,} pairs "
    words += f"(t, s) leak, the most at {max(leaks, key=lambda leak: leak.change)[:2]} by {pairs.max():.2g} of the logits' spread"
    if not all(again):
        shape += ", at random"
        words += f"; at random, in {sum(again)} of {REPEATS} repetitions"
    if mode != "evaluation" and not any(trial.mode == "evaluation" for trial in proven):
        words += f"; only {'in training mode' if mode == 'training' else mode}"
    missed = sorted(set(known["lengths"]) - set(lengths))
    if len(missed) > len(lengths) and len(known["lengths"]) > 4:
        words += f"; seen in windows of {_ranges(lengths)}"
    place = _place(probe, worst, cut=1 + int(together.amax(1).argmax()))
    words += f". It is first seen in {place}." if place else "."
    return Report("causality", False, words, leaks, shape, {**known, "pairs": pairs, "first_seen_in": place})


def _leaks(pairs: Tensor, length: int, mode: str) -> list[Leak]:
    """Those of pairs (t, s) that moved by more than TOLERANCE."""
    places = (pairs > TOLERANCE).nonzero().tolist()
    return [Leak(t, s, float(pairs[t, s]), length, mode) for t, s in places]


def pattern(leaking: Tensor) -> str:
    """What pairs (t, s) have in common, in a few words; leaking (T, T) is True where the logits at t depend on a later s."""
    T = len(leaking)
    t, s = leaking.triu(1).nonzero(as_tuple=True)
    if not len(t):
        return ""
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    places = torch.arange(T)
    if len(t) >= 0.9 * future.sum():
        return "whole window"
    for n in range(2, T):
        if bool((t // n == s // n).all()):
            inside = future & (places[:, None] // n == places // n) & (places // n < max(1, T // n))
            if len(t) >= 0.8 * inside.sum():
                return f"blocks of {n}"
    ahead, tail = int((s - t).max()), T - int(s.min())
    if bool(leaking[0, T - 1]) and (tail <= T // 4 or int(t.max()) < T // 4 or int((s - t).min()) > T // 2):
        return "wraps around: the beginning sees the end"
    if ahead <= T // 2 and len(t) >= 0.8 * (future & (places - places[:, None] <= ahead)).sum():
        return "the next token (a mask off by one, a centred convolution)" if ahead == 1 else f"the next {ahead} tokens"
    return f"positions {int(t.min())} to {int(t.max())} see tokens {int(s.min())} to {int(s.max())}"


def _place(probe: Probe, trial: _Trial, cut: int) -> str:
    """The name of the first part of the model, innermost first, whose output at t already depends on a later token."""
    ids = probe.draw(trial.rows, trial.length, trial.seed)
    changed = ids.clone()
    changed[:, cut:] = probe.others(ids, trial.seed + 1)[:, cut:]
    names, outputs = {module: name for name, module in probe.model.named_modules()}, []

    def look(module: nn.Module, given: tuple, output: Any):
        output = next((part for part in output if isinstance(part, Tensor)), None) if isinstance(output, tuple) else output
        if isinstance(output, Tensor) and output.dim() == 3 and output.shape[:2] == ids.shape and output.is_floating_point():
            outputs.append((names[module], output[:, :cut].detach().clone()))

    hooks = [module.register_forward_hook(look) for module in probe.model.modules()]
    with torch.no_grad():
        trial.logits(probe, ids)
        calls = len(outputs)
        trial.logits(probe, changed)
    for hook in hooks:
        hook.remove()
    for (name, before), (_, after) in zip(outputs[:calls], outputs[calls:], strict=False):
        if float((after - before).abs().max()) > TOLERANCE * float(spread(before)):
            return name
    return ""


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as "1 to 3, 7"; long lists are cut."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    words = [str(a) if a == b else f"{a} to {b}" for a, b in spans]
    return ", ".join(words if len(words) <= 6 else [*words[:3], "...", *words[-2:]])
