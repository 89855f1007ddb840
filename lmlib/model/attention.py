"""Attention: multi-head latent (DeepSeek-V2, arXiv:2405.04434, section 2.1) and plain multi-head.

Without a cache a layer attends within whole windows (training). With one it processes a prompt at
once (prefill), then one token at a time (decode).

Shapes: B batch, T new positions, S positions attended to (those in the cache and the new ones),
        C hidden_size, H heads, D dimensions of a head's query and key, Dv of its value.
        Latent attention: D = Dn unrotated + Dr rotated dimensions, L kv_lora_rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlib.config import RunConfig


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalization (arXiv:1910.07467) in float32, as the stock classes do."""
    def forward(self, x: Tensor) -> Tensor:  # (..., width) -> (..., width)
        if torch.is_grad_enabled() and x.dtype == torch.float32 and x.device.type == "cpu":
            return Normalize.apply(x, self.weight)
        return self.weight * F.rms_norm(x.float(), self.normalized_shape, eps=1e-6).to(x.dtype)


class Normalize(torch.autograd.Function):
    """RMSNorm on a CPU, where torch has no fused kernel: 11 operators, not autograd's 20."""
    epsilon = torch.tensor(1e-6)

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # (..., C), (C,) -> (..., C)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (..., 1)
        scale = torch.addcmul(Normalize.epsilon, norm, norm, value=1 / len(weight)).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale, weight)
        return weight * y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, scale, weight = ctx.saved_tensors
        product = (grad * y).flatten(0, -2)  # (M, C)
        along = (product @ weight).view_as(scale)
        grad_x = torch.addcmul(grad * weight, y, along, value=-1 / len(weight)).mul_(scale)
        return grad_x, product.sum(0)


class Linear(nn.Linear):
    """nn.Linear with a faster path for decoding one row on a CPU."""
    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        one_row = x.numel() == x.shape[-1] and x.device.type == "cpu"
        if not one_row or torch.is_grad_enabled() or self.out_features % 4:
            return super().forward(x)
        # A matrix-vector product runs on one core; as a batch of 4 smaller products it uses all.
        weight = self.weight.view(4, -1, self.in_features)  # (4, out / 4, in)
        # The strides choose the kernel: the same column as view(-1, 1) is four times slower.
        column = x.reshape(1, -1).T.expand(4, -1, 1)  # (4, in, 1)
        y = torch.bmm(weight, column).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Cache:
    """What attention keeps of past tokens: the latents and rotated keys, or the keys and values.

    It has `slots` tokens for each of `rows` texts, in the dtype and on the device of `like`.
    Shorter prompts of a batch are padded on the left: row b begins at slot `start[b]`.
    """
    def __init__(self, c: RunConfig, rows: int, slots: int, start: Tensor | None, like: Tensor):
        width = c.kv_lora_rank + c.qk_rope_head_dim if c.attention == "mla" else 2 * c.hidden_size
        self.memory = like.new_empty(c.num_hidden_layers, rows, slots, width)
        self.start, self.used = start, 0  # start: (B,), or None where all rows begin at slot 0

    def append(self, layer: int, new: Tensor) -> Tensor:
        """Store (B, T, width) after a layer's past tokens; return all of them (B, S, width)."""
        end = self.used + new.shape[1]
        self.memory[layer, :, self.used : end] = new
        return self.memory[layer, :, :end]

    def positions(self, T: int) -> Tensor:
        """Return the next T tokens' positions in their texts: (T,), or (B, T) with padding."""
        slots = torch.arange(self.used, self.used + T, device=self.memory.device)
        return slots if self.start is None else (slots - self.start[:, None]).clamp(min=0)

    def mask(self, T: int) -> Tensor | None:
        """Return which slots the next T tokens may attend to: (B or 1, 1, T, S) bool, or None."""
        if self.start is None and (T == 1 or self.used == 0):
            return None  # the causal mask of `causal_attention` is enough
        keys = torch.arange(self.used + T, device=self.memory.device)  # (S,)
        queries = keys[self.used :, None]  # (T, 1)
        if self.start is None:
            return (keys <= queries)[None, None]
        allowed = (keys <= queries) & (keys >= self.start[:, None, None])  # (B, T, S)
        # Padding attends to itself: a row of the softmax with no slot at all would be NaN.
        return (allowed | (keys == queries))[:, None]


def rotary_angles(positions: Tensor, Dr: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Return rotary positions (arXiv:2104.09864) as complex numbers, computed in float32.

    (T,) or (B, T) -> (2, T, 1, Dr / 2) or (2, B, T, 1, Dr / 2): the rotations and their inverses.
    """
    even = torch.arange(0, Dr, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None, None].float() * (1.0 / theta ** (even / Dr))
    cos, sin = angles.cos(), angles.sin()
    rotations = torch.stack((torch.complex(cos, sin), torch.complex(cos, -sin)))
    return rotations.to(torch.complex128) if dtype == torch.float64 else rotations


def rotate(x: Tensor, angles: Tensor, interleave: bool) -> Tensor:
    """Rotate pairs of dimensions by `rotary_angles`: (B, T, H, Dr) -> (B, T, H, Dr)."""
    # A pair is (x[0], x[1]) if interleaved, else (x[0], x[Dr / 2]). Either way the result is
    # interleaved: the same permutation of q and k leaves q k^T as it is.
    pairs = x.unflatten(-1, (-1, 2)) if interleave else x.unflatten(-1, (2, -1)).mT
    pairs = pairs if x.dtype == torch.float64 else pairs.float()
    if torch.compiler.is_compiling():  # its compiler knows real numbers only
        (a, b), (cos, sin) = pairs.unbind(-1), torch.view_as_real(angles[0]).unbind(-1)
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return rotated.flatten(-2).to(x.dtype)
    # A view as complex numbers needs the parts of each beside each other, at an even address.
    if pairs.stride(-1) != 1 or any(n % 2 for n in (*pairs.stride()[:-1], pairs.storage_offset())):
        pairs = pairs.contiguous()
    rotated = Rotate.apply(torch.view_as_complex(pairs), *angles)
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)


class Rotate(torch.autograd.Function):
    """Multiply complex numbers by constants of size 1, whose inverses are given too."""
    @staticmethod
    def forward(ctx, x: Tensor, angles: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x * angles

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
                     causal: bool = True) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, each position attending to itself and those before it.

    (B, H, T, D), (B, H, S, D), (B, H, S, Dv) -> (B, H, T, Dv). Without a mask T is S, or 1.
    `causal=False` lets every position attend to all: a leak, for experiments.
    """
    T, D, Dv = q.shape[-2], q.shape[-1], v.shape[-1]
    # The fused kernels need one width. Zeros pad the narrower without changing any product.
    if Dv < D:
        v = F.pad(v, (0, D - Dv))
    elif Dv > D:
        q, k = F.pad(q, (0, Dv - D)), F.pad(k, (0, Dv - D))
    is_causal = causal and mask is None and T > 1
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=D**-0.5)
    return y[..., :Dv]


class LatentAttention(nn.Module):
    """Latent attention: all heads expand their keys and values from one latent per token."""
    # Positions enter through separate rotated dimensions, whose key all heads share.
    def __init__(self, config: RunConfig):
        super().__init__()
        self.config, c, C, bias = config, config, config.hidden_size, config.attention_bias
        self.sizes = H, L, Dn, Dr, Dv = (c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim,
                                         c.qk_rope_head_dim, c.v_head_dim)
        if c.q_lora_rank is None:
            self.q_proj = Linear(C, H * (Dn + Dr), bias=False)
        else:
            self.q_a_proj = Linear(C, c.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank)
            self.q_b_proj = Linear(c.q_lora_rank, H * (Dn + Dr), bias=False)
        self.kv_a_proj_with_mqa = Linear(C, L + Dr, bias=bias)
        self.kv_a_layernorm = RMSNorm(L)
        self.kv_b_proj = Linear(L, H * (Dn + Dv), bias=False)
        self.o_proj = Linear(H * Dv, C, bias=bias)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None = None,
                cache: Cache | None = None, layer: int = 0) -> Tensor:  # (B, T, C) -> (B, T, C)
        c, (B, T, _), (H, L, Dn, Dr, Dv) = self.config, x.shape, self.sizes
        if c.q_lora_rank is None:
            q = self.q_proj(x)  # (B, T, H D)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.view(B, T, H, Dn + Dr).split((Dn, Dr), dim=-1)
        q_rope = rotate(q_rope, angles, c.rope_interleave)  # (B, T, H, Dr)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((L, Dr), dim=-1)
        latent = self.kv_a_layernorm(latent)  # (B, T, L)
        k_rope = rotate(k_rope[:, :, None], angles, c.rope_interleave)  # (B, T, 1, Dr)
        if cache is not None:
            new = torch.cat((latent, k_rope[:, :, 0]), dim=-1)  # (B, T, L + Dr)
            memory = cache.append(layer, new)  # (B, S, L + Dr)
            if T == 1:
                return self.o_proj(self._decode(q_nope[:, 0], q_rope[:, 0], memory, mask))
            latent, k_rope = memory[..., :L], memory[:, :, None, L:]
        kv = self.kv_b_proj(latent).view(B, -1, H, Dn + Dv)
        k_nope, v = kv.split((Dn, Dv), dim=-1)  # (B, S, H, Dn), (B, S, H, Dv)
        q = torch.cat((q_nope, q_rope), dim=-1)  # (B, T, H, D)
        k = torch.cat((k_nope, k_rope.expand(B, -1, H, Dr)), dim=-1)  # (B, S, H, D)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # heads before positions
        y = causal_attention(q, k, v, mask, c.causal_mask)  # (B, H, T, Dv)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, H * Dv))

    def _decode(self, q_nope: Tensor, q_rope: Tensor, memory: Tensor, mask: Tensor | None):
        """Attend from one token: (B, H, Dn), (B, H, Dr), (B, S, L + Dr) -> (B, 1, H Dv)."""
        # kv_b_proj is linear: its half that makes keys moves into the query, its half that makes
        # values into the result, so the S latents are never expanded (section 2.1.2).
        H, L, Dn, Dr, Dv = self.sizes
        w_k, w_v = self.kv_b_proj.weight.view(H, -1, L).split((Dn, Dv), dim=1)  # (H, Dn or Dv, L)
        q_latent = (q_nope.transpose(0, 1) @ w_k).transpose(0, 1)  # (B, H, L)
        q = torch.cat((q_latent, q_rope), dim=-1)  # (B, H, L + Dr)
        scores = q @ memory.transpose(1, 2) * (Dn + Dr) ** -0.5  # (B, H, S)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, 0], -torch.inf)
        latent = scores.softmax(-1) @ memory[..., :L]  # (B, H, L)
        y = (latent.transpose(0, 1) @ w_v.transpose(1, 2)).transpose(0, 1)  # (B, H, Dv)
        return y.reshape(len(memory), 1, -1)


class MultiHeadAttention(nn.Module):
    """Multi-head attention (arXiv:1706.03762) with rotary positions: Llama's, or GLM-4.5's."""
    def __init__(self, config: RunConfig):
        super().__init__()
        self.config, C, bias = config, config.hidden_size, config.attention_bias
        self.q_proj, self.k_proj, self.v_proj = (Linear(C, C, bias=bias) for _ in range(3))
        # With experts the stock class is GLM-4.5's, whose output projection never has a bias.
        self.o_proj = Linear(C, C, bias=bias and config.feed_forward == "mlp")

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None = None,
                cache: Cache | None = None, layer: int = 0) -> Tensor:  # (B, T, C) -> (B, T, C)
        (B, T, C), H = x.shape, self.config.num_attention_heads
        q, k, v = (project(x).view(B, T, H, -1) for project in (self.q_proj, self.k_proj,
                                                                self.v_proj))  # (B, T, H, D)
        q, k = rotate(q, angles, interleave=False), rotate(k, angles, interleave=False)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            new = torch.cat((k, v), dim=-1).transpose(1, 2).reshape(B, T, 2 * C)
            memory = cache.append(layer, new).unflatten(-1, (H, -1))  # (B, S, H, 2 D)
            k, v = memory.transpose(1, 2).chunk(2, dim=-1)  # (B, H, S, D)
        y = causal_attention(q, k, v, mask, self.config.causal_mask)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))
