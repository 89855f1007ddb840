"""TEMPORARY local copy of the interface; helper 2's file replaces it."""
import math
from collections.abc import Iterable
from dataclasses import dataclass

FEW = 5


def student_t(probability: float, freedom: float) -> float:
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    steps = 20000
    h = math.pi / 2 / steps
    total, previous = 0.5, scale
    for i in range(1, steps + 1):
        now = scale * abs(math.cos(i * h)) ** (freedom - 1)
        area = (previous + now) / 2 * h
        if total + area >= probability:
            return math.sqrt(freedom) * math.tan((i - 1 + (probability - total) / area) * h)
        total, previous = total + area, now
    return math.inf


@dataclass(frozen=True)
class Estimate:
    mean: float
    stderr: float | None
    clusters: int

    def half_width(self, level: float = 0.95) -> float | None:
        if self.stderr is None:
            return None
        return student_t(1 - (1 - level) / 2, self.clusters - 1) * self.stderr

    @property
    def is_few(self) -> bool:
        return self.clusters < FEW


def clustered_mean(totals: Iterable[tuple[float, float]]) -> Estimate:
    totals = list(totals)
    size = sum(s for _, s in totals)
    mean = sum(t for t, _ in totals) / size
    g = len(totals)
    if g < 2:
        return Estimate(mean, None, g)
    var = g / (g - 1) * sum((t - mean * s) ** 2 for t, s in totals) / size**2
    return Estimate(mean, math.sqrt(var), g)
