"""What a run needs, by arithmetic: memory, time, communication and disk. Nothing is trained.

Models are built without values: on torch's meta device, and of its fake tensors to count the
activations that a backward pass needs. What is assumed of machines stands in `MACHINES`.
"""

import time
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lmlib import optim
from lmlib.config import RunConfig
from lmlib.errors import UserError
from lmlib.model.loss import HeadLoss
from lmlib.model.size import flops_per_token, parameter_count
from lmlib.model.transformer import LanguageModel
from lmlib.run.device import pick_dtype
from lmlib.run.start import disk_needed
from lmlib.run.throughput import matmul_peak
from lmlib.run.together import check_processes


@dataclass(frozen=True)
class Machine:
    """A device and what part of its datasheet's figures a run is assumed to reach."""
    name: str
    flops: dict[torch.dtype, float]  # FLOP/s of matrix products in each type
    dtype: torch.dtype  # of `dtype: auto`, and of Muon's products
    memory: float | None  # bytes
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s that a process sends and receives while those of a machine exchange
    network: float  # the same between machines
    utilization: float  # of `flops` in the model's and Muon's matrix products
    launch: float = 5e-6  # seconds to start a kernel
    runtime: float = 0.7e9  # bytes of the libraries' code and buffers

    def link_of(self, processes: int) -> float:
        """Return the bytes/s that each of a run's processes sends and receives."""
        return self.link if processes <= PER_MACHINE else self.network

BF16, F32 = torch.bfloat16, torch.float32
# Datasheets: dense matrix products, memory, and the links between GPUs of one machine. Between
# machines: 400 Gbit/s for each H100, 200 for each A100, 10 for the others. GPUs with units for
# bfloat16 multiply float32 in TF32: see `run.device.numerics`.
# fmt: off
MACHINES = {
    "h100": Machine("h100", {BF16: 989e12, F32: 494e12}, BF16, 80e9, 3.35e12, 300e9, 50e9, 0.50),
    "a100": Machine("a100", {BF16: 312e12, F32: 156e12}, BF16, 80e9, 2.04e12, 200e9, 25e9, 0.55),
    "4090": Machine("4090", {BF16: 165e12, F32: 82.6e12}, BF16, 24e9, 1.01e12, 20e9, 1.2e9, 0.55),
    "t4": Machine("t4", {F32: 8.1e12}, F32, 16e9, 0.32e12, 10e9, 1.2e9, 0.60),
}
# fmt: on
PER_MACHINE = 8  # processes; more are on several machines
# Of each saved activation this many times its bytes are read and written in forward and backward;
# of each parameter as many in clipping and update.
TRAFFIC, UPDATE_TRAFFIC = 12, 10
KERNELS_PER_LAYER = 124  # benchmarks/launches.py


@dataclass(frozen=True)
class Plan:
    """What a run needs. Bytes are those of one process, seconds those of one step."""
    config: RunConfig
    machine: Machine
    dtype: torch.dtype  # of the model's matrix products
    processes: int
    parameters: int
    memory: dict[str, float]  # bytes, by what needs them
    peak: float  # bytes
    flops: float  # of a step, in all processes
    seconds: dict[str, float]
    sent: float  # bytes that a process sends in a step
    disk: float  # bytes of the checkpoints

    @property
    def step_seconds(self) -> float:
        """The host starts kernels while the device computes; sending is not hidden."""
        parts = dict(self.seconds)
        launching, sending = parts.pop("starting kernels"), parts.pop("communication")
        return max(launching, sum(parts.values())) + sending

    @property
    def fits(self) -> bool:
        """Whether a tenth of the device's memory stays free; True if that is not known."""
        return self.machine.memory is None or self.peak < 0.9 * self.machine.memory


def plan(config: RunConfig, machine: Machine | None = None, processes: int = 1) -> Plan:
    """Return what a run needs on a machine (None: this one's CPU, measured for a second).

    Raises a UserError if the processes cannot share the batch, if vocab_size is null, or if the
    machine has no units for `config.dtype`.
    """
    if processes > 1:
        check_processes(config, processes)
    machine = machine or this_machine(pick_dtype(config.dtype, torch.device("cpu")))
    dtype = machine.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if dtype not in machine.flops:
        raise UserError(f"dtype is {config.dtype}, for which a {machine.name} has no units: set it "
                        "to float32 or auto.")
    rows = min(config.micro_batch_size or config.batch_size, config.batch_size // processes)
    with torch.device("meta"):
        model = LanguageModel(config)
    optimizers = optim.build_optimizers(model, config)
    count, share = parameter_count(model), 1 / processes
    rounds = -(-config.batch_size // rows) // processes  # micro-batches of each process
    activations = saved_bytes(config, rows, dtype)
    memory, peak = _memory(config, model, optimizers, activations, rows, rounds, processes)
    tokens = config.batch_size * config.sequence_length
    products = flops_per_token(model) * tokens
    newton_schulz = sum(_newton_schulz_flops(matrix)
                        for stack in _muon_stacks(optimizers) for matrix in stack)
    sent = _sent(config, 4.0 * count, rounds, processes)
    speed, muons_speed = (machine.flops[kind] * machine.utilization
                          for kind in (dtype, machine.dtype))
    updated = share if is_divided(config, processes) else 1.0
    seconds = {
        "matrix products": products * share / speed,
        "Muon's products": newton_schulz * share / muons_speed,
        "other operations": TRAFFIC * activations * config.batch_size * share / rows
        / machine.bandwidth,
        "update": UPDATE_TRAFFIC * 4.0 * count * updated / machine.bandwidth,
        "starting kernels": rounds * KERNELS_PER_LAYER * config.num_hidden_layers * machine.launch,
        "communication": sent / machine.link_of(processes)}
    return Plan(config, machine, dtype, processes, count,
                {**memory, "runtime": machine.runtime}, peak + machine.runtime,
                products + newton_schulz, seconds, sent,
                disk_needed(config, model, optimizers, 0))


def is_divided(config: RunConfig, processes: int) -> bool:
    return config.sharding == "full" and processes > 1


def _memory(config: RunConfig, model: LanguageModel, optimizers: list[torch.optim.Optimizer],
            activations: float, rows: int, rounds: int, processes: int
            ) -> tuple[dict[str, float], float]:
    """Return the bytes by what needs them, and at their peak, of the process that needs most."""
    weights = gradient = updated = 4.0 * parameter_count(model)
    owned, state = _largest_share(config, model, optimizers, processes)
    logits = min(HeadLoss.rows, rows * config.sequence_length) * config.vocab_size * 4
    stack = max((sum(p.nbytes for p in stack) for stack in _muon_stacks(optimizers)), default=0)
    other = {}
    if is_divided(config, processes):
        # Pieces and owned parameters; two layers, and what is outside of layers, are whole while a
        # batch is computed, with gradients. To evaluate, the parameters of all other owners come,
        # and for a moment those of one owner twice.
        gradient, updated = weights / processes, owned
        layer = 4.0 * parameter_count(model.model.layers[0])
        outside = weights - config.num_hidden_layers * layer
        other = {"whole layers": 2 * (2 * layer + outside), "whole model to evaluate": weights}
        weights = gradient + owned
    elif processes > 1:
        other = {"DDP's buckets": weights, "sending parameters": owned}
    # Of earlier micro-batches, while another is computed: their gradients' sum, or the most sums
    # that `PairwiseSum` holds. It takes the newest gradient whole.
    sums = rounds.bit_length() - 1 if config.deterministic else min(rounds - 1, 1)
    gradients = gradient * (sums + 1 if config.deterministic else 1)
    memory = {"weights": weights, "optimizer": state, "gradients": gradients, **other,
              "activations": activations, "loss over the vocabulary": 3.0 * logits,
              "Muon's stacks": 5.0 * stack}
    # The newest gradient comes as the activations go. The head's comes with the loss.
    head = 4 * config.vocab_size * config.hidden_size
    return memory, weights + state + other.get("DDP's buckets", 0) + max(
        sums * gradient + activations + 3 * logits + other.get("whole layers", head),
        gradients, updated + 5 * stack, updated + other.get("sending parameters", 0),
        other.get("whole model to evaluate", 0))


def _largest_share(config: RunConfig, model: LanguageModel,
                   optimizers: list[torch.optim.Optimizer], processes: int) -> tuple[float, float]:
    """Return the most bytes of parameters that one process owns, and of their optimizer state.

    The owners share the work, and so not quite the bytes.
    """
    owned = [set() for _ in range(processes)]
    for parameter, owner in optim.owners(model, optimizers, processes).items():
        owned[owner].add(parameter)
    return (float(max(sum(p.nbytes for p in parameters) for parameters in owned)),
            float(max(optim.state_bytes(optim.build_optimizers(model, config, parameters))
                      for parameters in owned)))


def _muon_stacks(optimizers: list[torch.optim.Optimizer]) -> list[list[Tensor]]:
    return [stack for optimizer in optimizers if isinstance(optimizer, optim.Muon)
            for group in optimizer.param_groups for stack in optimizer.stacks(group["params"])]


def _sent(config: RunConfig, weights: float, rounds: int, processes: int) -> float:
    """Count the bytes that a process sends in a step."""
    others = 1 - 1 / processes
    if is_divided(config, processes):  # whole layers twice and gradients, then to owners and back
        return (3 * rounds + 2 / processes) * weights * others
    sums = rounds if config.deterministic else 1  # exact sums cannot wait for the last micro-batch
    return (2 * sums + 1) * weights * others  # all-reduces, then broadcast


def largest_micro_batch(needs: Plan) -> int | None:
    """Return the most windows at a time that fit, if any."""
    rows = needs.config.batch_size // needs.processes
    while rows:
        smaller = replace(needs.config, micro_batch_size=rows)
        with suppress(UserError):  # where the processes cannot share the micro-batches
            if plan(smaller, needs.machine, needs.processes).fits:
                return rows
        rows //= 2
    return None


def fits_divided(needs: Plan) -> bool:
    """Whether it fits if a process per window, the most there can be, divides the model."""
    divided = replace(needs.config, micro_batch_size=1, sharding="full", compile="auto",
                      deterministic=False, device="auto")
    return plan(divided, needs.machine, divided.batch_size).fits


def this_machine(dtype: torch.dtype = F32) -> Machine:
    """Measure the CPU's matrix products and memory, with the threads that torch uses."""
    source = torch.ones(2**25)
    target, seconds = torch.empty_like(source), []
    for _ in range(4):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    flops = {kind: matmul_peak(torch.device("cpu"), kind) for kind in {F32, dtype}}
    return Machine("this CPU", flops, F32, None, 2 * source.nbytes / min(seconds), 1e9, 1e9, 0.85,
                   launch=1e-5, runtime=0.12e9)


def saved_bytes(config: RunConfig, rows: int, dtype: torch.dtype) -> float:
    """Count the bytes of the activations that the backward pass of `rows` windows needs.

    Experts count as one MLP of the width that a token passes through.
    """
    if config.feed_forward == "moe":
        width = config.moe_intermediate_size * (config.num_experts_per_tok + 1)  # one is shared
        config = replace(config, feed_forward="mlp", intermediate_size=width)
    seen = {}

    def keep(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (FakeTensorMode(allow_non_fake_inputs=True),
          torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
          torch.autocast("cpu", dtype, enabled=dtype != F32)):
        model, ids = LanguageModel(config).train(), torch.zeros(rows, config.sequence_length,
                                                                dtype=torch.long)
        model.loss(ids, ids)
    for parameter in model.parameters():
        seen.pop(parameter.untyped_storage()._cdata, None)
    return float(sum(tensor.untyped_storage().nbytes() for tensor in seen.values()))


def _newton_schulz_flops(matrix: Tensor) -> float:
    """Count the operations of Muon's five steps for a matrix, or a stack of them."""
    short, long = sorted(matrix.shape[-2:])
    return 5 * (matrix.numel() / (short * long)) * (4 * short**2 * long + 2 * short**3)
