"""Generate text: prompts and settings in, continuations out, whole or as they grow.

Shapes: B prompts, T tokens, N generated tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

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
    """Continue each prompt.

    Args:
        prompts: one string, a list of strings, or token ids (B, T) int64. "" starts a new text.
        values, settings: max_new_tokens, temperature, top_k, top_p, seed, ...: the fields of
            `Settings`, in their order or by name. A prompt gets the same continuation alone and
            in a list.

    Returns:
        The continuations without their prompts: a list of strings; for ids, ids (B, N), padded
        with the end-of-text token.

    Raises:
        ValueError: a setting is invalid, or a prompt is longer than the context window.
    """
    chosen = Settings.of(*values, **settings)
    if isinstance(prompts, Tensor):
        return _generate_tensor(model, tokenizer, prompts, chosen)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list | tuple):
        kind = type(prompts).__name__
        raise ValueError(f"prompts must be a string, a list of strings or a tensor, not {kind}.")
    ids = [encode(model, tokenizer, prompt) for prompt in prompts]
    batches = [ids[start : start + ROWS] for start in range(0, len(ids), ROWS)]
    return [text.text for batch in batches
            for text in complete(generate_ids(model, tokenizer, batch, chosen))]


def _generate_tensor(model: LanguageModel, tokenizer: Any, ids: Tensor,
                     settings: Settings) -> Tensor:
    if ids.dim() != 2 or ids.is_floating_point() or ids.numel() < 1:
        raise ValueError("ids must be integers of shape (B, T), both at least 1; "
                         f"these are {ids.dtype} {tuple(ids.shape)}.")
    steps = generate_ids(model, tokenizer, ids.tolist(), settings, bool(settings.stop_strings))
    texts = complete(steps)
    rows = [torch.tensor(text.ids, dtype=torch.int64, device=ids.device) for text in texts]
    if len({len(row) for row in rows}) == 1:  # which needs no end-of-text token
        return torch.stack(rows)
    return torch.nn.utils.rnn.pad_sequence(rows, True, tokenizer.eos_token_id)


def stream(model: LanguageModel, tokenizer: Any, prompt: str,
           *values: Any, **settings: Any) -> Iterator[str]:
    """Yield what `generate` returns for one prompt, piece by piece, in complete characters.

    Raises as `generate` does, when the first piece is asked for.
    """
    chosen = Settings.of(*values, **settings)
    for [text] in generate_ids(model, tokenizer, [encode(model, tokenizer, prompt)], chosen):
        yield text.piece


# ---------------------------------------------------------------------------------------------
# Prompt -> ids


def encode(model: LanguageModel, tokenizer: Any, prompt: str) -> list[int]:
    """Return a prompt's token ids; the end-of-text token for an empty one.

    Raises:
        ValueError: it is not text, or longer than the context window.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"A prompt must be text, not {type(prompt).__name__}.")
    prompt = prompt.encode("utf-8", "replace").decode()  # a terminal may give lone surrogates
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids or [tokenizer.eos_token_id]
    check_ids(model, ids)
    return ids


def check_ids(model: LanguageModel, ids: list[int]):
    window, vocab_size = model.config.sequence_length, model.config.vocab_size
    if len(ids) > window:
        raise ValueError(f"The prompt has {len(ids)} tokens and the model's context window is "
                         f"{window}: shorten the prompt.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(f"ids must lie between 0 and {vocab_size - 1}, the model's vocabulary.")


def check_top_k(model: LanguageModel, settings: Settings):
    size = model.config.vocab_size
    if settings.top_k and settings.top_k > size:
        raise ValueError(f"top_k is {settings.top_k}; write 1 to {size}, the size of the "
                         "vocabulary, or 0 for all.")


# ---------------------------------------------------------------------------------------------
# Ids -> continuations


def generate_ids(model: LanguageModel, tokenizer: Any, prompts: list[list[int]],
                 settings: Settings, as_text: bool = True) -> Iterator[list[Continuation]]:
    """Continue prompts of any lengths as one batch.

    Yields the same continuations after each token; those that have ended no longer grow. Without
    `as_text` only their ids are kept.
    """
    check_top_k(model, settings)
    for ids in prompts:
        check_ids(model, ids)
    texts, window = [Continuation(ids) for ids in prompts], model.config.sequence_length
    if settings.past_window == "stop":
        for text in texts:
            text.ended_by = "window" if len(text.prompt_ids) >= window else None
    if all(text.ended_by for text in texts):
        yield texts
        return
    eos = None if settings.ignore_eos else tokenizer.eos_token_id
    for tokens in islice(sample_ids(model, prompts, settings), settings.max_new_tokens):
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.piece = ""
            if text.ended_by is None:
                _append(text, token, eos, settings, window)
                if as_text:
                    detokenize(text, tokenizer, settings.stop_strings)
        yield texts
        if all(text.ended_by for text in texts):
            return


def _append(text: Continuation, token: int, eos: int | None, settings: Settings, window: int):
    text.ids.append(token)
    if token == eos:
        text.ended_by = "end of text"
    elif settings.past_window == "stop" and len(text.prompt_ids) + len(text.ids) >= window:
        text.ended_by = "window"
    elif len(text.ids) == settings.max_new_tokens:
        text.ended_by = "length"


def detokenize(text: Continuation, tokenizer: Any, stop_strings: tuple[str, ...] = ()):
    """Update a continuation's text from its ids, and end it at a stop string.

    Ids are decoded after the end of the prompt: some decoders drop a leading space, and the prompt
    may end in the middle of a character.
    """
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
    for texts in steps:  # noqa: B007 (only the last one is wanted)
        pass
    return texts


def describe_continuation(text: Continuation, window: int, seconds: float) -> str:
    """Say how long a continuation is, how fast it came, and why it ended."""
    reasons = {"length": "max_new_tokens reached", "end of text": "end-of-text token",
               "stop string": "stop string", "window": f"the context window of {window} is full"}
    speed = len(text.ids) / max(seconds, 1e-9)
    line = f"{len(text.ids)} tokens, {speed:.0f} tokens/s"
    if text.ended_by:
        line += f"; {reasons[text.ended_by]}"
    if len(text.prompt_ids) + len(text.ids) > window:
        line += f"; longer than the context window: the model saw only the last {window} tokens"
    return line
