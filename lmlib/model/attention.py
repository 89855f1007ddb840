"""Attention: latent (DeepSeek-V2, arXiv:2405.04434, section 2.1) and plain multi-head, with rotary positions and a cache.

Without a cache a layer reads whole windows; with one it reads a prompt once (prefill) and then a token at a time
(decode), from what it remembers.

Shapes: B batch, T positions, S positions remembered, those just read included, C hidden_size, H heads, D a head's
        dimensions. mla: R rotated and N unrotated dimensions of a query's head (D = N + R), L kv_lora_rank, E a value's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlib.config import RunConfig


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv:1910.07467), computed in float32 as the stock classes do."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        normalised = F.rms_norm(x.float(), (x.shape[-1],), eps=1e-6)
        return self.weight * normalised.to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear with a quicker path for the one row of a decoding step on a CPU: as a batch of smaller products it
    uses every core, where the library's product of a matrix and a vector uses one."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        parts = 4
        if x.numel() > x.shape[-1] or x.device.type != "cpu" or torch.is_grad_enabled() or self.out_features % parts:
            return super().forward(x)
        blocks = self.weight.view(parts, -1, self.in_features)
        column = x.reshape(1, -1).T  # its strides choose the kernel: as view(-1, 1) it is four times slower
        y = torch.bmm(blocks, column.expand(parts, -1, 1)).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Cache:
    """What a model remembers of the tokens it has read: `width` numbers a token a layer, which the attention decides.

    Rows that begin later than others (shorter prompts, padded on the left) have their first token at slot `start`.
    """

    def __init__(self, config: RunConfig, rows: int, slots: int, start: Tensor | None = None, like: Tensor | None = None):
        mla = config.attention == "mla"
        width = config.kv_lora_rank + config.qk_rope_head_dim if mla else 2 * config.hidden_size
        like = torch.empty(0) if like is None else like  # a tensor of the device and type that the model computes in
        self.memory = like.new_empty(config.num_hidden_layers, rows, slots, width)
        self.start, self.used = start, 0  # start: (B,) or None for zeros

    def append(self, layer: int, new: Tensor) -> Tensor:
        """Put (B, T, width) behind what `layer` remembers; returns all of it (B, S, width)."""
        end = self.used + new.shape[1]
        self.memory[layer, :, self.used : end] = new
        return self.memory[layer, :, :end]

    def positions(self, T: int) -> Tensor:
        """Of the next T tokens in their texts: (T,), or (B, T) where rows begin at different slots."""
        slots = torch.arange(self.used, self.used + T, device=self.memory.device)
        return slots if self.start is None else (slots - self.start[:, None]).clamp(min=0)

    def mask(self, T: int) -> Tensor | None:
        """Which slots each of the next T tokens may see, (B or 1, 1, T, S); None where a plain causal mask says it."""
        if self.start is None and (T == 1 or self.used == 0):
            return None
        seen = torch.arange(self.used + T, device=self.memory.device)  # (S,)
        reading = seen[self.used :, None]  # (T, 1)
        if self.start is None:
            return (seen <= reading)[None, None]
        real = (seen <= reading) & (seen >= self.start[:, None, None])  # (B, T, S)
        return (real | (seen == reading))[:, None]  # padding sees itself, so that no row of the softmax is empty


def rotary_angles(positions: Tensor, dims: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of the rotary positions (arXiv:2104.09864), worked out in float32: (T,) -> (2, T, dims / 2),
    or (B, T) -> (2, B, 1, T, dims / 2)."""
    frequencies = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32, device=positions.device) / dims)
    angles = positions[..., None].float() * frequencies
    angles = angles if positions.dim() == 1 else angles[:, None]
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def rotate(x: Tensor, angles: Tensor, interleave: bool) -> Tensor:
    """Turn each pair of dimensions by its angle: (B, H, T, R) with `rotary_angles` -> (B, H, T, R).

    A pair is (x0, x1) when interleaved and (x0, x[R/2]) otherwise. The result keeps halves in both cases: queries
    and keys are permuted alike, so their products are the same.
    """
    cos, sin = angles
    a, b = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class LatentAttention(nn.Module):
    """Multi-head latent attention: queries, and keys with values, pass through narrow latents; positions
    enter by a separate rotated part whose key all heads share."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config, bias = config, config.attention_bias
        heads, head_dim = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, heads * head_dim, bias=False)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = Linear(config.q_lora_rank, heads * head_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size, bias=bias)

    def forward(
        self, x: Tensor, angles: Tensor, mask: Tensor | None = None, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        c = self.config
        B, T, _ = x.shape
        H, N, R, E, L = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank

        q = self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.view(B, T, H, N + R).transpose(1, 2).split((N, R), dim=-1)  # (B, H, T, N), (B, H, T, R)
        q_rope = rotate(q_rope, angles, c.rope_interleave)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((L, R), dim=-1)
        latent = self.kv_a_layernorm(latent)  # (B, T, L)
        k_rope = rotate(k_rope[:, None], angles, c.rope_interleave)  # (B, 1, T, R)
        if cache is not None:
            memory = cache.append(layer, torch.cat((latent, k_rope[:, 0]), dim=-1))  # (B, S, L + R)
            if T == 1:
                return self.o_proj(self.absorbed(q_nope, q_rope, memory, mask))
            latent, k_rope = memory[..., :L], memory[:, None, :, L:]

        kv = self.kv_b_proj(latent).view(B, -1, H, N + E).transpose(1, 2)
        k_nope, v = kv.split((N, E), dim=-1)  # (B, H, S, N), (B, H, S, E)
        q = torch.cat((q_nope, q_rope), dim=-1)  # (B, H, T, D)
        k = torch.cat((k_nope, k_rope.expand(B, H, -1, R)), dim=-1)  # (B, H, S, D)
        return self.o_proj(causal_attention(q, k, v, mask, c.causal_mask).transpose(1, 2).reshape(B, T, H * E))

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of one new token without expanding what is remembered (DeepSeek-V2, section 2.1.2): the matrix that
        would make keys of latents goes into the query, and the one that would make values into the result.

        (B, H, 1, N), (B, H, 1, R), (B, S, L + R), (B, 1, 1, S) or None -> (B, 1, H * E)
        """
        c = self.config
        B, H, N, L = len(memory), c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank
        to_keys, to_values = self.kv_b_proj.weight.view(H, -1, L).split((N, c.v_head_dim), dim=1)  # (H, N, L), (H, E, L)
        query = (q_nope[:, :, 0].transpose(0, 1) @ to_keys).transpose(0, 1)  # (B, H, L)
        query = torch.cat((query, q_rope[:, :, 0]), dim=-1)  # (B, H, L + R)
        scores = query @ memory.transpose(1, 2) * (N + c.qk_rope_head_dim) ** -0.5  # (B, H, S)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, 0], -torch.inf)
        mixed = scores.softmax(-1) @ memory[..., :L]  # (B, H, L)
        return (mixed.transpose(0, 1) @ to_values.transpose(1, 2)).transpose(0, 1).reshape(B, 1, -1)


class MultiHeadAttention(nn.Module):
    """Plain multi-head attention (arXiv:1706.03762) with rotary positions, as Llama has it, or, beside experts, GLM-4.5."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config = config
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            bias = config.attention_bias and (name != "o_proj" or config.feed_forward == "mlp")  # GLM's output has none
            setattr(self, name, Linear(config.hidden_size, config.hidden_size, bias=bias))

    def forward(
        self, x: Tensor, angles: Tensor, mask: Tensor | None = None, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = (
            project(x).view(B, T, self.config.num_attention_heads, -1).transpose(1, 2)  # (B, H, T, D)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, angles, interleave=False), rotate(k, angles, interleave=False)
        if cache is not None:
            new = torch.cat((k, v), dim=-1).transpose(1, 2).reshape(B, T, 2 * C)
            memory = cache.append(layer, new).unflatten(-1, (q.shape[1], -1))  # (B, S, H, 2 D)
            k, v = memory.transpose(1, 2).chunk(2, dim=-1)  # (B, H, S, D)
        mixed = causal_attention(q, k, v, mask, self.config.causal_mask)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, C))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over each position and those before it: (B, H, T, D), (B, H, S, D), (B, H, S, E) ->
    (B, H, T, E). Without a mask T equals S, or is 1 and sees everything; not `causal`, every position does (a leak).

    The fast kernels want one width, so narrower values are padded with zeros and wider ones widen q and k.
    """
    D, E, T = q.shape[-1], v.shape[-1], q.shape[-2]
    if E < D:
        v = F.pad(v, (0, D - E))
    elif E > D:
        q, k = F.pad(q, (0, E - D)), F.pad(k, (0, E - D))
    causal = causal and mask is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=D**-0.5)[..., :E]
