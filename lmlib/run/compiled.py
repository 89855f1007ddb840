"""torch.compile and Apple's GPUs, used only where they compute what eager code and the CPU do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lmlib import distributed
from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.model.transformer import LanguageModel

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the gradient, relative to its norm
REPLAYS = 3  # a CUDA graph is recorded in the second call and replayed from the third


def compile_loss(model: LanguageModel, config: RunConfig, ids: Tensor, targets: Tensor,
                 dtype: torch.dtype) -> str:
    """Compile `model.loss` if `config.compile` asks for it; returns why it stays eager, or "".

    `ids` and `targets` are a batch (B, T). It is computed both ways and compared: on CUDA the
    compiled loss replays graphs, whose memory is used again.

    Raises:
        ValueError: `compile` is true, and it cannot be compiled or computes something else.
    """
    device = next(model.parameters()).device
    if config.compile is False or (config.compile == "auto" and device.type != "cuda"):
        return "not asked for"
    if config.sharding == "full" and distributed.world_size() > 1:
        return "it is divided among the processes"
    share = config.batch_size // distributed.world_size()
    rows = config.micro_batch_size or share
    is_whole = rows == share  # else gradients accumulate
    mode = "reduce-overhead" if device.type == "cuda" and is_whole else "default"
    batch = ids[:rows].to(device), targets[:rows].to(device)
    try:
        with _zeros_filled(model):
            eager = _gradient(model, *batch, dtype)
            model.loss = torch.compile(model.loss, dynamic=False, mode=mode)
            found = [_gradient(model, *batch, dtype) for _ in range(REPLAYS)]
        differences = [float((new - eager).norm() / eager.norm()) for new in found]
        wrong = [d for d in differences if not d <= TOLERANCE[dtype]]  # NaN too
        problem = f"its gradient differs by {wrong[0]:.1e}" if wrong else ""
    except Exception as error:  # of any kind: the compiler's, or a missing C++ compiler
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    if problem:
        vars(model).pop("loss", None)  # the class's method again
        if config.compile is True:
            raise UserError(f"compile is true, but the model cannot be compiled here ({problem}). "
                            "Set it to false.")
    return problem


def _gradient(model: LanguageModel, ids: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the loss and gradient of a batch, dropout left out, as one vector in float64."""
    model.eval()
    model.zero_grad(set_to_none=True)
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        loss = model.loss(ids, targets)
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    found = [tensor.detach().cpu().double() for tensor in (loss[None], *gradients)]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


@contextmanager
def _zeros_filled(model: nn.Module) -> Iterator[None]:
    """Fill matrices that are zero, as some are before step 1: behind them no gradient is seen."""
    zeros = [p for p in model.parameters() if p.dim() > 1 and not p.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in zeros:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def check_device(model: LanguageModel, ids: Tensor, targets: Tensor):
    """Raise a UserError if the model's logits or gradient (B, T) are not those of the CPU."""
    on_cpu, device = LanguageModel(model.config), next(model.parameters()).device
    with _zeros_filled(model):
        on_cpu.load_state_dict(model.state_dict())
        with torch.no_grad():
            logits = [m.eval()(ids.to(where)).cpu().flatten().double()
                      for m, where in ((model, device), (on_cpu, "cpu"))]
        gradients = [_gradient(m, ids.to(where), targets.to(where), torch.float32)
                     for m, where in ((model, device), (on_cpu, "cpu"))]
    for what, (found, right) in {"logits": logits, "gradient": gradients}.items():
        difference = float((found - right).norm() / right.norm().clamp(min=1e-30))
        if not difference <= TOLERANCE[torch.float32]:
            raise UserError(f"The {what} on {device} differ by {difference:.1e} from those of the "
                            "CPU, so nothing trained there could be trusted. Set device to cpu.")
