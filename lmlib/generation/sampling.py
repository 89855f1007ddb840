"""Sample token ids: prefill the prompts, then decode one token at a time from the cache.

Beyond the context window each token is predicted from the last `sequence_length` ones, with a new
prefill. Shapes: B prompts, T tokens of the longest one, V vocab_size.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lmlib.generation.graph import fixed_decode
from lmlib.generation.settings import Settings
from lmlib.model.attention import Cache
from lmlib.model.loss import widest_float
from lmlib.model.transformer import LanguageModel

GRAPH_FROM = 64  # tokens: capturing a CUDA graph takes as long as decoding some dozens


def sample_ids(model: LanguageModel, prompts: list[list[int]],
               settings: Settings) -> Iterator[Tensor]:
    """Yield the next token of each prompt, (B,), without end.

    One random number per step serves all rows, so a row does not depend on the others in its batch.
    """
    window, was_training = model.config.sequence_length, model.training
    generator = torch.Generator().manual_seed(settings.seed)
    rows = [list(ids) for ids in prompts]
    seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool,
                       device=model.lm_head.weight.device)  # (B, V)
    for row, ids in zip(seen, rows, strict=True):
        row[ids] = True
    try:
        model.eval()
        logits, cache = prefill(model, rows)
        decode_next = decoder(model, cache, settings.max_new_tokens)
        while True:
            u = torch.rand((), generator=generator, dtype=torch.float64).item()
            logits = apply_repetition_penalty(logits, seen, settings.repetition_penalty)
            token = sample_token(logits, u, settings.temperature, settings.top_k, settings.top_p,
                                 settings.min_p)
            yield token
            if model.training:  # the caller trained it in between
                model.eval()
            seen.scatter_(1, token[:, None], True)
            for ids, new in zip(rows, token.tolist(), strict=True):
                ids.append(new)
            if max(map(len, rows)) <= window:
                logits = decode_next(token)
            else:
                logits, _ = prefill(model, [ids[-window:] for ids in rows])
    finally:
        model.train(was_training)


@torch.inference_mode()
def prefill(model: LanguageModel, rows: list[list[int]]) -> tuple[Tensor, Cache]:
    """Process prompts of any lengths: the logits (B, V) after each, and a cache for decoding."""
    longest, device = max(map(len, rows)), model.lm_head.weight.device
    padding = [longest - len(ids) for ids in rows]  # on the left, so that all rows end together
    padded = [[0] * gap + ids for gap, ids in zip(padding, rows, strict=True)]
    start = torch.tensor(padding, device=device) if any(padding) else None
    cache = model.new_cache(len(rows), max(longest, model.config.sequence_length), start)
    hidden = model.model(torch.tensor(padded, device=device), cache)[:, -1]  # (B, C)
    return model.lm_head(hidden), cache


@torch.inference_mode()
def decode(model: LanguageModel, token: Tensor, cache: Cache) -> Tensor:
    """Process one more token per row, (B,), with the cache: the logits (B, V) of the next."""
    return model.lm_head(model.model(token[:, None], cache)[:, -1])


def decoder(model: LanguageModel, cache: Cache, tokens: int) -> Callable[[Tensor], Tensor]:
    """Return the function that decodes: on CUDA, for many tokens of a dense model, a graph."""
    on_cuda = cache.memory.is_cuda and model.config.feed_forward == "mlp"
    if not (on_cuda and tokens >= GRAPH_FROM):
        return lambda token: decode(model, token, cache)
    with torch.inference_mode():
        return torch.inference_mode()(fixed_decode(model, cache))


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make `seen` tokens (B, V) less likely, as in CTRL (arXiv:1909.05858): (B, V) -> (B, V)."""
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample_token(logits: Tensor, u: float, temperature: float, top_k: int | None,
                 top_p: float | None, min_p: float | None = None) -> Tensor:
    """Sample a token per row, (B, V) -> (B,): invert the sorted cumulative sum at `u` in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.to(widest_float(logits.device)) / temperature
    kept = top_k or scores.shape[-1]
    if kept < scores.shape[-1]:  # tokens tied with the last one stay, as in transformers
        least = scores.topk(kept).values[:, -1:]
        kept = int((scores >= least).sum(-1).max())
    scores, order = scores.topk(kept)  # (B, kept), most likely first
    if top_k:
        scores = scores.masked_fill(scores < scores[:, top_k - 1 : top_k], -torch.inf)
    probabilities = scores.softmax(-1)
    if top_p is not None and top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # held by more likely tokens
        probabilities = probabilities * (before < top_p)
    if min_p:
        probabilities = probabilities * (probabilities >= min_p * probabilities[:, :1])
    cumulative = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulative, cumulative[:, -1:] * u, right=True)  # (B, 1)
    return order.gather(1, place.clamp(max=order.shape[-1] - 1))[:, 0]
