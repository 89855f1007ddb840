"""Optimizers: Muon for the matrices inside layers, AdamW for the rest; and their schedule."""

import math
from collections.abc import Container, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lmlib.config import RunConfig
from lmlib.errors import UserError

FINAL_LR_FRACTION = 0.1  # of the peak learning rate, at the end of the cosine


def schedule(step: int, total_steps: int, warmup_ratio: float, decay_ratio: float = 0.0) -> float:
    """Return the learning rate of update `step` (1 .. total_steps) as a fraction of the peak.

    After the warmup it stays at 1, then falls in a line to 0 over the last `decay_ratio` of the
    steps; with 0 it follows a cosine to 0.1 instead.
    """
    warmup = round(warmup_ratio * total_steps)
    if step <= warmup:
        return step / warmup
    if decay_ratio:
        # The last update is the last with a rate above 0.
        return min(1.0, (total_steps + 1 - step) / (decay_ratio * total_steps + 1))
    progress = (step - warmup) / max(1, total_steps - warmup)  # along the cosine
    return FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress))


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has units for bfloat16: CPUs and GPUs like the T4 are far slower in it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return roughly the nearest semi-orthogonal matrix: (rows, columns), or (N, rows, columns)."""
    # Five quintic Newton-Schulz steps bring every singular value to between 0.7 and 1.2. The
    # coefficients are Keller Jordan's ("Muon", 2024): fast near zero rather than exact near one.
    a, b, c = 3.4445, -4.7750, 2.0315
    multiply_add = torch.addmm if matrix.dim() == 2 else torch.baddbmm
    wide = matrix.shape[-2] <= matrix.shape[-1]  # the Gram matrix of the shorter side is smaller
    x = (matrix if wide else matrix.mT).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(Optimizer):
    """Nesterov momentum with orthogonalized updates (Keller Jordan, 2024), decoupled decay.

    Matrices of equal shape are updated together, in stacks: few kernels rather than hundreds.
    Where the attribute `found_inf` is set, a step at which it is 1 changes nothing, bit for bit, as
    in torch's fused optimizers.
    """
    STACK = 2**26  # most elements of a stack: bounds the memory that an update takes
    found_inf: Tensor | None = None

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float,
                 momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters, lr = group["params"], group["lr"]
            skip = None if self.found_inf is None else self.found_inf > 0
            decay = 1 - lr * group["weight_decay"]
            decay = decay if skip is None else torch.where(skip, 1.0, decay)
            torch._foreach_mul_(parameters, decay)
            for same in self.stacks(parameters):
                self._update(same, lr, group["momentum"], skip)

    def _update(self, parameters: list[Tensor], lr: float, momentum: float, skip: Tensor | None):
        """Update parameters of one shape: (rows, columns), or (E, rows, columns)."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        states = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients, means = _stack([p.grad for p in parameters]), _stack(states)
        new_means = means.lerp(gradients, 1 - momentum)
        update = gradients.lerp_(new_means, momentum)
        # bfloat16 is precise enough for Newton-Schulz.
        dtype = torch.bfloat16 if has_bfloat16(update.device) else torch.float32
        update = orthogonalize(update, dtype).to(means.dtype)
        if skip is not None:
            new_means = torch.where(skip, means, new_means)
            update = update.masked_fill_(skip, 0.0)  # x - lr * 0 is x, bit for bit
        # One learning rate serves matrices of every shape with this scale.
        scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
        torch._foreach_copy_(states, _unstack(new_means, states))
        torch._foreach_add_(parameters, _unstack(update, states), alpha=-lr * scale)

    def stacks(self, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        """Group parameters of one shape and dtype, up to `STACK` elements but one at least."""
        kinds = {}
        for parameter in parameters:
            kinds.setdefault((parameter.shape, parameter.dtype), []).append(parameter)
        for same in kinds.values():
            count = max(1, self.STACK // same[0].numel())
            yield from (same[n : n + count] for n in range(0, len(same), count))


def _stack(tensors: list[Tensor]) -> Tensor:
    """Return matrices, or stacks of them, as one stack: (N, rows, columns); a single one as is."""
    if len(tensors) == 1:
        return tensors[0].clone()
    return torch.cat(tensors) if tensors[0].dim() == 3 else torch.stack(tensors)


def _unstack(stack: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Undo `_stack`."""
    if len(like) == 1:
        return [stack]
    return list(stack.split(len(like[0])) if like[0].dim() == 3 else stack.unbind())


def build_optimizers(model: nn.Module, config: RunConfig,
                     owned: Container[Tensor] | None = None) -> list[Optimizer]:
    """Return the optimizers of a run, each of whose groups knows its `peak_lr`.

    They update the parameters that are `owned` by this process (None: all).
    """
    named, muon = list(model.named_parameters()), config.optimizer == "muon"
    named = [(name, p) for name, p in named if owned is None or p in owned]
    vectors = [p for _, p in named if p.dim() < 2]  # norms and biases
    matrices = [p for name, p in named if p.dim() >= 2 and "layers." in name]
    tables = [p for name, p in named if p.dim() >= 2 and "layers." not in name]  # embedding, head
    # Norms and biases do not decay: a norm's scale belongs near 1, not near 0.
    decayed = tables if muon else matrices + tables
    groups = [{"params": decayed, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, 0.95), fused=True)]
    if muon and matrices:
        optimizers.insert(0, Muon(matrices, config.muon_learning_rate, config.weight_decay,
                                  config.muon_momentum))
    for group in _groups(optimizers):
        group["peak_lr"] = group["lr"]
    return optimizers


def owners(model: nn.Module, optimizers: list[Optimizer], processes: int) -> dict[Tensor, int]:
    """Return which of several processes updates each parameter, their work being about equal.

    Muon's stacks stay whole: of another stack a matrix's update may have other bits.
    """
    units = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            is_muon = isinstance(optimizer, Muon)
            whole = optimizer.stacks(group["params"]) if is_muon else [[p] for p in group["params"]]
            # Newton-Schulz costs as much per element and row of the shorter side as AdamW does
            # per element, roughly.
            units += [(sum(p.numel() * (min(p.shape[-2:]) if is_muon else 1) for p in unit), unit)
                      for unit in whole]
    work, found = [0] * processes, {}
    for cost, unit in sorted(units, key=lambda pair: -pair[0]):
        owner = work.index(min(work))
        work[owner] += cost
        found |= dict.fromkeys(unit, owner)
    return {parameter: found[parameter] for parameter in model.parameters()}


def set_learning_rates(optimizers: list[Optimizer], fraction: float):
    """Set every group's learning rate to `fraction` of its peak."""
    for group in _groups(optimizers):
        group["lr"] = group["peak_lr"] * fraction


def state_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Return all optimizer state as named tensors: "<parameter>/<quantity>"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[parameter]}/{quantity}": tensor for optimizer in optimizers
            for parameter, state in optimizer.state.items() for quantity, tensor in state.items()}


def load_state_tensors(model: nn.Module, optimizers: list[Optimizer], tensors: dict[str, Tensor],
                       whole: list[Optimizer] | None = None):
    """Restore what `state_tensors` returned; ValueError if other optimizers or shapes had it.

    Where processes share the work, `whole` are the optimizers of all parameters.
    """
    if tensors:  # there are none before the first update
        _check_state(state_shapes(model, whole or optimizers), tensors)
    parameters = dict(model.named_parameters())
    states = {parameter: optimizer.state[parameter] for optimizer in optimizers
              for group in optimizer.param_groups for parameter in group["params"]}
    for key, tensor in tensors.items():
        name, quantity = key.rsplit("/", 1)
        if parameters[name] in states:
            # Fused AdamW wants even its step counter on the parameter's device.
            states[parameters[name]][quantity] = tensor.to(parameters[name].device)


def state_shapes(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, torch.Size]:
    """Return the shapes of `state_tensors` after an update."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[p]}/{quantity}": torch.Size() if quantity == "step" else p.shape
            for optimizer in optimizers for group in optimizer.param_groups
            for p in group["params"] for quantity in _quantities(optimizer)}


def _quantities(optimizer: Optimizer) -> tuple[str, ...]:
    """Name the tensors that an optimizer keeps of a parameter."""
    return ("momentum",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")


def _check_state(expected: dict[str, torch.Size], tensors: dict[str, Tensor]):
    """Raise a ValueError if saved tensors are not those that a run's optimizers keep."""
    def kind(keys: Iterable[str]) -> str:
        return "muon" if any(key.endswith("/momentum") for key in keys) else "adamw"

    found = {key: tensor.shape for key, tensor in tensors.items()}
    if found == expected:
        return
    if (theirs := kind(found)) != (ours := kind(expected)):
        raise UserError(f"The saved optimizer state is that of {theirs}, and this run's optimizer "
                        f"is {ours}: set optimizer to {theirs}, or init_state to weights.")
    wrong = sorted(key for key in found.keys() | expected if found.get(key) != expected.get(key))
    raise UserError(f"The saved optimizer state does not fit this model ({', '.join(wrong[:3])}): "
                    "set init_state to weights.")


def state_bytes(optimizers: list[Optimizer]) -> int:
    """Count the bytes of state: one tensor per parameter for Muon, two for AdamW."""
    return sum(p.nbytes * len({*_quantities(optimizer)} - {"step"}) for optimizer in optimizers
               for group in optimizer.param_groups for p in group["params"])


def _groups(optimizers: list[Optimizer]) -> list[dict]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]
