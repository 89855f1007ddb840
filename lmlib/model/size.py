"""How large a model is and what it costs to train."""

from torch import nn

from lmlib.model.moe import Experts, Router
from lmlib.model.transformer import LanguageModel


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers, a tied head counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def active_parameter_count(model: "LanguageModel") -> int:
    """Those that take part in reading one token: all but the experts that its routers leave out."""
    c, experts = model.config, [m for m in model.modules() if isinstance(m, Experts)]
    idle = sum(parameter_count(m) for m in experts) * (c.num_experts - c.num_experts_per_tok) // c.num_experts
    return parameter_count(model) - idle


def flops_per_token(model: LanguageModel) -> float:
    """Floating-point operations to train on one token: 6 for each parameter in a matrix product (the head included, idle
    experts not), and attention's two products over the mean causal context of a full window, forward and backward."""
    c = model.config
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Router))
    products += sum(
        parameter_count(m) * c.num_experts_per_tok // c.num_experts for m in model.modules() if isinstance(m, Experts)
    )
    if c.attention == "mla":
        widths = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    else:
        widths = 2 * c.hidden_size // c.num_attention_heads
    context = (c.sequence_length + 1) / 2
    return 6 * products + 6 * context * c.num_hidden_layers * c.num_attention_heads * widths
