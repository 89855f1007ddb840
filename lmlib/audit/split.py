"""Contamination: held-out text that also occurs in training text, or that the tokenizer knows."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmlib.audit.report import Report
from lmlib.text import normalize

NGRAM = 13  # words or tokens; a shorter run recurs by coincidence (arXiv:2005.14165, appendix C)
NEAR = 0.5  # a document that shares this share of its words, in n-grams, is a near duplicate
SHARED = 0.2  # share of held-out text that set phrases, stage directions and licenses may explain

# Constants of splitmix64 (doi:10.1145/2660193.2660195): the hash's base and its last mixing.
BASE, MIX = 0x9E3779B97F4A7C15, np.uint64(0xBF58476D1CE4E5B9)


def check_split(training: Iterable[str], held_out: Iterable[str], n: int = NGRAM) -> Report:
    """Check that no held-out document is a copy or near duplicate of training text.

    Case, spacing and Unicode's compatibility forms are ignored. A near duplicate shares half of its
    words, in runs of `n`, with training text; of all held-out words, at most SHARED may be shared.

    Raises:
        ValueError: there are no training or no held-out documents.
    """
    training, held_out = list(training), list(held_out)
    if not training or not held_out:
        raise ValueError("check_split needs training and held-out documents; one list is empty.")
    exact, normalized = set(training), {normalize(text) for text in training}
    copies = [i for i, text in enumerate(held_out) if text in exact]
    same = [i for i, text in enumerate(held_out)
            if text not in exact and normalize(text) in normalized]
    vocabulary: dict[str, int] = {}
    documents = _word_ids(held_out, vocabulary)
    shared = shared_tokens(np.concatenate(_word_ids(training, vocabulary)),
                           np.concatenate(documents), n)
    parts = np.split(shared, np.cumsum([len(ids) for ids in documents])[:-1])
    shares = [float(part[:-1].mean()) if len(part) > 1 else 0.0 for part in parts]
    near = [i for i, share in enumerate(shares) if share >= NEAR and i not in {*copies, *same}]
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
    names = {"duplicates": copies + same, "near duplicates": near}
    fault = " and ".join(name for name, part in names.items() if part) or "shared text"
    return Report("split", False, f"{'; '.join([*found, shared_words])}.", [], fault, numbers)


def check_windows(training: np.ndarray, windows: Tensor, n: int = NGRAM) -> Report:
    """Check that the windows of an evaluation do not occur in training text.

    Args:
        training: the training tokens, (tokens,).
        windows: whole held-out windows (W, T + 1).
    """
    if windows.shape[1] < n:
        return Report("split", None, f"windows of {windows.shape[1]} tokens have no runs of {n}.")
    shares = shared_windows(training, windows, n).double().mean(1)
    share, most = float(shares.mean()), int((shares >= NEAR).sum())
    numbers = {"share of tokens": share, "windows mostly shared": most}
    summary = f"{share:.2%} of the held-out tokens are in runs of {n} that training text has"
    if share <= SHARED:
        return Report("split", True, f"{summary}.", numbers=numbers)
    fault, meaning = "shared text", "memorizing may explain part of the score"
    if share > 0.9:
        fault, meaning = "overlapping windows", "the score measures memorization"
    summary += f"; {most} of {len(windows)} windows are mostly shared: {meaning}."
    return Report("split", False, summary, [], fault, numbers)


def shared_windows(training: np.ndarray, windows: Tensor, n: int = NGRAM) -> Tensor:
    """Return which tokens of windows (W, T + 1) are in runs of `n` that training contains, bool."""
    rows = windows.numpy().astype(np.int64)
    return torch.from_numpy(np.stack(list(_shared_rows(training, rows, n))))


def shared_tokens(training: np.ndarray, held_out: np.ndarray, n: int = NGRAM) -> np.ndarray:
    """Return which held-out tokens are in runs of `n` that training contains: (tokens,), bool.

    Negative tokens separate documents and are in no run.
    """
    return next(_shared_rows(training, held_out[None], n))


def _shared_rows(training: np.ndarray, rows: np.ndarray, n: int) -> Iterator[np.ndarray]:
    hashes, chunk = [_ngrams(row, n) for row in rows], 4_000_000
    wanted = np.unique(np.concatenate(hashes))
    # A table of the hashes' top 20 bits rules out most training n-grams before the search.
    likely = np.zeros(2**20, dtype=bool)
    likely[wanted >> np.uint64(44)] = True
    found = [np.empty(0, np.uint64)]
    for start in range(0, len(training), chunk):
        present = _ngrams(np.asarray(training[start : start + chunk + n - 1]).astype(np.int64), n)
        present = present[likely[present >> np.uint64(44)]]
        found.append(np.unique(present[np.isin(present, wanted)]))
    known = np.concatenate(found)
    for row, grams in zip(rows, hashes, strict=True):
        separators = np.cumsum(np.append(0, row < 0))  # before each place
        starts = np.isin(grams, known) & (separators[n:] == separators[:-n])
        covered = np.zeros(len(row), dtype=np.int64)
        covered[: len(starts)] += starts  # +1 where a shared run begins, -1 behind its end
        covered[n:] -= starts[:-1]
        yield np.cumsum(covered) > 0


def _ngrams(tokens: np.ndarray, n: int) -> np.ndarray:
    """Return a 64-bit polynomial hash of the `n` tokens from each place on: (tokens - n + 1,).

    Runs of 1, 2, 4, ... tokens are hashed by doubling, and joined as the binary digits of `n` say.
    """
    size = len(tokens) - n + 1
    if size < 1:
        return np.empty(0, np.uint64)
    part, length, covered = tokens.astype(np.uint64) + np.uint64(1), 1, 0
    total = np.zeros(size, np.uint64)
    while length <= n:
        power = np.uint64(pow(BASE, length, 2**64))
        if n & length:
            total = total * power + part[covered : covered + size]
            covered += length
        part, length = part[:-length] * power + part[length:], 2 * length
    total = (total ^ (total >> np.uint64(30))) * MIX
    return total ^ (total >> np.uint64(27))


def _word_ids(texts: Iterable[str], vocabulary: dict[str, int]) -> list[np.ndarray]:
    """Return each text's words as ids, then -1; `vocabulary` gains the words that it lacks."""
    words = (re.findall(r"\w+", normalize(text)) for text in texts)
    return [np.array([*(vocabulary.setdefault(word, len(vocabulary)) for word in text), -1])
            for text in words]


def check_tokenizer(tokenizer: Any, training: Iterable[str], held_out: Iterable[str]) -> Report:
    """Check that a tokenizer trained in this run was trained on training text alone.

    Every token of two characters or more that held-out text uses must occur in training text.
    """

    def ids_of(texts: Iterable[str]) -> set[int]:
        rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return {i for ids in rows for i in ids}

    used = ids_of(held_out) - set(tokenizer.all_special_ids)
    tokens, text = [tokenizer.decode([i]) for i in used - ids_of(training)], "\n".join(training)
    unknown = sorted(token for token in tokens
                     if len(token) > 1 and "\ufffd" not in token and token not in text)
    numbers = {"unknown to training text": unknown}
    if not unknown:
        summary = "every token of the held-out text could be learned from the training text."
        return Report("tokenizer", True, summary, numbers=numbers)
    summary = (f"{len(unknown)} tokens occur in held-out text but not in training text "
               f"({', '.join(map(repr, unknown[:4]))}): the tokenizer was trained on both.")
    return Report("tokenizer", False, summary, [], "tokenizer saw held-out text", numbers)
