"""A small decoder with one planted fault, or with none: then it passes every check.

Shapes: B batch, T positions, C width, H heads, D a head's dimensions.
"""

import types

import torch
import torch.nn.functional as F
from torch import nn

V, C, H, WINDOW = 61, 16, 2, 64


def positions(x: torch.Tensor, begin: int = 0) -> torch.Tensor:
    """Rotate x (B, H, T, D) by its positions, the first of which is `begin`."""
    T, D = x.shape[2:]
    angles = torch.arange(begin, begin + T)[:, None] / 100 ** (torch.arange(0, D, 2) / D)
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Layer(nn.Module):
    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(C), nn.LayerNorm(C), nn.Dropout(0.1)
        if fault == "batch norm":
            self.norm2 = nn.BatchNorm1d(C)
        if fault in ("bidirectional convolution", "fixed convolution"):
            self.conv = nn.Conv1d(C, C, 3, padding=1)
        if fault.startswith("router"):
            self.gate = nn.Linear(C, 2)

    def attention(self, x, past):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if (
            self.fault == "reshape for transpose"
        ):  # viewing (B, T, C) as (B, H, T, D) mixes the positions
            q, k, v = (part.reshape(B, H, T, C // H) for part in (q, k, v))
        else:
            q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in (q, k, v))
        begin = 0 if past is None else past[0].shape[2]
        start = 0 if self.fault == "positions restart in the cache" else begin
        q, k = positions(q, start), positions(k, start)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        S = k.shape[2]
        scores = q @ k.transpose(2, 3) * (C // H) ** -0.5
        seen = torch.ones(T, S, dtype=torch.bool).tril(S - T + (self.fault == "mask off by one"))
        masked = scores.masked_fill(~seen, -torch.inf)
        if self.fault == "no mask" or (
            self.fault == "no mask at times" and self.training and torch.rand(()) < 0.5
        ):
            masked = scores
        if self.fault == "boolean mask added":
            masked = scores + torch.ones(T, S, dtype=torch.bool)
        if self.fault == "no mask in one head":
            masked = torch.cat((masked[:, :1], scores[:, 1:]), dim=1)
        if self.fault == "no mask at a length" and T == 37:
            masked = scores
        mixed = (masked.softmax(-1) @ v).transpose(1, 2)
        return self.out(mixed.reshape(B, T, C)), (k, v)

    def blocks(self, x, n):
        """Add to each position the mean of its block of n; an incomplete last block is left alone."""
        T = x.shape[1] // n * n
        means = (
            x[:, :T].unflatten(1, (-1, n)).mean(2, keepdim=True).expand(-1, -1, n, -1).flatten(1, 2)
        )
        return torch.cat((x[:, :T] + means, x[:, T:]), dim=1)

    def forward(self, x, past=None):
        attended, new = self.attention(self.norm1(x), past)
        x = x + self.dropout(attended)
        across = self.fault == "batch norm"
        h = self.norm2(x.transpose(1, 2)).transpose(1, 2) if across else self.norm2(x)
        match self.fault:
            case "averages over blocks of 16":
                h = self.blocks(h, 16)
            case "averages over blocks of 4":
                h = self.blocks(h, 4)
            case "bidirectional convolution":
                h = h + self.conv(h.transpose(1, 2)).transpose(1, 2)
            case "Fourier mixing":
                h = h + torch.fft.fft(h, dim=1).real
            case "normalized over time":
                h = (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True, unbiased=False) + 1e-3)
            case "pooled over time":
                h = h + h.amax(1, keepdim=True)
            case "shift that wraps around":
                h = h + h.roll(1, dims=1)
            case "router by the mean of the sequence":
                h = h * self.gate(h.mean(1, keepdim=True)).softmax(-1)[..., :1]
            case (
                "router with a capacity"
            ):  # the expert takes the positions that score highest in the whole window
                score = self.gate(h)[..., 0]
                limit = score.topk(max(1, 3 * score.shape[1] // 4), dim=1).values[:, -1:]
                h = h * (score >= limit)[..., None]
            case "mean over the batch":
                h = h - h.mean(0, keepdim=True)
        return x + self.dropout(self.down(F.gelu(self.up(h)))), new


class Decoder(nn.Module):
    """A decoder of two layers; a fault named "..., second layer" is only in that one."""

    def __init__(self, fault: str = ""):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(V, C), nn.Linear(C, V)
            one_layer = fault.removesuffix(", second layer")
            self.layers = nn.ModuleList(
                [Layer("" if one_layer != fault else fault), Layer(one_layer)]
            )
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        self.config = types.SimpleNamespace(vocab_size=V, max_position_embeddings=WINDOW)

    def forward(self, ids, past_key_values=None, use_cache=False):
        x, new = self.embed(ids), []
        for number, layer in enumerate(self.layers):
            x, memory = layer(x, past_key_values[number] if past_key_values else None)
            new.append(memory)
        logits = self.head(x)
        return (logits, new) if use_cache else logits
