"""What is in a token store: sizes, lengths, duplicates, samples. Shapes: D documents."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lmlib.data.tokens import TokenStore, window_count
from lmlib.data.verify import SPLITS

CHUNK = 2**24  # tokens that are looked at together, which bounds the memory


@dataclass(frozen=True)
class SplitSummary:
    """A split's size, and the lengths of its documents."""
    name: str
    documents: int
    bytes: int
    tokens: int
    windows: int
    duplicates: int  # documents whose normalized text an earlier one has
    lengths: dict[str, int]  # of documents, in tokens: "least", "10 %", "median", "90 %", "most"


def summarize(store: TokenStore) -> list[SplitSummary]:
    """Summarize every split that has tokens; reads all of them once."""
    streams = {"training": store.train, "validation": store.validation, "test": store.test}
    found = []
    for name in SPLITS:
        counts = store.info[name]
        if not counts["tokens"]:
            continue
        lengths = np.fromiter(document_lengths(streams[name], store.tokenizer.eos_token_id), int)
        places = np.quantile(lengths, (0, 0.1, 0.5, 0.9, 1), method="nearest").tolist()
        hashes = store.documents(name)
        unique = len(hashes) if name == "training" else len(np.unique(hashes[:, 0]))
        found.append(SplitSummary(
            name, counts["documents"], counts["bytes"], counts["tokens"],
            window_count(streams[name], store.config.sequence_length),
            counts["documents"] - unique,
            dict(zip(("least", "10 %", "median", "90 %", "most"), places, strict=True))))
    return found


def document_lengths(tokens: np.ndarray, end: int) -> Iterator[int]:
    """Yield the length of each document in a stream (tokens,), its end-of-text token included."""
    start = 0
    for offset in range(0, len(tokens), CHUNK):
        for place in (np.flatnonzero(tokens[offset : offset + CHUNK] == end) + offset).tolist():
            yield place + 1 - start
            start = place + 1
    if start < len(tokens):
        yield len(tokens) - start  # cut short by max_tokens


def samples(store: TokenStore, count: int = 3, length: int = 60) -> list[str]:
    """Return the beginnings of training documents at equal distances in the stream."""
    end, found = store.tokenizer.eos_token_id, {}
    for place in range(0, len(store.train), max(1, len(store.train) // count + 1)):
        ends = np.flatnonzero(store.train[place : place + CHUNK] == end)
        begin = place + int(ends[0]) + 1 if place and len(ends) else place
        ids = np.asarray(store.train[begin : begin + length])
        stops = np.flatnonzero(ids == end)
        ids = ids[: stops[0]] if len(stops) else ids
        if len(ids):
            found[begin] = store.tokenizer.decode(ids.tolist())
    return list(found.values())
