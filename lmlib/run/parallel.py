"""How the processes of a run share a model: `Replicas` (sharding: none) or `Shards` (full).

With `Replicas` each process has the whole model, and DDP sums the gradients. With `Shards` (FSDP2)
each has a piece of every parameter, and whole layers only while it computes them. In both, each
parameter is owned by one process, which updates it whole and keeps its optimizer state: Muon on a
piece of a matrix would be another update, and a norm over pieces would have other bits.

Of W processes with `Shards` each needs 1/W of: the pieces, the owned parameters, the gradients and
the optimizer state. While a model is evaluated, audited or saved, it is whole on every process.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmlib import distributed
from lmlib.config import RunConfig
from lmlib.model.moe import routers
from lmlib.model.transformer import LanguageModel
from lmlib.run.gradients import clip_gradients


class Replicas:
    """The whole model, on every process."""
    def __init__(self, model: LanguageModel, owners: dict[Tensor, int]):
        self.model, self.owners = model, owners

    def sum_gradients(self, exact: bool):
        """Make backward passes sum over the processes; `exact`: in an order that is always one."""
        if distributed.world_size() > 1:
            self.model.loss = distributed.ReducedLoss(self.model, exact)

    def clip_gradients(self, limit: float) -> Tensor:
        """Scale the gradient down to norm `limit` (0: no limit); returns its norm before: ()."""
        return clip_gradients(self.model, limit)

    def send_parameters(self):
        """Send what the owners have updated."""
        distributed.broadcast_parameters(self.owners)

    def gathered(self) -> AbstractContextManager:
        """Return a context in which every process has all parameters."""
        return nullcontext()


def hollow_model(config: RunConfig, device: torch.device) -> LanguageModel:
    """Return a model whose parameters have shapes but no memory."""
    model = _on_meta(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter = nn.Parameter(torch.empty_like(parameter, device=device))
            parameter.untyped_storage().resize_(0)
            setattr(module, name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))
    _tie(model)
    return model


class Shards:
    """The pieces of a model on this process: `model` computes losses and gradients.

    `whole` is a `hollow_model`, of which the parameters that this process owns get memory. The
    `initial` weights are those of rank 0.
    """
    def __init__(self, whole: LanguageModel, owners: dict[Tensor, int],
                 initial: LanguageModel | None):
        self.whole, self.owners, self.model = whole, owners, _shard(whole)
        self.pieces = dict(zip(owners, self.model.parameters(), strict=True))
        self.empty = next(iter(owners)).new_empty(0)
        # At most one parameter of each owner in an exchange, which bounds the memory it takes.
        largest_first = sorted(owners, key=lambda parameter: -parameter.numel())
        self.exchanges = list(zip_longest(*(
            [parameter for parameter in largest_first if owners[parameter] == owner]
            for owner in range(distributed.world_size()))))
        self._receive(initial)

    def _receive(self, initial: LanguageModel | None):
        """Copy rank 0's weights to the owners, and the pieces to everyone."""
        for parameter, owner in self.owners.items():
            if owner == distributed.rank():
                _give_memory(parameter)
        sources = initial or self.whole  # of the same shapes
        for parameter, source in zip(self.owners, sources.parameters(), strict=True):
            value = torch.empty_like(parameter)
            if initial:
                value.copy_(source.detach())
            dist.broadcast(value, 0)
            if self.owners[parameter] == distributed.rank():
                parameter.data.copy_(value)
        for buffer, source in zip(self.whole.buffers(), sources.buffers(), strict=True):
            dist.broadcast(buffer.copy_(source), 0)
        self.send_parameters()

    def sum_gradients(self, exact: bool):
        """Make backward passes sum over the processes, `exact` in the order of a tree."""
        for module in [*self.model.model.layers, self.model]:
            module.set_gradient_divide_factor(1.0)  # sums, not means
            module.set_force_sum_reduction_for_comms(True)
            if exact:
                module.set_custom_reduce_scatter(_TreeReduceScatter())

    def clip_gradients(self, limit: float) -> Tensor:
        """Send the gradients to the owners and clip them; returns their norm before: ()."""
        self._send_gradients()
        # Norms of whole tensors, in the order of the parameters: the bits of one process.
        owned = [p for p, owner in self.owners.items() if owner == distributed.rank()]
        found = torch._foreach_norm([p.grad for p in owned]) if owned else ()
        found = dict(zip(owned, found, strict=True))
        norms = torch.stack([found.get(p, p.new_zeros(())) for p in self.owners])
        total = torch.linalg.vector_norm(distributed.add_up(norms))
        torch.nn.utils.clip_grads_with_norm_(owned, limit or math.inf, total)
        return total

    @torch.no_grad()
    def _send_gradients(self):
        """Send the pieces of each gradient to the parameter's owner, and drop them."""
        for parameters in self.exchanges:
            mine, pieces = parameters[distributed.rank()], []
            for parameter in parameters:
                pieces.append(self.empty if parameter is None else
                              self.pieces[parameter].grad.to_local().flatten())
                if parameter is not None:
                    self.pieces[parameter].grad = None
            received = _exchange(pieces, [] if mine is None else _cut(mine))
            if mine is not None:
                mine.grad = received.view_as(mine)

    @torch.no_grad()
    def send_parameters(self):
        """Send each owned parameter to the processes that have its pieces."""
        for parameters in self.exchanges:
            mine = parameters[distributed.rank()]
            pieces = [self.empty if parameter is None else self.pieces[parameter].to_local()
                      for parameter in parameters]
            sent = [self.empty] * len(pieces)
            if mine is not None:
                sent, mine.grad = _cut(mine), None  # the gradient is used up
            received = _exchange(sent, pieces)
            for piece, new in zip(pieces, received.split([p.numel() for p in pieces]), strict=True):
                piece.copy_(new.view_as(piece))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Make `whole` whole on every process until the end of the block."""
        others = [p for p, owner in self.owners.items() if owner != distributed.rank()]
        try:
            for parameter in others:
                _give_memory(parameter)
            distributed.broadcast_parameters(self.owners)
            yield
        finally:
            for parameter in others:
                parameter.untyped_storage().resize_(0)


class _TreeReduceScatter:
    """What FSDP2 sums gradients by, in the order of a binary tree over the processes."""
    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype,
                 device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup,
                 op: dist.ReduceOp, async_op: bool = False):
        output_tensor.copy_(distributed.tree_reduce_scatter(input_tensor))


def _shard(whole: LanguageModel) -> LanguageModel:
    """Return a model of pieces, which have no values yet."""
    from torch.distributed.device_mesh import init_device_mesh  # imports for a second
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    device, model = next(whole.parameters()).device, _on_meta(whole.config)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # on which FSDP2 puts the pieces
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh)
    _tie(model.to_empty(device=device))
    register_fsdp_forward_method(model, "loss")
    for router, of_whole in zip(routers(model), routers(whole), strict=True):
        router.e_score_correction_bias = of_whole.e_score_correction_bias
    return model


def _on_meta(config: RunConfig) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(config)


def _tie(model: LanguageModel):
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def _give_memory(parameter: Tensor):
    parameter.untyped_storage().resize_(parameter.nbytes)


def _cut(tensor: Tensor) -> list[Tensor]:
    """Cut a parameter as FSDP2 does: by rows, the last pieces perhaps shorter or empty."""
    count = distributed.world_size()
    rows = -(-len(tensor) // count)
    return [tensor[n * rows : (n + 1) * rows].flatten() for n in range(count)]


def _exchange(sent: list[Tensor], shapes: list[Tensor]) -> Tensor:
    """Send a flat tensor to each process; returns what they sent, as large as `shapes`, in one."""
    sizes = [tensor.numel() for tensor in shapes] or [0] * len(sent)
    received = sent[0].new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(sent), sizes, [len(tensor) for tensor in sent])
    return received
