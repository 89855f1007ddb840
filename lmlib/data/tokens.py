"""The tokens of a run, and the batch of each step.

Shapes: B batch_size, T sequence_length, W windows. A window is T inputs and the last one's target.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmlib.config import RunConfig
from lmlib.data.tokenizer import load_tokenizer
from lmlib.data.verify import DOCUMENTS, SPLITS, STREAMS, verify_later
from lmlib.errors import UserError
from lmlib.files import read_json

SPLIT = 2**32 - 1  # in place of an epoch, for the permutation that splits overlapping windows


@dataclass(frozen=True)
class EvaluationText:
    """The windows that score a model, and whose text they are: W windows of T targets."""
    split: str  # "validation" or "test"
    windows: Tensor  # (W, T + 1) int64
    starts: np.ndarray  # (W,) the first token of each in the split's stream
    documents: Tensor  # (W, T) the number of each target's document in the split
    units: list[str]  # (documents,) the key of each document's statistical unit
    unit: str  # what they are: "documents", "files" or "tenths of one file"
    data: str  # hash of the split's token stream

    @classmethod
    def cut(cls, split: str, tokens: np.ndarray, lengths: Iterable[int], units: list[str], *,
            windows: int, sequence_length: int, starts: np.ndarray | None = None, unit: str,
            data: str) -> "EvaluationText":
        """Cut up to so many windows from a token stream, at equal distances or at `starts`.

        `lengths` and `units` are those of the stream's documents.
        """
        if starts is None:
            number = min(windows, window_count(tokens, sequence_length))
            starts = np.arange(number) * ((len(tokens) - 1) // max(1, number))
        ends = np.cumsum(lengths)  # of the documents
        targets = starts[:, None] + 1 + np.arange(sequence_length)  # (W, T)
        documents = torch.from_numpy(np.searchsorted(ends, targets, side="right"))
        return cls(split, cut_windows(tokens, starts, sequence_length), starts, documents, units,
                   unit, data)


@dataclass(frozen=True)
class TokenStore:
    """The memory-mapped tokens of a run's splits."""
    config: RunConfig
    folder: Path
    train: np.ndarray  # (tokens,) uint8, uint16 or uint32
    validation: np.ndarray
    test: np.ndarray
    tokenizer: Any
    info: dict[str, Any]  # store.json: counts and hashes of each split, SHA-256 of other files
    verification: Future | None  # of a large store: the name of a changed file, or ""

    @classmethod
    def open(cls, config: RunConfig, folder: Path) -> "TokenStore":
        """Open the store in a folder that `verify.damage` finds intact."""
        info = read_json(folder / "store.json")
        # An empty file cannot be memory-mapped.
        train, validation, test = (
            np.memmap(folder / name, info["dtype"], "r") if info[split]["tokens"] else
            np.empty(0, info["dtype"]) for split, name in STREAMS.items())
        return cls(config, folder, train, train if config.split == "windows" else validation, test,
                   load_tokenizer(str(folder)), info, verify_later(folder, info))

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: `config.vocab_size`, or the tokenizer's size."""
        return self.config.vocab_size or len(self.tokenizer)

    def wait_until_verified(self):
        """Raise a ValueError if the files are not what was written; see `verify_later`."""
        if self.verification is not None and (changed := self.verification.result()):
            raise UserError(f"The token cache {self.folder} is damaged ({changed}), so nothing "
                            "that was trained on it is saved. Run the same command again: what is "
                            "damaged is built again, and a run resumes from its last checkpoint.")

    def describe(self) -> str:
        """Describe the splits in a few lines."""
        lines = [f"{self.config.corpus}, tokenized with a vocabulary of {len(self.tokenizer):,}"]
        for split in SPLITS:
            count = self.info[split]
            if count["tokens"]:
                lines.append(f"{split:>10}: {count['documents']:>9,} documents "
                             f"{count['bytes']:>15,} bytes {count['tokens']:>13,} tokens")
        return "\n".join([*lines, f"{self.info['held_out_share']:.1%} of the tokens: held out"])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of update `step` (1, 2, ...): (B, T), (B, T) int64."""
        starts = self.starts(self.window_indices(step))
        rows = cut_windows(self.train, starts, self.config.sequence_length)  # (B, T + 1)
        return rows[:, :-1], rows[:, 1:]

    def window_indices(self, step: int) -> np.ndarray:
        """Return which training windows are in the batch of `step`: (B,)."""
        # A function of (seed, step) alone: training resumes at any step without other state. Each
        # epoch visits every window once, in an order of its own.
        c, count = self.config, self.window_count("training")
        draws = np.arange((step - 1) * c.batch_size, step * c.batch_size)
        epochs, draws = np.divmod(draws, count)  # a batch may cross the end of an epoch
        return np.concatenate([permute(draws[epochs == epoch], count, c.seed, epoch)
                               for epoch in np.unique(epochs)])

    def evaluation_text(self, split: str) -> EvaluationText:
        """Return the windows of every evaluation on "validation" or "test".

        They lie at equal distances in the split's tokens, whatever the seed and the model.
        """
        c, rows, starts = self.config, self.documents(split), None
        if c.split == "windows":  # of the overlapping windows, at random places, every n-th
            count = self.window_count(split)
            number = min(c.validation_windows, count)
            starts = np.sort(self.starts(np.arange(number) * count // number, held_out=True))
        return EvaluationText.cut(
            split, self.test if split == "test" else self.validation, rows[:, 2],
            [f"{key:016x}" for key in rows[:, 1].tolist()], windows=c.validation_windows,
            sequence_length=c.sequence_length, starts=starts, unit=self.info["unit"],
            data=self.info["training" if c.split == "windows" else split]["hash"])

    def validation_windows(self) -> Tensor:
        """Return the windows of every evaluation: (W, T + 1) int64."""
        return self.evaluation_text("validation").windows

    def documents(self, split: str) -> np.ndarray:
        """Return what is known of documents: uint64.

        Of training: (documents,), their sorted hashes. Of a held-out split: (documents, 3), the
        hash, the key of the statistical unit, and the number of tokens.
        """
        file = self.folder / DOCUMENTS[split]
        found = np.memmap(file, "<u8", "r") if file.stat().st_size else np.empty(0, "<u8")
        return found if split == "training" else found.reshape(-1, 3)

    def texts(self, split: str) -> Iterator[str]:
        """Decode the documents of a split; with `split: windows`, of the whole text."""
        tokens = {"training": self.train, "validation": self.validation, "test": self.test}[split]
        end, start = self.tokenizer.eos_token_id, 0
        for stop in [*(np.flatnonzero(tokens == end) + 1).tolist(), len(tokens)]:
            ids = np.asarray(tokens[start:stop])
            if len(ids):
                yield self.tokenizer.decode(ids[ids != end].tolist())
            start = stop

    def window_count(self, split: str) -> int:
        """Count the windows of a split."""
        c = self.config
        if c.split == "documents":
            tokens = {"training": self.train, "validation": self.validation, "test": self.test}
            return window_count(tokens[split], c.sequence_length)
        count = max(0, len(self.train) - c.sequence_length)  # overlapping: one starts at each token
        validation = round(count * c.validation_fraction)
        return {"training": count - validation, "validation": validation, "test": 0}[split]

    def starts(self, indices: np.ndarray, held_out: bool = False) -> np.ndarray:
        """Return the first token of each training (or validation) window: (W,) -> (W,)."""
        c, training = self.config, self.window_count("training")
        if c.split == "documents":
            return indices * c.sequence_length
        # A permutation assigns the overlapping windows to the splits at random.
        indices = indices + training if held_out else indices
        return permute(indices, training + self.window_count("validation"), c.seed, SPLIT)


def window_count(tokens: np.ndarray, sequence_length: int) -> int:
    """Count the whole windows in `tokens`, the last one's last target included."""
    return max(0, (len(tokens) - 1) // sequence_length)


def cut_windows(tokens: np.ndarray, starts: Iterable[int], sequence_length: int) -> Tensor:
    """Return the windows that start at these tokens: (W, T + 1) int64."""
    rows = [tokens[start : start + sequence_length + 1] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Map indices through the pseudorandom permutation of range(size) for (seed, epoch): (n,)."""
    # A Feistel network permutes the next power of four; values outside the range are mapped again
    # until they fall inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). So
    # no table is needed, and any step costs the same.
    bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(bits)) - 1)
    keys = np.random.SeedSequence([seed, int(epoch)]).generate_state(8, np.uint64)
    values, outside = index.astype(np.uint64), np.ones(len(index), dtype=bool)
    while outside.any():
        left, right = values[outside] >> bits, values[outside] & mask
        for key in keys:  # the rounds mix by multiplying and folding, as splitmix64 does
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(29))) & mask)
        values[outside] = (left << bits) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)
