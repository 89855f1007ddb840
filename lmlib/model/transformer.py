"""The language model: a decoder with the parameter names and arithmetic of stock transformers.

    attention  feed_forward  saved as
    mla        mlp or moe    DeepseekV3ForCausalLM  (arXiv:2405.04434, 2.1, and arXiv:2412.19437)
    mha        mlp           LlamaForCausalLM       (arXiv:2302.13971)
    mha        moe           Glm4MoeForCausalLM     (arXiv:2508.06471)

Shapes: B batch, T positions, C hidden_size, V vocab_size, Dr rotated dimensions of a head.
"""

import torch
from torch import Tensor, nn

from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.model import attention
from lmlib.model.attention import Cache, LatentAttention, Linear, MultiHeadAttention, RMSNorm
from lmlib.model.loss import HeadLoss
from lmlib.model.moe import MLP, MixtureOfExperts

# Name endings of the parameters that start at zero: biases; the matrices that add to the residual
# stream, so that each layer begins as the identity; and a head of its own, so that all tokens begin
# equally likely.
ZERO_AT_FIRST = ("bias", "o_proj.weight", "down_proj.weight", "down_proj", "lm_head.weight")


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each normalized before and added to the residual stream."""
    def __init__(self, config: RunConfig):
        super().__init__()
        C, self.dropout = config.hidden_size, config.dropout
        mla, dense = config.attention == "mla", config.feed_forward == "mlp"
        self.input_layernorm = RMSNorm(C)
        self.self_attn = LatentAttention(config) if mla else MultiHeadAttention(config)
        self.post_attention_layernorm = RMSNorm(C)
        self.mlp = MLP(config, config.intermediate_size) if dense else MixtureOfExperts(config)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None = None,
                cache: Cache | None = None, layer: int = 0) -> Tensor:  # (B, T, C) -> (B, T, C)
        y = self.self_attn(self.input_layernorm(x), angles, mask, cache, layer)
        x = x + dropout(y, self.dropout, self.training)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + dropout(y, self.dropout, self.training)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Return F.dropout(x, p, training), which on a CPU takes four operators instead of one."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


class Decoder(nn.Module):
    """Embedding, layers and the last normalization; the stock classes call it `model`."""
    def __init__(self, config: RunConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:  # (B, T) -> (B, T, C)
        c, T = self.config, ids.shape[1]
        Dr = c.qk_rope_head_dim if c.attention == "mla" else c.hidden_size // c.num_attention_heads
        x = dropout(self.embed_tokens(ids), c.dropout, self.training)  # (B, T, C)
        positions = torch.arange(T, device=x.device) if cache is None else cache.positions(T)
        angles = attention.rotary_angles(positions, Dr, c.rope_theta, x.dtype)
        mask = None if cache is None else cache.mask(T)
        for index, layer in enumerate(self.layers):
            x = layer(x, angles, mask, cache, index)
        if cache is not None:
            cache.used += T
        return self.norm(x)


class LanguageModel(nn.Module):
    """The whole model: `model(ids)` turns token ids (B, T) into logits (B, T, V).

    With a `Cache`, `ids` continue the tokens in the cache. The initial weights are a function of
    `config.seed` and leave torch's global RNG as it is; on the meta device there are none.
    """
    def __init__(self, config: RunConfig):
        super().__init__()
        if config.vocab_size is None:  # only a tokenizer can fill it in
            raise UserError("vocab_size is null (the tokenizer's size); write it as a number.")
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = Decoder(config)
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
            for name, parameter in self.named_parameters():
                if parameter.dim() >= 2:
                    nn.init.normal_(parameter, std=0.02)
                if name.endswith(ZERO_AT_FIRST):
                    nn.init.zeros_(parameter)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:  # (B, T) -> (B, T, V)
        return self.lm_head(self.model(ids, cache))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of `targets` given `ids`: (B, T), (B, T)."""
        hidden = self.model(ids)  # (B, T, C)
        return HeadLoss.apply(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def new_cache(self, rows: int, slots: int, start: Tensor | None = None) -> Cache:
        """Return an empty `Cache` for `rows` texts of up to `slots` tokens."""
        return Cache(self.config, rows, slots, start, self.lm_head.weight)
