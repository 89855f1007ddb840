"""Text shared across the split, and the tokenizer."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmlib.audit.report import Report
from lmlib.text import normalize

NGRAM = 13  # words or tokens in a row that two texts do not share by chance (GPT-3, arXiv:2005.14165, appendix C)


NEAR = 0.5  # share of a document's n-grams that makes it a near duplicate


SHARED = 0.2  # share of the held-out text that may stand in training text: set phrases, stage directions, licences


def check_split(training: Iterable[str], held_out: Iterable[str], n: int = NGRAM) -> Report:
    """Whether held-out documents are new: no document on both sides, exactly or but for case, spacing and Unicode's forms,
    none of which half the runs of `n` words stand in training text, and at most SHARED of all its words.

    Raises:
        ValueError: a side has no document.
    """
    training, held_out = list(training), list(held_out)
    if not training or not held_out:
        raise ValueError("check_split needs documents on both sides.")
    exact, seen = set(training), {normalize(text) for text in training}
    copies = [number for number, text in enumerate(held_out) if text in exact]
    same = [number for number, text in enumerate(held_out) if text not in exact and normalize(text) in seen]
    vocabulary: dict[str, int] = {}
    words = [_words(text, vocabulary) for text in held_out]
    left, right = (_joined(side) for side in ((_words(text, vocabulary) for text in training), words))
    shared = shared_tokens(left, right, n)
    ends = np.cumsum([len(part) + 1 for part in words])
    shares = [float(part[:-1].mean()) if len(part) > 1 else 0.0 for part in np.split(shared, ends[:-1])]
    near = [number for number, share in enumerate(shares) if share >= NEAR and number not in {*copies, *same}]
    share = float(shared.sum() / max(1, len(right) - len(held_out)))
    numbers = {"copies": copies, "same but for form": same, "near duplicates": near, "share of words": share, "shares": shares}
    found = [
        f"{len(part)} of {len(held_out)} held-out documents {what}"
        for part, what in (
            (copies, "stand in the training text as they are"),
            (same, "stand there but for case, spacing or Unicode's forms"),
            (near, f"share half their runs of {n} words or more with it"),
        )
        if part
    ]
    names = [name for name, part in (("duplicates", copies + same), ("near duplicates", near)) if part]
    words_shared = f"{share:.2%} of the held-out words stand in a run of {n} that training text has too"
    if found or share > SHARED:
        return Report("split", False, f"{'; '.join([*found, words_shared])}.", [], " and ".join(names) or "shared text", numbers)
    return Report("split", True, f"no held-out document is in the training text; {words_shared}.", [], "", numbers)


def check_windows(training: np.ndarray, windows: Tensor, n: int = NGRAM) -> Report:
    """The same for the windows of an evaluation, as tokens: which of them stand in training text, run by run.

    Args:
        training: the tokens of the training side, (tokens,).
        windows: whole held-out windows (W, T + 1).
    """
    if windows.shape[1] < n:
        return Report("split", None, f"windows of {windows.shape[1]} tokens are too short to tell: no run of {n} fits.")
    shared = shared_windows(training, windows, n)
    of_window = shared.double().mean(1)
    share, most = float(of_window.mean()), int((of_window >= NEAR).sum())
    numbers = {"share of tokens": share, "windows mostly shared": most}
    words = f"{share:.2%} of the held-out tokens stand in a run of {n} tokens that training text has too"
    if share > SHARED:
        what = "the score measures memory" if share > 0.9 else "part of the score may be memory"
        words += f"; {most} of {len(windows)} windows for the most part: {what}."
        name = "overlapping windows" if share > 0.9 else "shared text"
        return Report("split", False, words, [], name, numbers)
    return Report("split", True, words + ".", [], "", numbers)


def shared_windows(training: np.ndarray, windows: Tensor, n: int = NGRAM) -> Tensor:
    """Which tokens of windows (W, T + 1) stand in a run of `n` tokens that the training side has: (W, T + 1), bool."""
    rows = windows.numpy().astype(np.int64)
    return torch.from_numpy(np.stack(list(_shared_rows(training, rows, n))))


def shared_tokens(training: np.ndarray, held_out: np.ndarray, n: int = NGRAM) -> np.ndarray:
    """Which of the held-out tokens stand in a run of `n` that occurs in training too: (tokens,), bool. Negative tokens stand
    between documents and belong to no run."""
    return next(_shared_rows(training, held_out[None], n))


def _shared_rows(training: np.ndarray, rows: np.ndarray, n: int, chunk: int = 4_000_000) -> Iterable[np.ndarray]:
    hashes = [_ngrams(row, n) for row in rows]
    wanted = np.unique(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)
    likely = np.zeros(2**20, dtype=bool)  # most n-grams of the training side are told apart by these bits alone
    likely[(wanted >> np.uint64(44)).astype(np.int64)] = True
    found = []
    for start in range(0, len(training), chunk):
        present = _ngrams(np.asarray(training[start : start + chunk + n - 1]).astype(np.int64), n)
        present = present[likely[(present >> np.uint64(44)).astype(np.int64)]]
        found.append(np.unique(present[np.isin(present, wanted)]))
    known = np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)
    for row, grams in zip(rows, hashes, strict=True):
        starts = np.isin(grams, known) & _whole(row, n)
        covered = np.zeros(len(row), dtype=np.int64)  # +1 where a shared run begins, -1 behind its end
        covered[: len(starts)] += starts
        covered[n:] -= starts[: len(row) - n]
        yield np.cumsum(covered) > 0


def _ngrams(tokens: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of the `n` tokens that begin at each place, a polynomial of them: (tokens - n + 1,) uint64. Runs of 1, 2,
    4, ... tokens are hashed from those of half their length, and put together as the binary digits of `n` say."""
    size, prime = len(tokens) - n + 1, 0x9E3779B97F4A7C15
    if size < 1:
        return np.empty(0, np.uint64)
    part, length, covered = tokens.astype(np.uint64) + np.uint64(1), 1, 0
    total = np.zeros(size, np.uint64)
    while length <= n:
        if n & length:
            total = total * np.uint64(pow(prime, length, 2**64)) + part[covered : covered + size]
            covered += length
        part, length = part[:-length] * np.uint64(pow(prime, length, 2**64)) + part[length:], 2 * length
    total = (total ^ (total >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # mixed as splitmix64 does
    return total ^ (total >> np.uint64(27))


def _whole(tokens: np.ndarray, n: int) -> np.ndarray:
    """At which places `n` tokens begin of which none is negative."""
    if len(tokens) < n:
        return np.empty(0, dtype=bool)
    ends = np.concatenate([[0], np.cumsum(tokens < 0)])
    return ends[n:] == ends[:-n]


def _words(text: str, vocabulary: dict[str, int]) -> np.ndarray:
    """The numbers of a text's words, punctuation and case left out."""
    words = re.findall(r"\w+", normalize(text))
    return np.array([vocabulary.setdefault(word, len(vocabulary)) for word in words], dtype=np.int64)


def _joined(documents: Iterable[np.ndarray]) -> np.ndarray:
    parts = [part for document in documents for part in (document, np.array([-1]))]
    return np.concatenate(parts)


def check_tokenizer(tokenizer: Any, training: Iterable[str], held_out: Iterable[str]) -> Report:
    """Whether a tokenizer that was trained here knows only training text: every token that held-out text uses and that stands
    for two characters or more must occur in the training text, from which alone it could have been learnt."""
    plain = set(tokenizer.all_special_ids)
    used = {i for ids in tokenizer(list(held_out), add_special_tokens=False)["input_ids"] for i in ids} - plain
    in_training = {i for ids in tokenizer(list(training), add_special_tokens=False)["input_ids"] for i in ids}
    texts = {i: tokenizer.decode([i]) for i in used - in_training}
    whole = "\n".join(training)
    unknown = sorted(text for text in texts.values() if len(text) > 1 and "\ufffd" not in text and text not in whole)
    numbers = {"unknown to training text": unknown}
    if unknown:
        words = (
            f"{len(unknown)} tokens occur in held-out text and nowhere in training text ({', '.join(map(repr, unknown[:4]))}): "
        )
        return Report("tokenizer", False, words + "it was trained on both.", [], "tokenizer saw held-out text", numbers)
    words = "every token that held-out text uses could have been learnt from training text."
    return Report("tokenizer", True, words, [], "", numbers)
