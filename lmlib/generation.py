"""Generation: a model, prompts and settings in; continuations out, whole or as they come.

A prompt is read once (prefill); each further token is one step from what the cache remembers (decode). Beyond the
model's window each token follows from the last `sequence_length` ones, read anew.

Shapes: B prompts, T tokens of the longest one, V vocab_size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lmlib.attention import Cache
from lmlib.model import LanguageModel

ROWS = 16  # prompts written side by side


@dataclass(frozen=True)
class Settings:
    """How to write. Each name means what it means in transformers.

    Raises:
        ValueError: settings are out of range; every one is named.
    """

    max_new_tokens: int = 100
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_k: int | None = 50  # choose among so many likeliest tokens; None or 0: all
    top_p: float | None = 0.95  # choose among the fewest that hold this share of the probability; None or 1: all
    seed: int = 0
    min_p: float | None = None  # leave out tokens less likely than this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1: tokens that the text has already become less likely
    stop_strings: tuple[str, ...] = ()  # a text ends with the first of these that it writes
    ignore_eos: bool = False  # do not end at the end-of-text token
    past_window: str = "slide"  # "stop": end when the model's window is full

    def __post_init__(self):
        if isinstance(self.stop_strings, str):
            object.__setattr__(self, "stop_strings", (self.stop_strings,))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings or ()))
        if wrong := _out_of_range(self):
            raise ValueError("; ".join(wrong) + ".")


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
        texts = finish(write(model, tokenizer, prompts.tolist(), settings, as_text=bool(settings.stop_strings)))
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
        for text in finish(write(model, tokenizer, ids[start : start + ROWS], settings))
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
    for [text] in write(model, tokenizer, [encode(model, tokenizer, prompt)], settings):
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


# ---------------------------------------------------------------------------------------------------
# Writing


def write(
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
                    read(text, tokenizer, settings.stop_strings)
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


def read(text: Continuation, tokenizer: Any, stop_strings: tuple[str, ...] = ()):
    """Bring a continuation's text up to its tokens."""
    written = decoded(tokenizer, text)
    if not text.ended_by:  # trailing bytes may be a character's first
        written = written.rstrip("\N{REPLACEMENT CHARACTER}")
    for stop in stop_strings:
        found = written.find(stop, max(0, len(text.text) - len(stop) + 1))
        if found >= 0:
            written, text.ended_by = written[: found + len(stop)], "stop string"
    text.piece = written[len(text.text) :]
    text.text += text.piece


def decoded(tokenizer: Any, text: Continuation) -> str:
    """The text of a continuation's tokens, read behind the end of its prompt: some decoders drop a leading space, and
    the prompt may end in half a character."""
    before = text.prompt_ids[-8:]
    whole, prompt = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (before + text.ids, before))
    return whole[len(prompt.rstrip("\N{REPLACEMENT CHARACTER}")) :]


def finish(steps: Iterator[list[Continuation]]) -> list[Continuation]:
    """The continuations of `write` once all have ended."""
    for texts in steps:  # noqa: B007 (the last one is wanted)
        pass
    return texts


# ---------------------------------------------------------------------------------------------------
# Tokens


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
            logits = penalised(logits, seen, settings.repetition_penalty)
            token = choose(logits, chance, settings.temperature, settings.top_k, settings.top_p, settings.min_p)
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
    cache = Cache(model.config, len(rows), max(longest, model.config.sequence_length), start, weight)
    hidden = model.model(padded, cache)[:, -1]  # (B, C)
    return model.lm_head(hidden), cache


@torch.inference_mode()
def decode(model: LanguageModel, token: Tensor, cache: Cache) -> Tensor:
    """One token of each row, (B,), read behind what the cache remembers: the logits (B, V) of the next."""
    return model.lm_head(model.model(token[:, None], cache)[:, -1])


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with those of tokens that were `seen` (B, V) divided by the penalty, or multiplied if negative."""
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def choose(
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


def _out_of_range(s: Settings) -> list[str]:
    def number(value: Any, kind: type = int) -> bool:
        return isinstance(value, int | kind) and not isinstance(value, bool)

    checks = {
        "max_new_tokens": (number(s.max_new_tokens) and s.max_new_tokens >= 1, "a whole number of 1 or more"),
        "temperature": (
            number(s.temperature, float) and 0 <= s.temperature < float("inf"),
            "0 (always the likeliest token) or more",
        ),
        "top_k": (s.top_k is None or (number(s.top_k) and s.top_k >= 0), "a whole number of 1 or more, or 0 for all"),
        "top_p": (s.top_p is None or (number(s.top_p, float) and 0 < s.top_p <= 1), "a share above 0 and up to 1"),
        "min_p": (s.min_p is None or (number(s.min_p, float) and 0 <= s.min_p <= 1), "a share from 0 to 1"),
        "repetition_penalty": (
            number(s.repetition_penalty, float) and 0 < s.repetition_penalty < float("inf"),
            "a number above 0 (1: no penalty)",
        ),
        "seed": (number(s.seed) and 0 <= s.seed < 2**63, "a whole number of 0 or more"),
        "stop_strings": (all(isinstance(stop, str) and stop for stop in s.stop_strings), "texts, none of them empty"),
        "ignore_eos": (isinstance(s.ignore_eos, bool), "True or False"),
        "past_window": (s.past_window in ("slide", "stop"), "'slide' or 'stop'"),
    }
    return [f"{name} is {getattr(s, name)!r}; write {wanted}" for name, (right, wanted) in checks.items() if not right]
