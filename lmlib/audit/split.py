"""Contamination: held-out text that also occurs in training text, or that the tokenizer knows."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmlib.audit.report import Report
from lmlib.text import normalize

NGRAM = 13  # words or tokens; a shorter run recurs by coincidence (arXiv:2005.14165, appendix C)
NEAR = 0.5  # a document that shares this share of its words, in n-grams, is a near duplicate
SHARED = 0.05  # share of held-out text that set phrases, stage directions and licenses may explain


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
                       for word in re.findall(r"\w+", text)), -1]) for text in normalized]
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


def check_lineage(trained, held_out, complete):
    found = np.isin(held_out, trained)
    share = float(found.mean()) if len(held_out) else 0.0
    numbers = {"share": share}
    if share > 0.01:
        return Report("lineage", False, f"{found.sum()} of {len(held_out)} held-out documents were trained on.", numbers=numbers)
    if not complete:
        return Report("lineage", None, "lineage unknown", numbers=numbers)
    return Report("lineage", True, "none", numbers=numbers)


def check_windows(training: np.ndarray, windows: Tensor, n: int = NGRAM, context=None, starts=None) -> Report:
    """Check that held-out windows (W, T + 1) do not occur in the training tokens (tokens,)."""
    if windows.shape[1] < n:
        return Report("split", None, f"windows of {windows.shape[1]} tokens have no runs of {n}.")
    shares = shared_windows(training, windows, n).double().mean(1)
    share, most = float(shares.mean()), int((shares >= NEAR).sum())
    numbers = {"share of tokens": share, "windows mostly shared": most}
    summary = f"{share:.2%} of the held-out tokens are in runs of {n} that training text has"
    if share <= SHARED:
        return Report("split", True, f"{summary}.", numbers=numbers)
    fault, meaning = (("overlapping windows", "the score measures memorization") if share > 0.9
                      else ("shared text", "memorizing may explain part of the score"))
    summary += f"; {most} of {len(windows)} windows are mostly shared: {meaning}."
    return Report("split", False, summary, [], fault, numbers)


def shared_windows(training: np.ndarray, windows: Tensor, n: int = NGRAM) -> Tensor:
    """Return which tokens of windows (W, T + 1) are in runs of `n` that training contains, bool."""
    rows = np.pad(windows.numpy().astype(np.int64), ((0, 0), (0, 1)), constant_values=-1)
    shared = shared_tokens(training, rows.ravel(), n).reshape(rows.shape)
    return torch.from_numpy(shared[:, :-1])


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
    """Check that a tokenizer trained in this run was trained on training text alone."""
    # Every token of two characters or more that held-out text uses must occur in training text.
    def ids_of(texts: Iterable[str]) -> set[int]:
        return set().union(*tokenizer(list(texts), add_special_tokens=False)["input_ids"])

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
