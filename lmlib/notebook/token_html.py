"""What a model was thinking: a text's tokens with their probabilities, as self-contained HTML without scripts.

Every piece of text is escaped; the details of a token show under the mouse or, by the Tab key, under the focus.
"""

import html
import math
from dataclasses import dataclass
from typing import Any

import torch

from lmlib.generation.text import Continuation, detokenize
from lmlib.model.transformer import LanguageModel
from lmlib.text import printable

ALTERNATIVES = 10


ORANGE, BLUE = "213, 94, 0", "0, 114, 178"  # of Okabe and Ito's palette


STYLE = """<style>
.lmlib-text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: var(--jp-code-font-family, monospace); font-size: 14px;
  line-height: 1.7; padding: .5em 0 }
.lmlib-text .given { opacity: .6 }
.lmlib-text .token { position: relative; border-radius: 3px }
.lmlib-text .token:hover::after, .lmlib-text .token:focus::after { content: attr(data-tip); white-space: pre; position: absolute;
  left: 0; top: 1.7em; z-index: 9; background: #222; color: #fff; padding: .5em .8em; border-radius: 5px; font-size: 12px;
  line-height: 1.45; pointer-events: none }
</style>"""


@dataclass(frozen=True)
class Token:
    """A token of a text, and what the model thought before it read it."""

    piece: str  # whole characters: the last of several tokens that make one has it, the others have none
    probability: float
    rank: int  # 1: it was the likeliest
    alternatives: list[tuple[str, float]]  # the likeliest tokens and their probabilities


@torch.no_grad()
def tokens_of(model: LanguageModel, tokenizer: Any, ids: list[int], first: int) -> list[Token]:
    """The tokens `ids[first:]`, each judged from all before it, in one forward pass. Of a text longer than the model's
    window only those tokens are judged that still have half a window before them; the earlier ones are left out.

    Raises:
        ValueError: `first` is less than 1: nothing comes before the first token.
    """
    if first < 1:
        raise ValueError("The first token of a text cannot be judged: nothing comes before it.")
    dropped = max(0, len(ids) - model.config.sequence_length)
    if dropped:
        ids, first = ids[dropped:], max(first - dropped, model.config.sequence_length // 2)
    chances = model(torch.tensor([ids], device=model.lm_head.weight.device))[0, first - 1 : -1].softmax(-1).cpu()  # (N, V)
    likeliest = chances.topk(min(ALTERNATIVES, chances.shape[-1]))
    tokens = []
    text = Continuation(ids[:first])
    for row, token, values, others in zip(chances, ids[first:], likeliest.values, likeliest.indices, strict=True):
        text.ids.append(token)
        detokenize(text, tokenizer)
        alternatives = [(tokenizer.decode([i]), p) for i, p in zip(others.tolist(), values.tolist(), strict=True)]
        rank = int((row > row[token]).sum()) + 1
        tokens.append(Token(text.piece, float(row[token]), rank, alternatives))
    return tokens


def shade(given: str, tokens: list[Token]) -> str:
    """A prompt, and behind it tokens shaded by how unlikely they were."""
    spans = []
    for token in tokens:
        surprise = min(1.0, -math.log10(max(token.probability, 1e-9)) / 4)
        tip = [f"{_quoted(token.piece)}  {token.probability:.1%}, rank {token.rank:,}", ""]
        tip += [f"{p:6.1%}  {_quoted(piece)}" for piece, p in token.alternatives]
        spans.append(_span(token.piece, f"rgba({ORANGE}, {0.6 * surprise:.2f})", tip))
    return _page(given, spans)


def shade_difference(given: str, before: list[Token], after: list[Token], names: tuple[str, str]) -> str:
    """The same tokens judged by two models: blue where the second finds them likelier, orange where less likely."""
    spans = []
    for a, b in zip(before, after, strict=True):
        gain = math.log(max(b.probability, 1e-9) / max(a.probability, 1e-9))
        tip = [_quoted(a.piece)] + [f"{n}: {t.probability:.1%}, rank {t.rank:,}" for n, t in zip(names, (a, b), strict=True)]
        spans.append(_span(a.piece, f"rgba({BLUE if gain > 0 else ORANGE}, {0.6 * min(1.0, abs(gain) / 3):.2f})", tip))
    return _page(given, spans)


def plain(given: str, written: str = "") -> str:
    """A prompt and what has been written behind it so far."""
    return _page(given, [html.escape(printable(written))])


def cards(columns: list[tuple[str, str, str]]) -> str:
    """Texts side by side: (heading, prompt, what was written) each."""
    boxes = [
        "<div style='flex: 1 1 16em; border: 1px solid rgba(128, 128, 128, .4); border-radius: 6px; padding: .3em .9em'>"
        f"<b>{html.escape(printable(heading))}</b>{plain(given, written)}</div>"
        for heading, given, written in columns
    ]
    return f"<div style='display: flex; flex-wrap: wrap; gap: .8em'>{''.join(boxes)}</div>"


def grid(columns: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """A table of texts: a heading for each column, and rows of (heading, texts)."""
    cell = "style='border: 1px solid rgba(128, 128, 128, .4); padding: .3em .7em; vertical-align: top; text-align: left'"
    head = "".join(f"<th {cell}>{html.escape(printable(column))}</th>" for column in ["", *columns])
    lines = [
        f"<tr><th {cell}>{html.escape(printable(heading))}</th>"
        + "".join(f"<td {cell}>{plain('', t)}</td>" for t in texts)
        + "</tr>"
        for heading, texts in rows
    ]
    return f"<table style='border-collapse: collapse'><tr>{head}</tr>{''.join(lines)}</table>"


def _page(given: str, spans: list[str]) -> str:
    return f"{STYLE}<div class='lmlib-text'><span class='given'>{html.escape(printable(given))}</span>{''.join(spans)}</div>"


def _span(piece: str, color: str, tip: list[str]) -> str:
    tip_text = html.escape("\n".join(tip)).replace("\n", "&#10;")
    shown = html.escape(printable(piece).replace("\n", "↵\n"))
    return f"<span class='token' tabindex='0' style='background: {color}' data-tip='{tip_text}'>{shown}</span>"


def _quoted(piece: str) -> str:
    return "“" + printable(piece).replace("\n", "↵").replace("\t", "⇥") + "”"
