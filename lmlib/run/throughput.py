"""How fast a run trains, against what its machine can do."""

import time
from functools import cached_property
from typing import Any

import torch

from lmlib import distributed
from lmlib.model.size import flops_per_token
from lmlib.model.transformer import LanguageModel
from lmlib.optim import has_bfloat16


class Throughput:
    """The clocks of a run over all its sessions: total seconds, and those of its updates alone.

    `before` is what `state()` returned when the run was last saved; work lost since is left out.
    """
    def __init__(self, model: LanguageModel, dtype: torch.dtype, before: dict[str, float]):
        self.device, self.dtype, config = next(model.parameters()).device, dtype, model.config
        self.total_steps = config.total_steps
        self.batch_tokens = config.batch_size * config.sequence_length
        self.flops_per_token = flops_per_token(model)
        self.started = time.perf_counter() - before.get("seconds", 0.0)
        self.update_seconds = before.get("update_seconds", 0.0)
        self.updates = before.get("updates", 0)
        self.updates_started = 0.0
        self.logged = self.update_seconds, self.updates

    @cached_property
    def peak(self) -> float:
        """Of all processes; measured at the first log line, so that resuming does not wait."""
        return matmul_peak(self.device, self.dtype) * distributed.world_size()

    def start_updates(self):
        """Start the clock of updates, unless it runs."""
        self.updates_started = self.updates_started or time.perf_counter()

    def end_updates(self, count: int):
        """Stop it after so many updates, whose results have been read: their kernels have run."""
        if count:
            self.update_seconds += time.perf_counter() - self.updates_started
            self.updates += count
        self.updates_started = 0.0

    def seconds(self) -> float:
        """Return the seconds of all sessions, evaluations and saves included."""
        return time.perf_counter() - self.started

    def state(self) -> dict[str, float]:
        return {"seconds": self.seconds(), "update_seconds": self.update_seconds,
                "updates": self.updates}

    def tokens_per_second(self) -> float:
        """Return trained tokens over the time of updates, in all sessions."""
        return self.updates * self.batch_tokens / self.update_seconds if self.updates else 0.0

    def since_last_log(self, step: int) -> dict[str, Any]:
        """Return tokens/s and utilization since the last call, and the seconds left."""
        seconds, updates = self.update_seconds - self.logged[0], self.updates - self.logged[1]
        rate, steps_left = updates * self.batch_tokens / seconds, self.total_steps - step
        self.logged = self.update_seconds, self.updates
        timing = {"tokens_per_second": round(rate, 1),
                  "utilization": round(self.flops_per_token * rate / self.peak, 4),
                  "seconds_left": round(steps_left * self.seconds() / self.updates, 1)}
        if self.device.type == "cuda":
            timing["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)
        return timing


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of the fastest of several large matrix products in this precision."""
    size = 8192 if device.type == "cuda" else 1536
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    slow = dtype != torch.float32 and not has_bfloat16(device)  # without units for it: once
    seconds = []
    for _ in range(1 if slow else 8):
        started = time.perf_counter()
        a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
