"""Tokens: prefill, decode, sample."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lmlib.generation.settings import Settings
from lmlib.model.attention import Cache
from lmlib.model.transformer import LanguageModel


def sample_ids(model: LanguageModel, prompts: list[list[int]], settings: Settings) -> Iterator[Tensor]:
    """New tokens for each prompt, (B,) at a time, without end.

    One number from the seed's generator serves all rows of a step, so that a row does not depend on the others.
    """
    window, was_training, device = model.config.sequence_length, model.training, next(model.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)
    rows, longest = [list(ids) for ids in prompts], max(map(len, prompts))
    seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=device)
    for row, ids in zip(seen, rows, strict=True):
        row[ids] = True
    try:
        model.eval()
        logits, cache = prefill(model, rows)
        while True:
            chance = torch.rand((), generator=generator, dtype=torch.float64).item()
            logits = apply_repetition_penalty(logits, seen, settings.repetition_penalty)
            token = sample_token(logits, chance, settings.temperature, settings.top_k, settings.top_p, settings.min_p)
            yield token
            if model.training:  # somebody trained it meanwhile
                model.eval()
            seen.scatter_(1, token[:, None], True)
            for ids, new in zip(rows, token.tolist(), strict=True):
                ids.append(new)
            longest += 1
            if longest <= window:
                logits = decode(model, token, cache)
            else:
                logits, _ = prefill(model, [ids[-window:] for ids in rows])
    finally:
        model.train(was_training)


@torch.inference_mode()
def prefill(model: LanguageModel, rows: list[list[int]]) -> tuple[Tensor, Cache]:
    """Read prompts: the logits (B, V) behind each one's last token, and a cache with room for the model's window."""
    longest, weight = max(map(len, rows)), model.lm_head.weight
    padding = [longest - len(ids) for ids in rows]
    padded = torch.tensor([[0] * gap + ids for gap, ids in zip(padding, rows, strict=True)], device=weight.device)  # (B, T)
    start = torch.tensor(padding, device=weight.device) if any(padding) else None
    cache = model.new_cache(len(rows), max(longest, model.config.sequence_length), start)
    hidden = model.model(padded, cache)[:, -1]  # (B, C)
    return model.lm_head(hidden), cache


@torch.inference_mode()
def decode(model: LanguageModel, token: Tensor, cache: Cache) -> Tensor:
    """One token of each row, (B,), read behind what the cache remembers: the logits (B, V) of the next."""
    return model.lm_head(model.model(token[:, None], cache)[:, -1])


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with those of tokens that were `seen` (B, V) divided by the penalty, or multiplied if negative."""
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample_token(
    logits: Tensor, chance: float, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None = None
) -> Tensor:
    """One token a row: logits (B, V) -> (B,). `chance` in [0, 1) picks from the tokens that the settings leave,
    likeliest first, by their cumulative probability."""
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.double() / temperature
    kept = top_k or scores.shape[-1]
    if kept < scores.shape[-1]:  # what is as likely as the last of them stays too
        least = scores.topk(kept).values[:, -1:]
        kept = int((scores >= least).sum(-1).max())
    scores, order = scores.topk(kept)  # (B, kept), likeliest first
    if top_k:
        scores = scores.masked_fill(scores < scores[:, top_k - 1 : top_k], -torch.inf)
    probabilities = scores.softmax(-1)
    if top_p is not None and top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # what likelier tokens hold
        probabilities = probabilities * (before < top_p)
    if min_p:
        probabilities = probabilities * (probabilities >= min_p * probabilities[:, :1])
    cumulative = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulative, cumulative[:, -1:] * chance, right=True)  # (B, 1)
    return order.gather(1, place.clamp(max=order.shape[-1] - 1))[:, 0]
