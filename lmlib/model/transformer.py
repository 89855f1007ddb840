"""The language model: a decoder whose names and arithmetic are those of stock Hugging Face classes.

attention "mla" is saved as DeepseekV3ForCausalLM (DeepSeek-V2, arXiv:2405.04434, section 2.1, and V3,
arXiv:2412.19437), with feed_forward "mlp" or "moe"; "mha" with "mlp" as LlamaForCausalLM (arXiv:2302.13971), with
"moe" as Glm4MoeForCausalLM (arXiv:2508.06471). Every layer is of the one kind.

Shapes: B batch, T positions, C hidden_size, V vocab_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlib.config import RunConfig
from lmlib.model.attention import Cache, LatentAttention, Linear, MultiHeadAttention, RMSNorm, rotary_angles
from lmlib.model.loss import HeadLoss
from lmlib.model.moe import MLP, Experts, MixtureOfExperts


class DecoderLayer(nn.Module):
    def __init__(self, config: RunConfig):
        super().__init__()
        self.dropout = config.dropout
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.self_attn = LatentAttention(config) if config.attention == "mla" else MultiHeadAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        dense = config.feed_forward == "mlp"
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)

    def forward(
        self, x: Tensor, angles: Tensor, mask: Tensor | None = None, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        attended = self.self_attn(self.input_layernorm(x), angles, mask, cache, layer)
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Decoder(nn.Module):
    """Embedding, layers and the last normalisation; what the stock classes call `model`."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:  # (B, T) -> (B, T, C)
        c, T = self.config, ids.shape[1]
        rotated = c.qk_rope_head_dim if c.attention == "mla" else c.hidden_size // c.num_attention_heads
        x = F.dropout(self.embed_tokens(ids), c.dropout, self.training)
        positions = torch.arange(T, device=x.device) if cache is None else cache.positions(T)
        angles, mask = rotary_angles(positions, rotated, c.rope_theta, x.dtype), cache and cache.mask(T)
        for number, layer in enumerate(self.layers):
            x = layer(x, angles, mask, cache, number)
        if cache is not None:
            cache.used += T
        return self.norm(x)


class LanguageModel(nn.Module):
    """The whole model: `model(ids)` takes token ids (B, T) to logits (B, T, V); with a `Cache`, ids that go on from what
    it remembers.

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
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
            self.apply(_initialize)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:  # (B, T) -> (B, T, V)
        return self.lm_head(self.model(ids, cache))

    def new_cache(self, rows: int, slots: int, start: Tensor | None = None) -> Cache:
        """An empty cache for `rows` texts of up to `slots` tokens, on the model's device and in its type."""
        return Cache(self.config, rows, slots, start, self.lm_head.weight)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of `targets` (B, T) given `ids` (B, T), without holding all logits at once."""
        hidden = self.model(ids)
        return HeadLoss.apply(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())


def _initialize(module: nn.Module):
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.02)
        elif name == "bias":
            nn.init.zeros_(parameter)
    if isinstance(module, LatentAttention | MultiHeadAttention):
        nn.init.zeros_(module.o_proj.weight)
    if isinstance(module, MLP):
        nn.init.zeros_(module.down_proj.weight)
    if isinstance(module, Experts):
        nn.init.zeros_(module.down_proj)
