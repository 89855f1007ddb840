"""Contamination: held-out text that also occurs in training text, or that the tokenizer knows."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmlib.audit.report import Report
from lmlib.text import normalize

NGRAM = 13  # words or tokens; a shorter run recurs by coincidence (arXiv:2005.14165, appendix C)
NEAR = 0.5  # a document that shares this share of its words, in n-grams, is a near duplicate
# Shares that coincidence may explain. Of held-out text in runs that training text has, by set
# phrases, stage directions and licenses (Shakespeare's plays: BASELINE). Of held-out documents that
# were trained on, by rows without content, such as an empty form.
SHARED, COPIES = 0.05, 0.01
# A word; of scripts that do without spaces (Thai to Myanmar, Khmer, CJK and kana), a character.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def check_split(training: Iterable[str], held_out: Iterable[str], n: int = NGRAM) -> Report:
    """Check that no held-out document is a copy or near duplicate of training text."""
    # Case, spacing and Unicode's compatibility forms are ignored. A near duplicate shares half of
    # its words, in runs of n, with training text; of all held-out words, SHARED may be shared.
    training, held_out = list(training), list(held_out)
    if not training or not held_out:
        raise ValueError("check_split needs training and held-out documents; one list is empty.")
    normalized, N = [normalize(text) for text in training + held_out], len(training)
    exact, forms = set(training), set(normalized[:N])
    duplicates = [i for i, text in enumerate(normalized[N:]) if text in forms]
    copies = [i for i in duplicates if held_out[i] in exact]
    same = [i for i in duplicates if held_out[i] not in exact]
    vocabulary: dict[str, int] = {}
    ids = [np.array([*(vocabulary.setdefault(word, len(vocabulary))
                       for word in WORD.findall(text)), -1]) for text in normalized]
    shared = shared_tokens(np.concatenate(ids[:N]), np.concatenate(ids[N:]), n)
    parts = np.split(shared, np.cumsum([len(document) for document in ids[N:]])[:-1])
    shares = [float(part[:-1].mean()) if len(part) > 1 else 0.0 for part in parts]
    near = sorted({i for i, share in enumerate(shares) if share >= NEAR} - set(duplicates))
    share = float(shared.sum() / max(1, len(shared) - len(held_out)))  # less the separators
    numbers = {"copies": copies, "normalized copies": same, "near duplicates": near,
               "share of words": share, "shares": shares}
    kinds = {"are copies of training documents": copies,
             "are copies but for case, spacing or Unicode forms": same,
             f"share half of their words or more, in runs of {n}, with training text": near}
    found = [f"{len(part)} of {len(held_out)} held-out documents {kind}"
             for kind, part in kinds.items() if part]
    shared_words = f"{share:.2%} of the held-out words are in runs of {n} that training text has"
    if not found and share <= SHARED:
        summary = f"no held-out document is in the training text; {shared_words}."
        return Report("split", True, summary, numbers=numbers)
    names = {"duplicates": duplicates, "near duplicates": near}
    fault = " and ".join(name for name, part in names.items() if part) or "shared text"
    return Report("split", False, f"{'; '.join([*found, shared_words])}.", [], fault, numbers)


def check_lineage(trained: np.ndarray, held_out: np.ndarray, is_complete: bool) -> Report:
    """Check that no held-out document is among those that a model was trained on.

    Args:
        trained: sorted hashes of the documents that it and its ancestors were trained on.
        held_out: hashes of the held-out documents.
        is_complete: False if an ancestor did not record its documents.
    """
    found = int(np.isin(held_out, trained).sum())
    numbers = {"held-out documents": len(held_out), "trained on": found}
    documents = f"{len(held_out)} held-out documents"
    if found > COPIES * len(held_out):
        summary = f"{found} of {documents} are among those that it or an ancestor was trained on."
        return Report("lineage", False, summary, [], "held-out documents were trained on", numbers)
    known = f"{found} of {documents} are among the {len(trained):,} that it was trained on"
    if not is_complete:
        summary = (f"lineage unknown: an ancestor did not record its training documents. Of those "
                   f"that are known, {known}.")
        return Report("lineage", None, summary, numbers=numbers)
    return Report("lineage", True, f"{known}, ancestors included.", numbers=numbers)


def check_windows(training: np.ndarray, windows: Tensor, n: int = NGRAM,
                  stream: np.ndarray | None = None, starts: np.ndarray | None = None) -> Report:
    """Check that held-out windows (W, T + 1) do not occur in the training tokens (tokens,).

    With the `stream` of tokens that they were cut from, at `starts` (W,), a run may extend beyond
    its window, so that windows shorter than `n` are judged too.
    """
    if windows.shape[1] < n and stream is None:
        return Report("split", None, f"windows of {windows.shape[1]} tokens have no runs of {n}.")
    shares = shared_windows(training, windows, n, stream, starts).double().mean(1)
    share, most = float(shares.mean()), int((shares >= NEAR).sum())
    numbers = {"share of tokens": share, "windows mostly shared": most}
    summary = f"{share:.2%} of the held-out tokens are in runs of {n} that training text has"
    if share <= SHARED:
        return Report("split", True, f"{summary}.", numbers=numbers)
    fault, meaning = (("overlapping windows", "the score measures memorization") if share > 0.9
                      else ("shared text", "memorizing may explain part of the score"))
    summary += f"; {most} of {len(windows)} windows are mostly shared: {meaning}."
    return Report("split", False, summary, [], fault, numbers)


def shared_windows(training: np.ndarray, windows: Tensor, n: int = NGRAM,
                   stream: np.ndarray | None = None, starts: np.ndarray | None = None) -> Tensor:
    """Return which tokens of windows (W, T + 1) are in runs of `n` that training contains, bool."""
    width, margin = windows.shape[1], 0 if stream is None else n - 1
    rows = np.full((len(windows), margin + width + margin + 1), -1, np.int64)  # -1 separates rows
    if stream is None:
        rows[:, :width] = windows.numpy()
    else:
        for row, start in zip(rows, starts.tolist(), strict=True):
            first = max(0, start - margin)
            piece = stream[first : start + width + margin]
            row[margin + first - start :][: len(piece)] = piece
    shared = shared_tokens(training, rows.ravel(), n).reshape(rows.shape)
    return torch.from_numpy(shared[:, margin : margin + width])


def shared_tokens(training: np.ndarray, held_out: np.ndarray, n: int = NGRAM) -> np.ndarray:
    """Return which held-out tokens are in runs of `n` that training contains: (tokens,), bool."""
    # Negative tokens separate documents and are in no run.
    grams, chunk, found = _ngrams(held_out, n), 4_000_000, [np.empty(0, np.uint64)]
    wanted = np.unique(grams)
    # A table of the hashes' top 20 bits rules out most training n-grams before the search.
    likely = np.zeros(2**20, dtype=bool)
    likely[wanted >> np.uint64(44)] = True
    for start in range(0, len(training), chunk):
        present = _ngrams(np.asarray(training[start : start + chunk + n - 1]).astype(np.int64), n)
        present = present[likely[present >> np.uint64(44)]]
        found.append(np.unique(present[np.isin(present, wanted)]))
    separators = np.cumsum(np.append(0, held_out < 0))  # before each place
    starts = np.isin(grams, np.concatenate(found)) & (separators[n:] == separators[:-n])
    covered = np.zeros(len(held_out), dtype=np.int64)
    covered[: len(starts)] += starts  # +1 where a shared run begins, -1 behind its end
    covered[n:] -= starts[:-1]
    return np.cumsum(covered) > 0


def _ngrams(tokens: np.ndarray, n: int) -> np.ndarray:
    """Return a 64-bit polynomial hash of the `n` tokens from each place on: (tokens - n + 1,)."""
    # Runs of 1, 2, 4, ... tokens are hashed by doubling and joined by the binary digits of n. Base
    # and last mixing have the constants of splitmix64 (doi:10.1145/2660193.2660195).
    part, length, covered = tokens.astype(np.uint64) + np.uint64(1), 1, 0
    total = np.zeros(max(0, len(tokens) - n + 1), np.uint64)
    while length <= n:
        power = np.uint64(pow(0x9E3779B97F4A7C15, length, 2**64))
        if n & length:
            total = total * power + part[covered : covered + len(total)]
            covered += length
        part, length = part[:-length] * power + part[length:], 2 * length
    total = (total ^ (total >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return total ^ (total >> np.uint64(27))


def check_tokenizer(tokenizer: Any, training: Iterable[str], held_out: Iterable[str]) -> Report:
    """Check that a tokenizer trained in this run was trained on training text alone.

    Both texts are read once, a few documents at a time.
    """
    # Every token of two characters or more that held-out text uses must occur in training text.
    def ids_of(texts: list[str]) -> set[int]:
        return set().union(*tokenizer(texts, add_special_tokens=False)["input_ids"])

    used: set[int] = set()
    for texts in _batched(held_out):
        used |= ids_of(texts)
    tokens = {i: tokenizer.decode([i]) for i in used - set(tokenizer.all_special_ids)}
    unknown = {i: t for i, t in tokens.items() if len(t) > 1 and "\ufffd" not in t}
    for texts in _batched(training):
        if not unknown:
            break
        seen = ids_of(texts)
        # A token that is in the text may have been merged into longer ones.
        unknown = {i: token for i, token in unknown.items()
                   if i not in seen and not any(token in text for text in texts)}
    unknown = sorted(unknown.values())
    numbers = {"unknown to training text": unknown}
    if not unknown:
        summary = "every token of the held-out text could be learned from the training text."
        return Report("tokenizer", True, summary, numbers=numbers)
    summary = (f"{len(unknown)} tokens occur in held-out text but not in training text "
               f"({', '.join(map(repr, unknown[:4]))}): the tokenizer was trained on both.")
    return Report("tokenizer", False, summary, [], "tokenizer saw held-out text", numbers)


def _batched(texts: Iterable[str], size: int = 64) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(islice(texts, size)):
        yield batch
