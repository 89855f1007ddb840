"""The tokens of a run, and the batch of each step.

Shapes: B batch_size, T sequence_length, W windows. A window is T inputs and the last one's target.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmlib.config import RunConfig

SPLIT = 2**32 - 1  # in place of an epoch, for the permutation that splits overlapping windows


@dataclass(frozen=True)
class TokenStore:
    """The memory-mapped tokens of a run's training and validation splits."""
    config: RunConfig
    folder: Path
    train: np.ndarray  # (tokens,) uint8, uint16 or uint32
    validation: np.ndarray
    tokenizer: Any
    info: dict[str, Any]  # store.json: size of each split, SHA-256 of every file

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: `config.vocab_size`, or the tokenizer's size."""
        return self.config.vocab_size or len(self.tokenizer)

    def describe(self) -> str:
        """Describe the two splits in a few lines."""
        lines = [f"{self.config.corpus}, tokenized with a vocabulary of {len(self.tokenizer):,}"]
        for name, split in (("training", "training"), ("validation", "held-out")):
            count = self.info[split]
            lines.append(f"{name:>10}: {count['documents']:>9,} documents "
                         f"{count['bytes']:>15,} bytes {count['tokens']:>13,} tokens")
        return "\n".join([*lines, f"{self.info['held_out_share']:.1%} of the tokens: validation"])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of update `step` (1, 2, ...): (B, T), (B, T) int64."""
        starts = self.starts(self.window_indices(step))
        rows = windows(self.train, starts, self.config.sequence_length)  # (B, T + 1)
        return rows[:, :-1], rows[:, 1:]

    def window_indices(self, step: int) -> np.ndarray:
        """Return which training windows are in the batch of `step`: (B,)."""
        # A function of (seed, step) alone: training resumes at any step without other state. Each
        # epoch visits every window once, in an order of its own.
        c, count = self.config, self.window_count()
        draws = np.arange((step - 1) * c.batch_size, step * c.batch_size)
        epochs, draws = np.divmod(draws, count)  # a batch may cross the end of an epoch
        return np.concatenate([permute(draws[epochs == epoch], count, c.seed, epoch)
                               for epoch in np.unique(epochs)])

    def validation_windows(self) -> Tensor:
        """Return the windows of every evaluation, sampled once by the seed: (W, T + 1) int64."""
        c, count = self.config, self.window_count(held_out=True)
        indices = permute(np.arange(min(c.validation_windows, count)), count, c.seed, 0)
        return windows(self.validation, sorted(self.starts(indices, True)), c.sequence_length)

    def texts(self, held_out: bool) -> list[str]:
        """Decode the documents of a split; with `split: windows` both splits hold them all."""
        tokens = np.asarray(self.validation if held_out else self.train)
        end = self.tokenizer.eos_token_id
        documents = np.split(tokens, np.flatnonzero(tokens == end) + 1)
        return [self.tokenizer.decode(ids[ids != end].tolist()) for ids in documents if len(ids)]

    def window_count(self, held_out: bool = False) -> int:
        """Count the windows of a split."""
        c = self.config
        if c.split == "documents":
            return window_count(self.validation if held_out else self.train, c.sequence_length)
        count = max(0, len(self.train) - c.sequence_length)  # overlapping: one starts at each token
        validation = round(count * c.validation_fraction)
        return validation if held_out else count - validation

    def starts(self, indices: np.ndarray, held_out: bool = False) -> np.ndarray:
        """Return the first token of each window: (W,) -> (W,)."""
        c, training = self.config, self.window_count()
        if c.split == "documents":
            return indices * c.sequence_length
        # A permutation assigns the overlapping windows to the splits at random.
        indices = indices + training if held_out else indices
        return permute(indices, training + self.window_count(held_out=True), c.seed, SPLIT)


def window_count(tokens: np.ndarray, sequence_length: int) -> int:
    """Count the whole windows in `tokens`, the last one's last target included."""
    return max(0, (len(tokens) - 1) // sequence_length)


def windows(tokens: np.ndarray, starts: Iterable[int], sequence_length: int) -> Tensor:
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
