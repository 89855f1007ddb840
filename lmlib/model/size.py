"""How large a model is and what it costs to train."""

from torch import nn

from lmlib.model.moe import Experts, Router
from lmlib.model.transformer import LanguageModel


def parameter_count(model: nn.Module) -> int:
    """Count the trainable parameters, a tied head once."""
    return sum(parameter.numel() for parameter in model.parameters())


def active_parameter_count(model: LanguageModel) -> int:
    """Count the parameters that process one token: all but those of experts not chosen for it."""
    total = sum(parameter_count(m) for m in model.modules() if isinstance(m, Experts))
    idle = model.config.num_experts - model.config.num_experts_per_tok
    return parameter_count(model) - total * idle // model.config.num_experts


def flops_per_token(model: LanguageModel) -> float:
    """Count the floating-point operations to train on one token, forward and backward: 6 per
    parameter in a matrix product (the head included, idle experts not), and attention's two
    products over the mean causal context of a full window.
    """
    c = model.config
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Router))
    for experts in (m for m in model.modules() if isinstance(m, Experts)):
        matrices += parameter_count(experts) * c.num_experts_per_tok // c.num_experts
    latent = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    widths = latent if c.attention == "mla" else 2 * c.hidden_size // c.num_attention_heads
    mean_context = (c.sequence_length + 1) / 2
    return 6 * matrices + 6 * mean_context * c.num_hidden_layers * c.num_attention_heads * widths
