"""The token store of a run, and batch(step)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmlib.config import RunConfig

SPLIT = 2**32 - 1  # no epoch's number


@dataclass(frozen=True)
class TokenStore:
    """The tokens of a run, memory-mapped, and how to draw from them.

    `info` is store.json: counts of tokens, documents and bytes on each side, and the sha256 of every file.
    """

    config: RunConfig
    folder: Path
    train: np.ndarray  # (tokens,) uint8, uint16 or uint32
    validation: np.ndarray
    tokenizer: Any
    info: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Embedding rows: what was asked, or the tokenizer's size."""
        return self.config.vocab_size or len(self.tokenizer)

    def describe(self) -> str:
        """The two sides in a few lines of text."""
        lines = [f"{self.config.corpus}, in tokens of a vocabulary of {len(self.tokenizer):,}"]
        for side in ("training", "held-out"):
            count = self.info[side]
            lines.append(
                f"{side:>9}: {count['documents']:>9,} documents {count['bytes']:>15,} bytes {count['tokens']:>13,} tokens"
            )
        return "\n".join([*lines, f"{self.info['held_out_share']:.1%} of the tokens are held out."])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of update `step` (1, 2, ...): two (batch_size, sequence_length) int64.

        Each epoch takes every window once, in an order that (seed, epoch) decides; the cost does not grow with
        the step, so resuming at any step needs no other state.
        """
        rows = windows(self.train, self.starts(self.window_indices(step)), self.config.sequence_length)
        return rows[:, :-1], rows[:, 1:]

    def window_indices(self, step: int) -> np.ndarray:
        """The numbers of the windows in that batch: (batch_size,)."""
        c = self.config
        count = self.window_count()
        epochs, draws = np.divmod(np.arange((step - 1) * c.batch_size, step * c.batch_size), count)
        return np.concatenate([permute(draws[epochs == e], count, c.seed, e) for e in np.unique(epochs)])

    def validation_windows(self) -> Tensor:
        """The held-out windows of every evaluation, drawn once by the seed: (W, sequence_length + 1) int64."""
        c = self.config
        count = self.window_count(held_out=True)
        drawn = permute(np.arange(min(c.validation_windows, count)), count, c.seed, 0)
        return windows(self.validation, sorted(self.starts(drawn, held_out=True)), c.sequence_length)

    def texts(self, held_out: bool) -> list[str]:
        """The documents of a side, as text again; with `split: windows` both sides are the same."""
        tokens, end = np.asarray(self.validation if held_out else self.train), self.tokenizer.eos_token_id
        documents = np.split(tokens, np.flatnonzero(tokens == end) + 1)
        return [self.tokenizer.decode(ids[ids != end].tolist()) for ids in documents if len(ids)]

    def window_count(self, held_out: bool = False) -> int:
        """Whole windows on a side."""
        c = self.config
        if c.split == "documents":
            return window_count(self.validation if held_out else self.train, c.sequence_length)
        count = max(0, len(self.train) - c.sequence_length)  # one beginning at each token
        share = round(count * c.validation_fraction)
        return share if held_out else count - share

    def starts(self, numbers: np.ndarray, held_out: bool = False) -> np.ndarray:
        """The tokens at which the windows with these numbers begin; with `split: windows`, any token of the one text, and
        chance alone decides which window is called held out (SPLIT in place of an epoch)."""
        c = self.config
        if c.split == "documents":
            return numbers * c.sequence_length
        training = self.window_count()
        numbers = numbers + training if held_out else numbers
        return permute(numbers, training + self.window_count(held_out=True), c.seed, SPLIT)


def window_count(tokens: np.ndarray, sequence_length: int) -> int:
    """Whole windows in `tokens`; each needs one token more, its last target."""
    return max(0, (len(tokens) - 1) // sequence_length)


def windows(tokens: np.ndarray, starts: Iterable[int], sequence_length: int) -> Tensor:
    """The windows that begin at these tokens: (W, sequence_length + 1) int64."""
    rows = [tokens[start : start + sequence_length + 1] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def permute(index: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(size), fixed by (seed, epoch), takes each index: (n,) -> (n,).

    A Feistel network over the next power of four, walked until the value falls inside the range, costs
    the same for any size and needs no table (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(bits)) - 1)
    keys = np.random.SeedSequence([seed, int(epoch)]).generate_state(8, np.uint64)
    values, outside = index.astype(np.uint64), np.ones(len(index), dtype=bool)
    while outside.any():
        left, right = values[outside] >> bits, values[outside] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # multiply and fold, as splitmix64 does
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(29))) & mask)
        values[outside] = (left << bits) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)
