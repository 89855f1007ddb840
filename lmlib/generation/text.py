"""Prompts in, continuations out."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lmlib.generation.sampling import sample_ids
from lmlib.generation.settings import Settings
from lmlib.model.transformer import LanguageModel

ROWS = 16  # prompts written side by side


@dataclass
class Continuation:
    """What has been written behind one prompt."""

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    text: str = ""  # whole characters only
    piece: str = ""  # what the last token added to it, often nothing
    ended_by: str | None = None  # "length", "end of text", "stop string" or "window"


def generate(
    model: LanguageModel,
    tokenizer: Any,
    prompts: list[str] | str | Tensor,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int = 0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_strings: tuple[str, ...] | str = (),
    ignore_eos: bool = False,
    past_window: str = "slide",
) -> list[str] | Tensor:
    """Continue each prompt.

    Args:
        prompts: strings (one, or a list) of any lengths, or token ids (B, T) int64. An empty one begins a new text.
        temperature ... past_window: see `Settings`. The same seed gives the same text; a prompt in a list gives
            what it gives alone.

    Returns:
        The continuations, without their prompts: a list of strings; for ids, ids (B, N), with end-of-text tokens
        after a text has ended.

    Raises:
        ValueError: a setting is out of range, or a prompt is longer than the model's window.
    """
    rest = {"min_p": min_p, "repetition_penalty": repetition_penalty, "stop_strings": stop_strings}
    rest |= {"ignore_eos": ignore_eos, "past_window": past_window}
    settings = Settings(max_new_tokens, temperature, top_k, top_p, seed, **rest)
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.is_floating_point() or prompts.numel() < 1:
            shape = f"{prompts.dtype} {tuple(prompts.shape)}"
            raise ValueError(f"ids must be whole numbers of shape (B, T), both at least 1; these are {shape}.")
        texts = complete(generate_ids(model, tokenizer, prompts.tolist(), settings, as_text=bool(settings.stop_strings)))
        rows = [torch.tensor(text.ids, dtype=torch.int64, device=prompts.device) for text in texts]
        if len({len(row) for row in rows}) == 1:
            return torch.stack(rows)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_token_id)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list | tuple):
        raise ValueError(f"prompts must be text, a list of texts or a tensor of ids, not {type(prompts).__name__}.")
    ids = [encode(model, tokenizer, prompt) for prompt in prompts]
    return [
        text.text
        for start in range(0, len(ids), ROWS)
        for text in complete(generate_ids(model, tokenizer, ids[start : start + ROWS], settings))
    ]


def stream(
    model: LanguageModel,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int = 0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_strings: tuple[str, ...] | str = (),
    ignore_eos: bool = False,
    past_window: str = "slide",
) -> Iterator[str]:
    """What `generate` writes for one prompt, piece by piece as it comes; a piece is never half a character.

    Raises as `generate` does, when the first piece is asked for.
    """
    rest = {"min_p": min_p, "repetition_penalty": repetition_penalty, "stop_strings": stop_strings}
    rest |= {"ignore_eos": ignore_eos, "past_window": past_window}
    settings = Settings(max_new_tokens, temperature, top_k, top_p, seed, **rest)
    for [text] in generate_ids(model, tokenizer, [encode(model, tokenizer, prompt)], settings):
        yield text.piece


def encode(model: LanguageModel, tokenizer: Any, prompt: str) -> list[int]:
    """A prompt's token ids; the end-of-text token alone for an empty one.

    Raises:
        ValueError: it is no text, or longer than the model's window.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"A prompt must be text, not {type(prompt).__name__}.")
    prompt = prompt.encode("utf-8", "replace").decode()  # half a surrogate pair, from a terminal of another encoding
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] or [tokenizer.eos_token_id]
    check_ids(model, ids)
    return ids


def check_ids(model: LanguageModel, ids: list[int]):
    window, vocab_size = model.config.sequence_length, model.config.vocab_size
    if len(ids) > window:
        raise ValueError(f"The prompt has {len(ids)} tokens and the model's window is {window}: shorten the prompt.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ValueError(f"ids must lie between 0 and {vocab_size - 1}, the model's vocabulary.")


def check_top_k(model: LanguageModel, settings: Settings):
    if settings.top_k and settings.top_k > model.config.vocab_size:
        size = model.config.vocab_size
        raise ValueError(f"top_k is {settings.top_k}; write 1 to {size}, the size of the vocabulary, or 0 for all.")


def generate_ids(
    model: LanguageModel, tokenizer: Any, prompts: list[list[int]], settings: Settings, as_text: bool = True
) -> Iterator[list[Continuation]]:
    """Continue prompts of any lengths side by side: after each step the same continuations, grown by a token each.

    What has ended grows no more; when all have, the iteration ends. Without `as_text` only ids are kept.
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
                _extend(text, token, eos, settings, window)
                if as_text:
                    detokenize(text, tokenizer, settings.stop_strings)
        yield texts
        if all(text.ended_by for text in texts):
            return


def _extend(text: Continuation, token: int, eos: int | None, settings: Settings, window: int):
    text.ids.append(token)
    if token == eos:
        text.ended_by = "end of text"
    elif settings.past_window == "stop" and len(text.prompt_ids) + len(text.ids) >= window:
        text.ended_by = "window"
    elif len(text.ids) == settings.max_new_tokens:
        text.ended_by = "length"


def detokenize(text: Continuation, tokenizer: Any, stop_strings: tuple[str, ...] = ()):
    """Bring a continuation's text up to its tokens."""
    written = _decode_continuation(tokenizer, text)
    if not text.ended_by:  # trailing bytes may be a character's first
        written = written.rstrip("\N{REPLACEMENT CHARACTER}")
    for stop in stop_strings:
        found = written.find(stop, max(0, len(text.text) - len(stop) + 1))
        if found >= 0:
            written, text.ended_by = written[: found + len(stop)], "stop string"
    text.piece = written[len(text.text) :]
    text.text += text.piece


def _decode_continuation(tokenizer: Any, text: Continuation) -> str:
    """The text of a continuation's tokens, read behind the end of its prompt: some decoders drop a leading space, and
    the prompt may end in half a character."""
    before = text.prompt_ids[-8:]
    whole, prompt = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (before + text.ids, before))
    return whole[len(prompt.rstrip("\N{REPLACEMENT CHARACTER}")) :]


def complete(steps: Iterator[list[Continuation]]) -> list[Continuation]:
    """The continuations of `write` once all have ended."""
    for texts in steps:  # noqa: B007 (the last one is wanted)
        pass
    return texts


def describe_continuation(text: Continuation, window: int, seconds: float) -> str:
    """How long a text is, how fast it came, why it ended, and whether it has outgrown the model's window."""
    reasons = {"length": "max_new_tokens reached", "end of text": "the model ended it", "stop string": "a stop string"}
    reasons["window"] = f"the window of {window} tokens is full"
    line = f"{len(text.ids)} tokens, {len(text.ids) / max(seconds, 1e-9):.0f} a second"
    if text.ended_by:
        line += f"; {reasons[text.ended_by]}"
    if len(text.prompt_ids) + len(text.ids) > window:
        line += f"; past the model's window, it saw only the last {window} tokens"
    return line
