"""Tokens with their probabilities, and generated text, as self-contained HTML without scripts.

Text from a model, a prompt or a run's name is untrusted: every piece of it is escaped. A token's
details appear when the mouse hovers over it or the Tab key gives it focus.
"""

import html
import math
from dataclasses import dataclass
from typing import Any

import torch

from lmlib.errors import UserError
from lmlib.generation.text import Continuation, detokenize
from lmlib.model.transformer import LanguageModel
from lmlib.text import printable

ALTERNATIVES = 10
ORANGE, BLUE = "213, 94, 0", "0, 114, 178"  # from Okabe and Ito's color-blind-safe palette
MIN_PROBABILITY = 1e-9  # keeps logarithms finite
UNSCORED = "not scored: the text is longer than the context window, and only its end is scored."
BORDER = "border: 1px solid rgba(128, 128, 128, .4)"
CARD = f"flex: 1 1 16em; {BORDER}; border-radius: 6px; padding: .3em .9em"
CELL = f"style='{BORDER}; padding: .3em .7em; vertical-align: top; text-align: left'"
STYLE = """<style>
.lmlib-text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px; line-height: 1.7;
  font-family: var(--jp-code-font-family, monospace); padding: .5em 0 }
.lmlib-text .given { opacity: .6 }
.lmlib-text .token { border-radius: 3px; position: relative }
.lmlib-text .token:is(:hover, :focus)::after { content: attr(data-tip); white-space: pre;
  position: absolute; left: 0; top: 1.7em; z-index: 9; width: max-content; background: #222;
  color: #fff; border: 1px solid #999; box-shadow: 0 2px 8px rgba(0, 0, 0, .4); padding: .5em .8em;
  border-radius: 5px; font-size: 12px; line-height: 1.45; pointer-events: none }
.lmlib-text:has(.token:hover) .token:focus:not(:hover)::after { content: none }
/* What surrounds a text would cut off the details: tabs, outputs, and JupyterLab's cells. */
:is(.widget-tab-contents, .jp-OutputArea, .jp-OutputArea *):has(.token:is(:hover, :focus)) {
  overflow: visible }
.jp-Cell:has(.token:is(:hover, :focus)) {
  content-visibility: visible !important; contain: none !important; overflow: visible }
/* Where the browser can: below the token, or above it near the window's end. */
@supports (anchor-scope: all) {
  .lmlib-text .token { position: static; anchor-scope: --lmlib-token }
  .lmlib-text .token:is(:hover, :focus) { anchor-name: --lmlib-token }
  .lmlib-text .token:is(:hover, :focus)::after { position: fixed; inset: auto; margin: 2px 0;
    position-anchor: --lmlib-token; position-area: bottom span-right;
    position-try-fallbacks: flip-block, flip-inline, flip-block flip-inline }
}
</style>"""


@dataclass(frozen=True)
class Token:
    """A token of a text and the model's prediction of it."""

    piece: str  # complete characters: the last token of a character carries it, the others ""
    probability: float
    rank: int  # 1: the most likely token
    alternatives: list[tuple[str, float]]  # the most likely tokens and their probabilities


@torch.no_grad()
def score_tokens(model: LanguageModel, tokenizer: Any,
                 text: Continuation) -> tuple[str, list[Token]]:
    """Score a continuation's tokens, each predicted from all before it, in one forward pass.

    Returns the start of the continuation that has no score, as text, and the N scored tokens: a
    text longer than the context window is cut at its start, and what then has less than half a
    window before it was generated from more context than the cut leaves. ValueError: no prompt.
    """
    if not text.prompt_ids:
        raise UserError("The first token of a text cannot be scored: nothing comes before it. "
                        "Give at least one token as the prompt.")
    ids, first = text.prompt_ids + text.ids, len(text.prompt_ids)
    window = model.config.sequence_length
    if (dropped := len(ids) - window) > 0:
        ids, first = ids[dropped:], max(first - dropped, window // 2)
    logits = model(torch.tensor([ids], device=model.lm_head.weight.device))
    probabilities = logits[0, first - 1 : -1].softmax(-1).cpu()  # (N, vocabulary)
    top = probabilities.topk(min(ALTERNATIVES, probabilities.shape[-1]))
    tokens, so_far = [], Continuation(ids[:first])
    for row, token_id, values, others in zip(probabilities, ids[first:], *top, strict=True):
        so_far.ids.append(token_id)
        detokenize(so_far, tokenizer)
        alternatives = zip(map(tokenizer.decode, others.tolist()), values.tolist(), strict=True)
        rank = int((row > row[token_id]).sum()) + 1
        tokens.append(Token(so_far.piece, float(row[token_id]), rank, list(alternatives)))
    unscored = text.ids[: len(text.ids) - len(tokens)]
    return tokenizer.decode(unscored, skip_special_tokens=True), tokens


def shade(prompt: str, tokens: list[Token], unscored: str = "") -> str:
    """Show a prompt and tokens behind it, in deeper orange the less likely they were.

    `unscored` stands between them in gray, and says why it has no score.
    """
    spans = []
    for token in tokens:
        tip = [f"{_quote(token.piece)}  {token.probability:.1%}, rank {token.rank:,}", "",
               *(f"{value:6.1%}  {_quote(piece)}" for piece, value in token.alternatives)]
        surprise = -math.log10(max(token.probability, MIN_PROBABILITY))
        spans.append(_span(token.piece, ORANGE, surprise / 4, tip))  # full color at 1e-4 or less
    return _text(prompt, spans, unscored)


def shade_difference(prompt: str, before: list[Token], after: list[Token],
                     names: tuple[str, str], unscored: str = "") -> str:
    """Show tokens that two models scored: blue where likelier by the second, else orange."""
    spans = []
    for pair in zip(before, after, strict=True):
        tip = [_quote(pair[0].piece), *(f"{name}: {token.probability:.1%}, rank {token.rank:,}"
                                        for name, token in zip(names, pair, strict=True))]
        old, new = (max(token.probability, MIN_PROBABILITY) for token in pair)
        gain = math.log(new / old)
        color = BLUE if gain > 0 else ORANGE  # full color at a factor of e^3, about 20
        spans.append(_span(pair[0].piece, color, abs(gain) / 3, tip))
    return _text(prompt, spans, unscored)


def plain(prompt: str, continuation: str) -> str:
    """Show a prompt and its continuation so far."""
    return _text(prompt, [_escape(continuation)])


def note(line: str) -> str:
    """Show a line that explains what stands above it, or what to do."""
    return f"<p style='opacity: .7; line-height: 1.5; margin: .5em 0'>{_escape(line)}</p>"


def cards(columns: list[tuple[str, str, str]]) -> str:
    """Show texts side by side: (heading, prompt, continuation) each."""
    boxes = [f"<div style='{CARD}'><b>{_escape(heading)}</b>{plain(prompt, continuation)}</div>"
             for heading, prompt, continuation in columns]
    return f"<div style='display: flex; flex-wrap: wrap; gap: .8em'>{''.join(boxes)}</div>"


def grid(columns: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """Show a table of texts: a heading for each column, and rows of (heading, texts)."""
    lines = ["".join(f"<th {CELL}>{_escape(name)}</th>" for name in ["", *columns])]
    for heading, texts in rows:
        cells = "".join(f"<td {CELL}>{plain('', text)}</td>" for text in texts)
        lines.append(f"<th {CELL}>{_escape(heading)}</th>{cells}")
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table style='border-collapse: collapse'>{body}</table>"


def _text(prompt: str, spans: list[str], unscored: str = "") -> str:
    given = f"<span class='given'>{_escape(prompt)}</span>"
    if unscored:
        given += f"<span class='given' title='{UNSCORED}'>{_escape(unscored)}</span>"
    return f"{STYLE}<div class='lmlib-text'>{given}{''.join(spans)}</div>"


def _span(piece: str, color: str, strength: float, tip: list[str]) -> str:
    tip_text = html.escape("\n".join(tip)).replace("\n", "&#10;")
    shown = html.escape(printable(piece).replace("\n", "↵\n"))
    background = f"rgba({color}, {0.6 * min(1.0, strength):.2f})"
    return (f"<span class='token' tabindex='0' style='background: {background}' "
            f"data-tip='{tip_text}'>{shown}</span>")


def _quote(piece: str) -> str:
    return "“" + printable(piece).replace("\n", "↵").replace("\t", "⇥") + "”"


def _escape(text: str) -> str:
    return html.escape(printable(text))
