"""Feed-forward layers: a SwiGLU MLP, or a mixture of such experts as in DeepSeek-V3
(arXiv:2412.19437, section 2.1.2) and GLM-4.5.

Shapes: B batch, T positions, M = B T tokens, C hidden_size, E experts, K experts per token,
        inner: intermediate_size, or an expert's moe_intermediate_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlib.config import RunConfig
from lmlib.model.attention import Linear

BIAS_UPDATE_SPEED = 0.001  # change of a router's bias in an update (DeepSeek-V3, section 4.2)


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv:2002.05202)."""
    def __init__(self, config: RunConfig, inner: int):
        super().__init__()
        C, self.act = config.hidden_size, F.silu
        self.gate_proj = Linear(C, inner, bias=False)
        self.up_proj = Linear(C, inner, bias=False)
        self.down_proj = Linear(inner, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Choose K experts per token by affinity plus a bias that balances their load."""
    # The bias has no gradient and no part in the experts' weights: it balances the load without an
    # auxiliary loss (arXiv:2408.15664).
    def __init__(self, config: RunConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        self.load = None  # (E,) tokens per expert in training since `reset_router_load`

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (M, C) -> weights, experts: (M, K)
        with torch.autocast(x.device.type, enabled=False):  # in float32, as the stock classes do
            affinity = F.linear(x.float(), self.weight.float()).sigmoid()  # (M, E)
        experts = (affinity + self.e_score_correction_bias).topk(self.top_k, sorted=False).indices
        weights = affinity.gather(1, experts)
        if self.training and self.load is not None:
            self.load += torch.bincount(experts.flatten(), minlength=len(self.load))
        return weights / (weights.sum(1, keepdim=True) + 1e-20), experts


class Experts(nn.Module):
    """E SwiGLU MLPs in stacked matrices, so that one grouped product computes them all."""
    def __init__(self, config: RunConfig):
        super().__init__()
        E, C, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.act = F.silu
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * inner, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, inner))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts: (M, C), (M, K), (M, K) -> (M, C)."""
        (M, K), flat = experts.shape, experts.flatten()  # (M K,)
        order = flat.argsort(stable=True)  # rows grouped by expert
        ends = torch.bincount(flat, minlength=len(self.down_proj)).cumsum(0)  # (E,)
        x = x.index_select(0, order // K)  # (M K, C)
        gate, up = grouped_linear(x, self.gate_up_proj, ends).chunk(2, dim=-1)  # (M K, inner)
        y = grouped_linear(self.act(gate) * up, self.down_proj, ends)  # (M K, C)
        y = y.index_select(0, order.argsort()).view(M, K, -1)  # in the order of the tokens again
        return torch.bmm(weights[:, None].to(y.dtype), y).squeeze(1)


class MixtureOfExperts(nn.Module):
    """K routed experts, plus a shared one that processes every token."""
    def __init__(self, config: RunConfig):
        super().__init__()
        self.gate, self.experts = Router(config), Experts(config)
        self.shared_experts = MLP(config, config.moe_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        tokens = x.flatten(0, 1)  # (M, C)
        return self.experts(tokens, *self.gate(tokens)).view_as(x) + self.shared_experts(x)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows ends[e - 1] : ends[e] of x (R, in) by weight[e].T (E, out, in): (R, out)."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
    # F.grouped_mm needs 16-bit floats (on a CPU float32 works too) and strides of 16 bytes.
    supported = x.element_size() == 2 or (x.dtype == torch.float32 and device == "cpu")
    if supported and all(size * x.element_size() % 16 == 0 for size in weight.shape[1:]):
        return F.grouped_mm(x, weight.mT, offs=ends.int())
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(*pair) for pair in zip(x.split(sizes), weight, strict=True)])


def routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def reset_router_load(model: nn.Module):
    """Start counting the load of the next update."""
    for router in routers(model):
        router.load = torch.zeros_like(router.e_score_correction_bias, dtype=torch.long)


def update_router_bias(model: nn.Module, found_inf: Tensor | None = None):
    """Lower the bias of experts whose load in this update was above the mean; raise the others.

    Where `found_inf` is 1 nothing changes.
    """
    speed = BIAS_UPDATE_SPEED * (1.0 if found_inf is None else 1.0 - found_inf)
    for router in routers(model):
        below_mean = torch.sign(router.load.sum() - len(router.load) * router.load)  # in integers
        router.e_score_correction_bias += speed * below_mean.float()


def expert_load(model: nn.Module) -> list[list[float]]:
    """Return each layer's load in the last update as fractions that sum to 1: layers x E."""
    loads = (router.load / router.load.sum().clamp(min=1) for router in routers(model))
    return [[round(share, 4) for share in load.tolist()] for load in loads]
