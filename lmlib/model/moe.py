"""Feed-forward layers: one SwiGLU MLP for every token, or experts that a router chooses among (DeepSeek-V3,
arXiv:2412.19437, section 2.1.2; the same arithmetic in GLM-4.5's MoE).

Shapes: B batch, T positions, M = B T tokens, C hidden_size, E num_experts, K num_experts_per_tok,
        I the inner width (intermediate_size, or an expert's moe_intermediate_size).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmlib.config import RunConfig
from lmlib.model.attention import Linear

BIAS_UPDATE_SPEED = 0.001  # how far a router's bias moves in an update (DeepSeek-V3, section 4.2)


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Chooses K experts for each token, by affinity plus a bias that evens out their load; the bias takes no part in the
    experts' weights and no gradient (arXiv:2408.15664).

    `load` (E,) counts the tokens that each expert was given in training since `start_counting`.
    """

    def __init__(self, config: RunConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        self.load = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (M, C) -> weights (M, K), experts (M, K)
        with torch.autocast(x.device.type, enabled=False):  # in float32, as the stock classes do
            affinity = F.linear(x.float(), self.weight.float()).sigmoid()  # (M, E)
        experts = (affinity + self.e_score_correction_bias).topk(self.top_k, sorted=False).indices
        weights = affinity.gather(1, experts)
        if self.training and self.load is not None:
            self.load += torch.bincount(experts.flatten(), minlength=len(self.load))
        return weights / (weights.sum(1, keepdim=True) + 1e-20), experts


class Experts(nn.Module):
    """E SwiGLU MLPs whose matrices lie behind each other, so that one grouped product serves them all."""

    def __init__(self, config: RunConfig):
        super().__init__()
        E, C, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * inner, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, inner))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:  # (M, C), (M, K), (M, K) -> (M, C)
        M, K = experts.shape
        order = experts.flatten().argsort(stable=True)  # (M K,) each expert's tokens behind each other
        ends = torch.bincount(experts.flatten(), minlength=len(self.down_proj)).cumsum(0)  # (E,)
        gate, up = grouped_linear(x.index_select(0, order // K), self.gate_up_proj, ends).chunk(2, dim=-1)  # (M K, I)
        y = grouped_linear(F.silu(gate) * up, self.down_proj, ends)  # (M K, C)
        y = y.index_select(0, order.argsort()).view(M, K, -1)  # back beside the token and choice it belongs to
        return torch.bmm(weights[:, None].to(y.dtype), y).squeeze(1)


class MixtureOfExperts(nn.Module):
    """K routed experts and one that every token shares."""

    def __init__(self, config: RunConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        tokens = x.flatten(0, 1)  # (M, C)
        return self.experts(tokens, *self.gate(tokens)).view_as(x) + self.shared_experts(x)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows ends[e - 1] : ends[e] of x (R, in) times weight[e].T, weight (E, out, in): (R, out).

    torch's grouped product takes 16-bit floats, on a CPU float32 too, in strides of 16 bytes; the rest goes group by group.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    fits = x.dtype in (torch.bfloat16, torch.float16) or (x.dtype == torch.float32 and x.device.type == "cpu")
    if fits and all(width * x.element_size() % 16 == 0 for width in weight.shape[1:]):
        return F.grouped_mm(x, weight.mT, offs=ends.int())
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(x.split(sizes), weight, strict=True)])


def routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def reset_router_load(model: nn.Module):
    """Forget the load of the update before."""
    for router in routers(model):
        router.load = torch.zeros(len(router.weight), dtype=torch.long, device=router.weight.device)


def update_router_bias(model: nn.Module):
    """After an update: lower the bias of experts that had more than their share of its tokens, raise the others'."""
    for router in routers(model):
        load = router.load.double()
        router.e_score_correction_bias += BIAS_UPDATE_SPEED * torch.sign(load.mean() - load).float()


def expert_load(model: nn.Module) -> list[list[float]]:
    """Each layer's experts' shares of the last update's choices: layers x E, each layer's sum 1."""
    return [[round(share, 4) for share in (r.load / r.load.sum().clamp(min=1)).tolist()] for r in routers(model)]
