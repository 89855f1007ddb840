"""Contamination: held-out text that also occurs in training text, or that the tokenizer knows."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmlib.audit.report import Report
from lmlib.errors import UserError
from lmlib.text import normalize

NGRAM = 13  # words or tokens; a shorter run recurs by coincidence (arXiv:2005.14165, appendix C)
NEAR = 0.5  # a document that shares this share of its words, in n-grams, is a near duplicate
# Share of held-out text, in n-grams, that set phrases, licenses and stage directions may explain.
# Of five of Shakespeare's plays, the others have 0.01 % of the tokens: at most 0.06 % in 40 draws.
SHARED = 0.05
COPIES = 0.01  # share of held-out documents that may be exact copies, such as empty forms
# Scripts that write no spaces between words: Thai, Lao, Myanmar, Khmer, kana, bopomofo, Han.
SPACELESS = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u312f\u31f0-\u31ff\u3400-\u4dbf"
             "\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\U00020000-\U0003ffff")
BATCH, GROUP = 2**18, 2**20  # characters of text that are tokenized, and searched, at once


def check_split(training: Iterable[str], held_out: Iterable[str], n: int = NGRAM) -> Report:
    """Check that no held-out document is a copy or near duplicate of training text."""
    # Case, spacing and Unicode's compatibility forms are ignored. A near duplicate shares half of
    # its words, in runs of n, with training text; of all held-out words, SHARED may be shared.
    training, held_out = list(training), list(held_out)
    if not training or not held_out:
        raise UserError("check_split needs training and held-out documents; one list is empty.")
    normalized, N = [normalize(text) for text in training + held_out], len(training)
    exact, forms = set(training), set(normalized[:N])
    duplicates = [i for i, text in enumerate(normalized[N:]) if text in forms]
    copies = [i for i in duplicates if held_out[i] in exact]
    same = [i for i in duplicates if held_out[i] not in exact]
    vocabulary: dict[str, int] = {}
    ids = [np.array([*(vocabulary.setdefault(word, len(vocabulary))
                       for word in words(text)), -1]) for text in normalized]
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


def words(text: str) -> list[str]:
    """Split text into words; in scripts without spaces, each character is one."""
    return re.findall(rf"[{SPACELESS}]|[^\W{SPACELESS}]+", text)


def check_windows(training: np.ndarray, windows: Tensor, n: int = NGRAM) -> Report:
    """Check that held-out windows (W, T + 1) do not occur in the training tokens (tokens,)."""
    if windows.shape[1] < n:
        summary = (f"windows of {windows.shape[1]} tokens have no runs of {n}; check_tokens also "
                   "reads the tokens around them.")
        return Report("split", None, summary)
    return _report_shared(shared_windows(training, windows, n), n)


def check_tokens(training: np.ndarray, held_out: np.ndarray, starts: np.ndarray, length: int,
                 n: int = NGRAM) -> Report:
    """Check that the scored tokens of held-out windows are not in runs that training tokens have.

    The windows, of `length` tokens each, begin at `starts` (W,) of the token stream `held_out`. All
    of their tokens but the first are scored. Runs may extend beyond a window, so windows shorter
    than n are judged too.
    """
    if len(held_out) < n or not len(starts):
        summary = f"{len(starts)} windows in {len(held_out)} held-out tokens have no runs of {n}."
        return Report("split", None, summary)
    return _report_shared(shared_spans(training, held_out, starts, length, n)[:, 1:], n)


def _report_shared(shared: Tensor, n: int) -> Report:
    """Judge which tokens of windows (W, tokens) are in runs of `n` that training text has."""
    shares = shared.double().mean(1)
    share, most = float(shares.mean()), int((shares >= NEAR).sum())
    numbers = {"share of tokens": share, "windows mostly shared": most}
    summary = f"{share:.2%} of the held-out tokens are in runs of {n} that training text has"
    if share <= SHARED:
        return Report("split", True, f"{summary}.", numbers=numbers)
    fault, meaning = (("overlapping windows", "the score measures memorization") if share > 0.9
                      else ("shared text", "memorizing may explain part of the score"))
    summary += (f", more than the {SHARED:.0%} that set phrases may explain; {most} of "
                f"{len(shared)} windows are mostly shared: {meaning}.")
    return Report("split", False, summary, [], fault, numbers)


def shared_windows(training: np.ndarray, windows: Tensor, n: int = NGRAM) -> Tensor:
    """Return which tokens of windows (W, T + 1) are in runs of `n` that training contains, bool."""
    rows = np.pad(windows.numpy().astype(np.int64), ((0, 0), (0, 1)), constant_values=-1)
    shared = shared_tokens(training, rows.ravel(), n).reshape(rows.shape)
    return torch.from_numpy(shared[:, :-1])


def shared_spans(training: np.ndarray, held_out: np.ndarray, starts: np.ndarray, length: int,
                 n: int = NGRAM) -> Tensor:
    """Return `shared_windows` of windows in a stream, whose runs may extend beyond them."""
    # Each window is read with the n - 1 tokens on each side; -1 stands beyond the stream's ends.
    places = np.asarray(starts)[:, None] + np.arange(1 - n, length + n - 1)
    outside = (places < 0) | (places >= len(held_out))
    rows = np.where(outside, -1, held_out[places.clip(0, len(held_out) - 1)].astype(np.int64))
    return shared_windows(training, torch.from_numpy(rows), n)[:, n - 1 : n - 1 + length]


def shared_tokens(training: np.ndarray, held_out: np.ndarray, n: int = NGRAM) -> np.ndarray:
    """Return which held-out tokens are in runs of `n` that training contains: (tokens,), bool."""
    # Negative tokens separate documents and are in no run.
    grams, chunk = _ngrams(held_out, n), 4_000_000
    wanted, of_gram = np.unique(grams, return_inverse=True)
    found = np.zeros(len(wanted), dtype=bool)
    # A table of the hashes' top 20 bits rules out most training n-grams before the search.
    likely = np.zeros(2**20, dtype=bool)
    likely[wanted >> np.uint64(44)] = True
    for start in range(0, len(training), chunk):
        present = _ngrams(np.asarray(training[start : start + chunk + n - 1]).astype(np.int64), n)
        present = present[likely[present >> np.uint64(44)]]
        places = np.searchsorted(wanted, present).clip(max=len(wanted) - 1)
        found[places[wanted[places] == present]] = True
    separators = np.cumsum(np.append(0, held_out < 0))  # before each place
    starts = found[of_gram] & (separators[n:] == separators[:-n])
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


def check_lineage(trained: np.ndarray, held_out: np.ndarray, complete: bool = True) -> Report:
    """Check that no held-out document is one that the model or an ancestor was trained on.

    Args:
        trained: the 64-bit hashes of all documents that they were trained on, sorted, uint64.
        held_out: those of the held-out documents, in any order, uint64.
        complete: whether every ancestor recorded its documents.
    """
    M, N = len(trained), len(held_out)
    if not N:
        return Report("lineage", None, "there are no held-out documents.")
    places = np.searchsorted(trained, held_out)
    known = places < M
    found = int((trained[places[known]] == held_out[known]).sum()) if M else 0
    numbers = {"trained on": M, "held out": N, "found": found, "complete": complete}
    among = (f"{found or 'none'} of the {N:,} held-out documents {'is' if found < 2 else 'are'} "
             f"among the {M:,} that it or an ancestor trained on")
    if found / N > COPIES:
        summary = (f"{among} ({found / N:.2%}, more than the {COPIES:.0%} that forms and other "
                   "boilerplate may explain).")
        return Report("lineage", False, summary, [], "held-out documents were trained on", numbers)
    if not complete:
        known = "none is held out" if not found else among
        summary = ("lineage unknown: an ancestor did not record the documents that it trained on; "
                   f"of the documents known, {known}.")
        return Report("lineage", None, summary, numbers=numbers)
    return Report("lineage", True, f"{among}.", numbers=numbers)


def check_tokenizer(tokenizer: Any, training: Iterable[str], held_out: Iterable[str]) -> Report:
    """Check that a tokenizer trained in this run was trained on training text alone."""
    # Every token of two characters or more that held-out text uses must occur in training text.
    # Each text is read once; a group of texts and a set of ids are all that memory holds.
    used = _ids_of(tokenizer, held_out) - set(tokenizer.all_special_ids)
    missing = {i: tokenizer.decode([i]) for i in used}
    missing = {i: token for i, token in missing.items() if len(token) > 1 and "\ufffd" not in token}
    for group in _batches(training, GROUP):
        if not missing:
            break
        seen, text = _ids_of(tokenizer, group), "\n".join(group)
        missing = {i: token for i, token in missing.items() if i not in seen and token not in text}
    unknown = sorted(missing.values())
    numbers = {"unknown to training text": unknown}
    if not unknown:
        summary = "every token of the held-out text could be learned from the training text."
        return Report("tokenizer", True, summary, numbers=numbers)
    summary = (f"{len(unknown)} tokens occur in held-out text but not in training text "
               f"({', '.join(map(repr, unknown[:4]))}): the tokenizer was trained on both.")
    return Report("tokenizer", False, summary, [], "tokenizer saw held-out text", numbers)


def _ids_of(tokenizer: Any, texts: Iterable[str]) -> set[int]:
    """Return the ids of all tokens in the texts."""
    ids: set[int] = set()
    for batch in _batches(texts, BATCH):
        ids.update(*tokenizer(batch, add_special_tokens=False)["input_ids"])
    return ids


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Group texts into lists of at least `size` characters, except for the last."""
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
