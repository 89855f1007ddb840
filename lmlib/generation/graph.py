"""Decoding as one CUDA graph: a token takes one launch instead of hundreds.

A graph repeats the same kernels on the same memory, so its cache has a fixed length: every token
attends to all slots, under a mask. Shapes: B prompts, V vocab_size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lmlib.model.attention import Cache
from lmlib.model.transformer import LanguageModel


class FixedCache(Cache):
    """A `Cache` after its prefill, whose number of used slots is a tensor: () int64."""
    def __init__(self, cache: Cache):
        self.memory, self.start = cache.memory, cache.start
        self.used = torch.tensor(cache.used, device=cache.memory.device)

    def append(self, layer: int, new: Tensor) -> Tensor:
        """Store one token, (B, 1, width); returns all slots: (B, slots, width)."""
        self.memory[layer].index_copy_(1, self.used[None], new)
        return self.memory[layer]

    def positions(self, T: int) -> Tensor:
        """Return the next token's position: (1,), or (B, 1) with padding."""
        return self.used[None] if self.start is None else (self.used - self.start)[:, None]

    def mask(self, T: int) -> Tensor:
        """Return which slots the next token may attend to: (B or 1, 1, 1, slots) bool."""
        slots = torch.arange(self.memory.shape[2], device=self.memory.device)
        allowed = (slots <= self.used)[None]
        if self.start is not None:
            allowed = allowed & (slots >= self.start[:, None])
        return allowed[:, None, None]


def fixed_decode(model: LanguageModel, cache: Cache) -> Callable[[Tensor], Tensor]:
    """Return a function from tokens (B,) to the logits (B, V) of the next, captured on CUDA.

    Its result holds until the next call. The model must be dense: experts make the host wait.
    """
    fixed = FixedCache(cache)
    fixed.memory.nan_to_num_()  # unused slots have no weight, but 0 * NaN is NaN
    token = torch.zeros(len(fixed.memory[0]), dtype=torch.int64, device=fixed.memory.device)

    def run() -> Tensor:
        return model.lm_head(model.model(token[:, None], fixed)[:, -1])

    if token.device.type != "cuda":  # the same arithmetic, for tests
        graph, logits = None, None
    else:
        side = torch.cuda.Stream(token.device)
        side.wait_stream(torch.cuda.current_stream(token.device))
        with torch.cuda.stream(side):  # capturing needs a warm-up, which uses slots
            for _ in range(2):
                run()
        torch.cuda.current_stream(token.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        fixed.used.fill_(cache.used)
        with torch.cuda.graph(graph):
            logits = run()
        fixed.used.fill_(cache.used)

    def decode(tokens: Tensor) -> Tensor:
        token.copy_(tokens)
        if graph is None:
            return run()
        graph.replay()
        return logits

    return decode
