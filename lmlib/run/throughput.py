"""How fast a run goes, against what its machine can do."""

import math
import time
from functools import cached_property
from typing import Any

import torch

from lmlib.model.size import flops_per_token
from lmlib.model.transformer import LanguageModel


class Throughput:
    """The clocks of a run: all of its seconds, and those of its updates alone, over every session.

    `before` is what `state()` gave when the run was last saved; work lost since then is left out.
    """

    def __init__(self, model: LanguageModel, total_steps: int, batch_tokens: int, dtype: torch.dtype, before: dict):
        self.device = next(model.parameters()).device
        self.total_steps, self.batch_tokens = total_steps, batch_tokens
        self.flops_per_token = flops_per_token(model)
        self.dtype = dtype
        self.seconds_before = before.get("seconds", 0.0)
        self.update_seconds, self.updates = before.get("update_seconds", 0.0), before.get("updates", 0)
        self.logged = self.update_seconds, self.updates
        self.began = time.perf_counter()

    @cached_property
    def peak(self) -> float:
        """Measured when it is first asked for, so that going on does not wait for it."""
        return matmul_peak(self.device, self.dtype)

    def start_update(self):
        self.update_began = time.perf_counter()

    def end_update(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.update_seconds += time.perf_counter() - self.update_began
        self.updates += 1

    def seconds(self) -> float:
        """Of training in all sessions, evaluations and saves included."""
        return self.seconds_before + time.perf_counter() - self.began

    def state(self) -> dict[str, float]:
        return {"seconds": self.seconds(), "update_seconds": self.update_seconds, "updates": self.updates}

    def tokens_per_second(self) -> float:
        """Trained tokens over the time of updates, in all sessions."""
        return self.updates * self.batch_tokens / self.update_seconds if self.updates else 0.0

    def speed(self, step: int) -> dict[str, Any]:
        """Since the last call: tokens/s and share of the machine's peak; and the seconds that the run may still take."""
        seconds, updates = self.update_seconds - self.logged[0], self.updates - self.logged[1]
        self.logged = self.update_seconds, self.updates
        rate = updates * self.batch_tokens / seconds
        speed = {
            "tokens_per_second": round(rate, 1),
            "utilization": round(self.flops_per_token * rate / self.peak, 4),
            "seconds_left": round((self.total_steps - step) * self.seconds() / self.updates, 1),
        }
        if self.device.type == "cuda":
            speed["gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)
        return speed


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in the best of several large matrix products, now, in this precision."""
    size = 8192 if device.type == "cuda" else 1536
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best = math.inf
    for _ in range(8 if dtype == torch.float32 or device.type == "cuda" else 1):  # bfloat16 can crawl on a CPU
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
