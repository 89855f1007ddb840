"""Generate text: prompts and settings in, continuations out, whole or as they grow.

Shapes: B prompts, T tokens, N generated tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lmlib.errors import UserError
from lmlib.generation.sampling import sample_ids
from lmlib.generation.settings import Settings
from lmlib.model.transformer import LanguageModel

ROWS = 16  # prompts per batch
HALF = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to while a character is incomplete


@dataclass
class Continuation:
    """What has been generated after one prompt."""
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    text: str = ""  # complete characters only
    piece: str = ""  # what the last token added to the text; may be empty
    ended_by: str | None = None  # "length", "end of text", "stop string" or "window"


def generate(model: LanguageModel, tokenizer: Any, prompts: list[str] | str | Tensor,
             *values: Any, **settings: Any) -> list[str] | Tensor:
    """Return the continuation of each prompt, the same alone and in a list, without the prompt.

    Args:
        prompts: a string or a list of them ("" starts a new text), which gives a list of strings;
            or ids (B, T) int64, which gives ids (B, N), padded with the end-of-text token.
        values, settings: the fields of `Settings`, in their order or by name: max_new_tokens,
            temperature, top_k, top_p, seed, ...

    Raises a ValueError if a setting is invalid or a prompt is longer than the context window.
    """
    chosen = Settings.of(*values, **settings)
    if isinstance(prompts, Tensor):
        return _generate_tensor(model, tokenizer, prompts, chosen)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list | tuple):
        raise UserError("prompts must be a string, a list of strings or a tensor, not "
                        f"{type(prompts).__name__}.")
    ids = [encode(model, tokenizer, prompt) for prompt in prompts]
    batches = [ids[start : start + ROWS] for start in range(0, len(ids), ROWS)]
    return [text.text for batch in batches
            for text in complete(generate_ids(model, tokenizer, batch, chosen))]


def _generate_tensor(model: LanguageModel, tokenizer: Any, ids: Tensor,
                     settings: Settings) -> Tensor:
    if ids.dim() != 2 or ids.is_floating_point() or ids.numel() < 1:
        raise UserError("ids must be integers of shape (B, T), both at least 1; "
                        f"these are {ids.dtype} {tuple(ids.shape)}.")
    steps = generate_ids(model, tokenizer, ids.tolist(), settings, bool(settings.stop_strings))
    rows = [torch.tensor(text.ids, dtype=torch.int64, device=ids.device)
            for text in complete(steps)]
    if len({len(row) for row in rows}) == 1:  # which needs no end-of-text token
        return torch.stack(rows)
    return torch.nn.utils.rnn.pad_sequence(rows, True, tokenizer.eos_token_id)


def stream(model: LanguageModel, tokenizer: Any, prompt: str,
           *values: Any, **settings: Any) -> Iterator[str]:
    """Yield what `generate` returns for one prompt, piece by piece, in complete characters."""
    chosen = Settings.of(*values, **settings)
    for [text] in generate_ids(model, tokenizer, [encode(model, tokenizer, prompt)], chosen):
        yield text.piece


def encode(model: LanguageModel, tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of a prompt (of an empty one: the end-of-text token) that fits the window."""
    if not isinstance(prompt, str):
        raise UserError(f"A prompt must be text, not {type(prompt).__name__}.")
    prompt = prompt.encode("utf-8", "replace").decode()  # a terminal may give lone surrogates
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids or [tokenizer.eos_token_id]
    _check_ids(model, ids)
    return ids


def _check_ids(model: LanguageModel, ids: list[int]):
    window, last = model.config.sequence_length, model.config.vocab_size - 1
    if len(ids) > window:
        raise UserError(f"The prompt has {len(ids)} tokens and the model's context window is "
                        f"{window}: shorten the prompt.")
    if min(ids) < 0 or max(ids) > last:
        raise UserError(f"ids must lie between 0 and {last}, the model's vocabulary.")


def check_top_k(model: LanguageModel, settings: Settings):
    size = model.config.vocab_size
    if settings.top_k and settings.top_k > size:
        raise UserError(f"top_k is {settings.top_k}; write 1 to {size}, the size of the "
                        "vocabulary, or 0 for all.")


def generate_ids(model: LanguageModel, tokenizer: Any, prompts: list[list[int]],
                 settings: Settings, as_text: bool = True) -> Iterator[list[Continuation]]:
    """Continue prompts of any lengths as one batch: yield all continuations after each token.

    Those that have ended no longer grow. Without `as_text` only their ids are kept.
    """
    check_top_k(model, settings)
    for ids in prompts:
        _check_ids(model, ids)
    limit = model.config.sequence_length if settings.past_window == "stop" else math.inf
    texts = [Continuation(ids, ended_by="window" if len(ids) >= limit else None) for ids in prompts]
    if all(text.ended_by for text in texts):
        yield texts
        return
    eos = None if settings.ignore_eos else tokenizer.eos_token_id
    for tokens in islice(sample_ids(model, prompts, settings), settings.max_new_tokens):
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.piece = ""
            if text.ended_by is None:
                text.ids.append(token)
                if token == eos:
                    text.ended_by = "end of text"
                elif len(text.prompt_ids) + len(text.ids) >= limit:
                    text.ended_by = "window"
                elif len(text.ids) == settings.max_new_tokens:
                    text.ended_by = "length"
                if as_text:
                    detokenize(text, tokenizer, settings.stop_strings)
        yield texts
        if all(text.ended_by for text in texts):
            return


def detokenize(text: Continuation, tokenizer: Any, stop_strings: tuple[str, ...] = ()):
    """Update a continuation's text from its ids, and end it at a stop string."""
    # Decoded after the end of the prompt, since some decoders drop a leading space and the prompt
    # may end in the middle of a character.
    before = text.prompt_ids[-8:]
    whole, prompt = (tokenizer.decode(ids, skip_special_tokens=True)
                     for ids in (before + text.ids, before))
    decoded = whole[len(prompt.rstrip(HALF)) :]
    if not text.ended_by:  # trailing bytes may be the start of a character
        decoded = decoded.rstrip(HALF)
    for stop in stop_strings:
        found = decoded.find(stop, max(0, len(text.text) - len(stop) + 1))
        if found >= 0:
            decoded, text.ended_by = decoded[: found + len(stop)], "stop string"
    text.piece = decoded[len(text.text) :]
    text.text += text.piece


def complete(steps: Iterator[list[Continuation]]) -> list[Continuation]:
    """Return the continuations of `generate_ids` once all have ended."""
    *_, texts = steps
    return texts


def describe_continuation(text: Continuation, window: int, seconds: float) -> str:
    """Say how long a continuation is, how fast it came, and why it ended."""
    reasons = {"length": "max_new_tokens reached", "end of text": "end-of-text token",
               "stop string": "stop string", "window": f"the context window of {window} is full"}
    line = f"{len(text.ids)} tokens, {len(text.ids) / max(seconds, 1e-9):.0f} tokens/s"
    if text.ended_by:
        line += f"; {reasons[text.ended_by]}"
    if len(text.prompt_ids) + len(text.ids) > window:
        line += f"; longer than the context window: the model saw only the last {window} tokens"
    return line
