"""The language model: a decoder whose names and arithmetic are those of stock Hugging Face classes.

attention "mla" is saved as DeepseekV3ForCausalLM (DeepSeek-V2, arXiv:2405.04434, section 2.1, and V3,
arXiv:2412.19437), "mha" as LlamaForCausalLM (arXiv:2302.13971).

Shapes: B batch, T positions, C hidden_size, H heads, D a head's dimensions, V vocab_size.
        mla: R rotated and N unrotated dimensions of a query's head (D = N + R), L kv_lora_rank, E a value's.
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


def rotary_angles(positions: int, dims: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of the rotary positions (arXiv:2104.09864), worked out in float32: (2, T, dims / 2)."""
    frequencies = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    angles = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def rotate(x: Tensor, angles: Tensor, interleave: bool) -> Tensor:
    """Turn each pair of dimensions by its angle: (B, H, T, R) with (2, T, R / 2) -> (B, H, T, R).

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
            self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:  # (B, T, C), (2, T, R / 2) -> (B, T, C)
        c = self.config
        B, T, _ = x.shape
        H, N, R, E = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim

        q = self.q_proj(x) if c.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.view(B, T, H, N + R).transpose(1, 2).split((N, R), dim=-1)  # (B, H, T, N), (B, H, T, R)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((c.kv_lora_rank, R), dim=-1)  # (B, T, L), (B, T, R)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(B, T, H, N + E).transpose(1, 2)
        k_nope, v = kv.split((N, E), dim=-1)  # (B, H, T, N), (B, H, T, E)

        k_rope = rotate(k_rope[:, None], angles, c.rope_interleave).expand(B, H, T, R)
        q = torch.cat((q_nope, rotate(q_rope, angles, c.rope_interleave)), dim=-1)  # (B, H, T, D)
        k = torch.cat((k_nope, k_rope), dim=-1)  # (B, H, T, D)
        return self.o_proj(causal_attention(q, k, v).transpose(1, 2).reshape(B, T, H * E))


class MultiHeadAttention(nn.Module):
    """Plain multi-head attention (arXiv:1706.03762) with rotary positions, as Llama has it."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config = config
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:  # (B, T, C), (2, T, D / 2) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = (
            project(x).view(B, T, self.config.num_attention_heads, -1).transpose(1, 2)  # (B, H, T, D)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, angles, interleave=False), rotate(k, angles, interleave=False)
        return self.o_proj(causal_attention(q, k, v).transpose(1, 2).reshape(B, T, C))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over each position and those before it: (B, H, T, D), same, (B, H, T, E) -> (B, H, T, E).

    The fast kernels want one width, so narrower values are padded with zeros and wider ones widen q and k.
    """
    D, E = q.shape[-1], v.shape[-1]
    if E < D:
        v = F.pad(v, (0, D - E))
    elif E > D:
        q, k = F.pad(q, (0, E - D)), F.pad(k, (0, E - D))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=D**-0.5)[..., :E]


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv:2002.05202)."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: RunConfig):
        super().__init__()
        self.dropout = config.dropout
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.self_attn = LatentAttention(config) if config.attention == "mla" else MultiHeadAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:  # (B, T, C), (2, T, R / 2) -> (B, T, C)
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), angles), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Decoder(nn.Module):
    """Embedding, layers and the last normalisation; what the stock classes call `model`."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        c = self.config
        rotated = c.qk_rope_head_dim if c.attention == "mla" else c.hidden_size // c.num_attention_heads
        x = F.dropout(self.embed_tokens(ids), c.dropout, self.training)
        angles = rotary_angles(ids.shape[1], rotated, c.rope_theta, x.device, x.dtype)
        for layer in self.layers:
            x = layer(x, angles)
        return self.norm(x)


class LanguageModel(nn.Module):
    """The whole model: `model(ids)` takes token ids (B, T) to logits (B, T, V).

    Built with random weights that `config.seed` decides (nothing is drawn from torch's global generator);
    on the meta device with none. Matrices are normal with deviation 0.02, except that those which write to
    the residual stream start at zero, so that each layer begins as the identity.

    Raises:
        ValueError: `config.vocab_size` is null, which only a tokenizer can settle.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is null, which means the tokenizer's size; build the model with a number.")
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = Decoder(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.apply(_initialise)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        return self.lm_head(self.model(ids))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of `targets` (B, T) given `ids` (B, T), without holding all logits at once."""
        hidden = self.model(ids)
        return HeadLoss.apply(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())


def _initialise(module: nn.Module):
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        elif name == "bias":
            nn.init.zeros_(parameter)
    if isinstance(module, LatentAttention | MultiHeadAttention):
        nn.init.zeros_(module.o_proj.weight)
    if isinstance(module, MLP):
        nn.init.zeros_(module.down_proj.weight)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear head, a chunk of rows at a time: hidden (M, C), weight (V, C), targets (M,).

    Each chunk's logits turn into its gradients at once and are dropped, so memory holds `rows` x V logits
    instead of M x V, and nothing is computed twice. Equals F.cross_entropy(hidden @ weight.T, targets).
    """

    rows = 1024

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        M = len(targets)
        matrix = weight.to(torch.get_autocast_dtype(hidden.device.type)) if _autocast(hidden) else weight
        need_grad = hidden.requires_grad or weight.requires_grad
        grad_hidden = torch.empty_like(hidden) if need_grad else None
        grad_weight = torch.zeros_like(weight) if need_grad else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, M, HeadLoss.rows):
            chunk, target = hidden[start : start + HeadLoss.rows], targets[start : start + HeadLoss.rows]
            logits = F.linear(chunk.to(matrix.dtype), matrix)  # (rows, V)
            log_probs = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            total -= log_probs.gather(1, target[:, None]).sum(dtype=torch.float64)
            if need_grad:  # d loss / d logits = (softmax - one hot) / M
                grad_logits = log_probs.exp_()
                grad_logits.scatter_add_(1, target[:, None], torch.full_like(grad_logits[:, :1], -1.0))
                grad_logits = (grad_logits / M).to(matrix.dtype)
                grad_hidden[start : start + HeadLoss.rows] = grad_logits @ matrix
                if matrix is weight:
                    grad_weight.addmm_(grad_logits.T, chunk)
                else:  # under autocast the sum stays in float32
                    grad_weight += grad_logits.T @ chunk.to(matrix.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return (total / M).to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers, a tied head counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: LanguageModel) -> float:
    """Floating-point operations to train on one token: 6 for each parameter in a matrix product (the head included),
    and attention's two products over the mean causal context of a full window, forward and backward."""
    c = model.config
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    if c.attention == "mla":
        widths = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    else:
        widths = 2 * c.hidden_size // c.num_attention_heads
    context = (c.sequence_length + 1) / 2
    return 6 * products + 6 * context * c.num_hidden_layers * c.num_attention_heads * widths
