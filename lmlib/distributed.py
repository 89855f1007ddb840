"""The same loop in several processes, by torch.distributed; in one process each call does nothing.

Every process makes the same calls in the same order. Rank 0 alone writes. With `exact` gradients,
sums do not depend on the number of processes: see `_tree_sum` and, for rounds, `PairwiseSum`.
"""

import json
import os
import platform
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lmlib.errors import Stopped, UserError

TESTED = (2, 13)  # the torch version that several processes need
LIMIT = 600  # seconds for any exchange while training; LMLIB_EXCHANGE_LIMIT in the environment
PATIENCE = timedelta(hours=24)  # while rank 0 prepares the data or writes a checkpoint
_patient: list[dist.ProcessGroup] = []  # the group that waits so long, from its first use


class LocalError(UserError):
    """An error of one process that the others do not know of."""


def is_launched() -> bool:
    """Whether a launcher (torchrun, `lmlib train --processes`) started this process and others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_worker() -> bool:
    """Whether a launcher started this process, perhaps alone: it starts no processes itself."""
    return is_launched() or "TORCHELASTIC_RUN_ID" in os.environ


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes, prints and samples; known before joining."""
    return not is_launched() or int(os.environ.get("RANK", 0)) == 0


def local_device() -> str:
    """Name the CUDA device of this process."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if is_launched() else "cuda"


@contextmanager
def join() -> Iterator[None]:
    """Join the other processes until the end of the block, if there are any."""
    if not is_launched() or dist.is_initialized():
        yield
        return
    # Tensors on the CPU go through gloo everywhere: what is agreed on never waits for a GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    has_backend = dist.is_gloo_available() and (backend == "gloo" or dist.is_nccl_available())
    if tuple(map(int, torch.__version__.split(".")[:2])) < TESTED or not has_backend:
        once = LocalError if os.environ.get("LOCAL_RANK") == "0" else UserError  # on each machine
        raise once(f"Several processes need torch {TESTED[0]}.{TESTED[1]} or newer, with gloo (and "
                   f"NCCL for CUDA); {platform.node()} has torch {torch.__version__}.")
    limit = timedelta(seconds=float(os.environ.get("LMLIB_EXCHANGE_LIMIT", LIMIT)))
    dist.init_process_group(backend, timeout=limit)
    leaving = dist.new_group(timeout=timedelta(seconds=20), backend="gloo")
    try:
        yield
    except (UserError, Stopped) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first to end must not end the others
        try:
            gather(None, leaving)
        except RuntimeError:  # they know nothing of it
            if isinstance(error, UserError):
                raise LocalError(str(error)) from error
        raise
    finally:
        dist.destroy_process_group()
        _patient.clear()


# ---- Values ----

def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the value of each rank, on every rank. Values are what JSON can hold."""
    if world_size() == 1:
        return [value]
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(content)]), group=group)
    found = [torch.empty(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
    dist.all_gather(found, nn.functional.pad(content, (0, len(found[0]) - len(content))),
                    group=group)
    return [json.loads(bytes(part[: int(size)].tolist()))
            for part, size in zip(found, sizes, strict=True)]


def agree(function: Callable[[], Any], only_first: bool = False, patient: bool = False) -> Any:
    """Call a function on every rank, or with `only_first` on rank 0, which sends its JSON result.

    A UserError of one rank is raised on all, with its rank and machine. `patient` ranks wait a day.
    """
    if world_size() == 1:
        return function()
    result, mine = None, None
    # Connected before rank 0 works, so that the others see at once if it dies.
    if patient and not _patient:
        _patient.append(dist.new_group(timeout=PATIENCE, backend="gloo"))
    if is_first() or not only_first:
        try:
            result = function()
        except UserError as error:
            mine = error
    found = gather([mine and str(mine), platform.node(), result if only_first else None],
                   _patient[0] if patient else None)
    for number, (problem, machine, _) in enumerate(found):
        if problem:
            raise mine if number == rank() else UserError(
                problem if number == 0 else f"{problem} (rank {number}, on {machine})")
    return found[0][2] if only_first else result


def check_equal(what: dict[str, Any]):
    """Raise a UserError if the ranks differ in a value, naming it, a rank and its machine."""
    found = gather([what, platform.node()])
    for number, (theirs, machine) in enumerate(found):
        for name, value in found[0][0].items():
            if theirs.get(name) != value:
                raise UserError(f"The processes differ in {name}: {value!r} on rank 0 "
                                f"({found[0][1]}), {theirs.get(name)!r} on rank {number} "
                                f"({machine}). Start all of them with the same command and code.")


def first_reason(reason: str) -> str:
    """Return the reason to stop of the lowest rank that has one, or ""; quick, for every step."""
    if world_size() == 1:
        return reason
    mine = torch.tensor(list(reason.encode()[:64].ljust(64, b"\0")), dtype=torch.uint8)
    found = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(found, mine)
    return next((bytes(r.tolist()).rstrip(b"\0").decode() for r in found if r.any()), "")


def deal(items: Sequence) -> Iterable[tuple[int, Any]]:
    """Yield the numbers and items that fall to this rank: every `world_size`-th."""
    return ((n, items[n]) for n in range(rank(), len(items), world_size()))


def add_up(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place; exact if at most one rank's value is not zero."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


# ---- Gradients ----

class ReducedLoss:
    """A model's `loss` under DDP: its backward pass sums the gradients of all ranks.

    They are summed, not averaged; with `exact` in the order of a binary tree over the ranks.
    """
    def __init__(self, model: nn.Module, exact: bool):
        device = next(model.parameters()).device
        self.ddp = DistributedDataParallel(
            _Loss(model), device_ids=[device] if device.type == "cuda" else None,
            forward_sync_buffers=False, init_sync=False)
        self.ddp.register_comm_hook(None, _tree_sum if exact else _all_reduce)

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.ddp(ids, targets)


class _Loss(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.forward = model, model.loss  # which may be compiled


def keep_local(model: nn.Module, is_local: bool) -> Any:
    """Return a context in which gradients are not summed over the ranks yet, if `is_local`."""
    loss = vars(model).get("loss")
    return loss.ddp.no_sync() if is_local and isinstance(loss, ReducedLoss) else nullcontext()


def _all_reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _tree_sum(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum as `tree_reduce_scatter` does, and gather the parts."""
    buffer, ranks = bucket.buffer(), world_size()
    mine = nn.functional.pad(buffer, (0, -len(buffer) % ranks))
    part = tree_reduce_scatter(mine)
    dist.all_gather(list(mine.view(ranks, -1)), part)
    done = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
    done.set_result(mine[: len(buffer)])
    return done


def tree_reduce_scatter(tensor: Tensor) -> Tensor:
    """Sum over the ranks in the order ((0 + 1) + (2 + 3)) + ...; returns this rank's equal part."""
    parts = torch.empty_like(tensor)
    dist.all_to_all_single(parts, tensor)
    parts = list(parts.view(world_size(), -1))
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def broadcast_parameters(owners: dict[Tensor, int]):
    """Send each parameter from the rank that owns it, and has updated it, to the others."""
    for owner in range(world_size()):
        parts = [p.data for p, own in owners.items() if own == owner]
        if parts and world_size() > 1:
            flat = torch.cat([part.flatten() for part in parts])
            dist.broadcast(flat, owner)
            for part, new in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
                part.copy_(new.view_as(part))
            del flat, new  # before the next owner's is made


def collect(tensors: dict[str, Tensor], shapes: dict[str, torch.Size],
            owner_of: Callable[[str], int]) -> dict[str, Tensor]:
    """Gather named float32 tensors from the ranks that own them, one by one; whole on rank 0."""
    if world_size() == 1:
        return tensors
    found, on_cuda = {}, any(tensor.is_cuda for tensor in tensors.values())
    for name, shape in shapes.items():
        owner = owner_of(name)
        if owner == rank() == 0:
            found[name] = tensors[name]
        elif owner == rank():
            dist.send(tensors[name].contiguous(), 0)
        elif is_first():
            received = torch.empty(shape, device=local_device() if on_cuda else "cpu")
            dist.recv(received, owner)
            found[name] = received.cpu()
    return found
