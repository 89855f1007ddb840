"""Sampling text: a model, prompts and settings in; continuations out, whole or streamed.

Shapes: B prompts, T tokens of a prompt, N new tokens, V vocab_size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lmlib.model import LanguageModel


def generate(
    model: LanguageModel,
    tokenizer: Any,
    prompts: list[str] | str | Tensor,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int = 0,
    ignore_eos: bool = False,
) -> list[str] | Tensor:
    """Continue each prompt.

    Args:
        prompts: strings (one, or a list), or token ids (B, T) int64.
        temperature: 0 always takes the likeliest token.
        top_k: choose among so many likeliest tokens; None or 0: all.
        top_p: choose among the fewest likeliest tokens that hold this share of the probability; None or 1: all.
        seed: the same seed gives the same text; a prompt in a list gives what it gives alone.
        ignore_eos: do not end at the end-of-text token.

    Returns:
        The continuations, without their prompts: a list of strings; for ids, ids (B, N), with end-of-text tokens
        after a text has ended. Beyond the model's window each token follows from the last `sequence_length` ones.

    Raises:
        ValueError: a setting is out of range, or a prompt is longer than the model's window.
    """
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    if isinstance(prompts, Tensor):
        eos = None if ignore_eos else tokenizer.eos_token_id
        return torch.stack(list(sample_ids(model, prompts, max_new_tokens, eos, **settings)), dim=1)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list | tuple):
        raise ValueError(f"prompts must be text, a list of texts or a tensor of ids, not {type(prompts).__name__}.")
    return ["".join(stream(model, tokenizer, p, max_new_tokens, ignore_eos=ignore_eos, **settings)) for p in prompts]


def stream(
    model: LanguageModel,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int = 0,
    ignore_eos: bool = False,
) -> Iterator[str]:
    """What `generate` writes for one prompt, piece by piece as it comes; a piece is never half a character.

    An empty prompt begins a new text. Raises as `generate` does, when the first piece is asked for.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"A prompt must be text, not {type(prompt).__name__}.")
    prompt = prompt.encode("utf-8", "replace").decode()  # half a surrogate pair, from a terminal of another encoding
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] or [tokenizer.eos_token_id]
    eos, new, written = tokenizer.eos_token_id, [], ""
    steps = sample_ids(model, torch.tensor([ids]), max_new_tokens, None if ignore_eos else eos, temperature, top_k, top_p, seed)
    for token in steps:
        if token.item() == eos and not ignore_eos:
            break
        new.append(token.item())
        text = tokenizer.decode(new, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else the character's other bytes are still to come
            yield text[len(written) :]
            written = text
    yield tokenizer.decode(new, skip_special_tokens=True)[len(written) :]


def sample_ids(
    model: LanguageModel,
    ids: Tensor,
    max_new_tokens: int,
    eos: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[Tensor]:
    """New tokens for prompts of one length: ids (B, T) -> up to `max_new_tokens` times (B,).

    Once a row has given `eos` it gives nothing else; when every row has, the iteration ends.
    """
    check_settings(model.config.vocab_size, max_new_tokens, temperature, top_k, top_p, seed)
    window, was_training = model.config.sequence_length, model.training
    if ids.dim() != 2 or ids.is_floating_point() or ids.numel() < 1:
        raise ValueError(f"ids must be whole numbers of shape (B, T), both at least 1; these are {ids.dtype} {tuple(ids.shape)}.")
    if ids.shape[1] > window:
        raise ValueError(f"The prompt has {ids.shape[1]} tokens and the model's window is {window}: shorten the prompt.")
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise ValueError(f"ids must lie between 0 and {model.config.vocab_size - 1}, the model's vocabulary.")
    ids = ids.to(next(model.parameters()).device)
    generator = torch.Generator().manual_seed(seed)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    try:
        for _ in range(max_new_tokens):
            with torch.no_grad():
                model.eval()
                logits = model.lm_head(model.model(ids[:, -window:])[:, -1])  # (B, V)
                chance = torch.rand((), generator=generator, dtype=torch.float64).item()
                token = choose(logits, chance, temperature, top_k, top_p)
            if eos is not None:
                token = token.masked_fill(ended, eos)
                ended |= token == eos
            yield token
            if ended.all():
                return
            ids = torch.cat((ids, token[:, None]), dim=1)
    finally:
        model.train(was_training)


def choose(logits: Tensor, chance: float, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """One token a row: logits (B, V) -> (B,). `chance` in [0, 1) picks from the tokens that the settings leave,
    likeliest first, by their cumulative probability; the settings mean what they mean in transformers."""
    if temperature == 0:
        return logits.argmax(-1)
    scores, order = (logits.double() / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k:
        scores = scores.masked_fill(scores < scores[:, top_k - 1 : top_k], -torch.inf)
    probabilities = scores.softmax(-1)
    if top_p is not None and top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # what likelier tokens hold
        keep = before < top_p
        probabilities = probabilities * keep
    cumulative = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulative, cumulative[:, -1:] * chance, right=True)  # (B, 1)
    return order.gather(1, place.clamp(max=logits.shape[-1] - 1))[:, 0]


def check_settings(vocab_size: int, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int):
    """Raise one ValueError that names every setting out of range."""
    wrong = []

    def is_number(value: Any, kind: type = int) -> bool:
        return isinstance(value, (int, kind)) and not isinstance(value, bool)

    if not (is_number(max_new_tokens) and max_new_tokens >= 1):
        wrong.append(f"max_new_tokens is {max_new_tokens!r}; write a whole number of 1 or more")
    if not (is_number(temperature, float) and 0 <= temperature < float("inf")):
        wrong.append(f"temperature is {temperature!r}; write 0 (always the likeliest token) or more")
    if top_k is not None and not (is_number(top_k) and 0 <= top_k <= vocab_size):
        wrong.append(f"top_k is {top_k!r}; write 1 to {vocab_size}, the size of the vocabulary, or 0 for all")
    if top_p is not None and not (is_number(top_p, float) and 0 < top_p <= 1):
        wrong.append(f"top_p is {top_p!r}; write a share above 0 and up to 1")
    if not (is_number(seed) and 0 <= seed < 2**63):
        wrong.append(f"seed is {seed!r}; write a whole number of 0 or more")
    if wrong:
        raise ValueError("; ".join(wrong) + ".")
